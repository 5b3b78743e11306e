"""What each part of the RL recipe does, on a model of 0.15M parameters: one part swapped at a time, all else equal.

    python notebooks/experiments/rl_parts.py --seeds 3

A seed is one SFT on two tasks whose teacher searches, and from its end the same number of RL steps by each arm.  To
imitate a search is to be right as often as its guesses are: "more SFT" goes on for as many seconds of the CPU as the
recipe's RL took, and shows that cap.  The arms of lag 8 have a sampler in bf16 that gets the trainer's weights, in
fp32, every 8 steps instead of every 2: there the mask and the replay have something to do.  06_sft_and_rl.ipynb runs
one arm live.  Of the stored seeds the fourth was added, to narrow the intervals, when two had been looked at.
"""
import copy
import time
from dataclasses import dataclass, replace

import arms
import numpy as np
import torch
from arms import train

from zaya import PIDBalancer, Tokenizer

TASKS, LEVELS = ("find", "falsify"), (1, 2, 3)
SHAPE = dict(hidden_size=64, moe_intermediate_size=64, num_attention_heads=4, head_dim=16, router_hidden_size=16)
SFT = train.Stage(300, 128, 1e4, 1.0, 1e-2, 1e-3, difficulty=3, turns=1, mask_prompts=True)
RL = train.RLStage(40, 96, 1e4, 3e-3, 1e-3, TASKS, groups=8, group_size=8, learned=8)
TOKENIZER = Tokenizer()                                                    # bytes: no merges to learn


def settings(seed, tokens_per_step=2048):
    return train.parse_arguments(["--preset", "smoke", "--tasks", ",".join(TASKS), "--seed", str(seed),
                                  "--tokens-per-step", str(tokens_per_step)])[0]


def imitate(model, seed, stage=SFT, samples=0):
    """SFT on the teachers' searches; `samples` names other data -> the losses."""
    source = train.TaskSource(TASKS, stage, TOKENIZER, f"{seed} {samples}")
    setting = arms.Setting(settings(seed), stage, TOKENIZER, [source])
    return [row["loss"] for row in arms.practise(model, setting, name="SFT")]


def ppo_mask(pi, mu, advantage, clip=0.2):
    """PPO: no gradient once pi / mu has left 1 ± clip in the direction the advantage pushes."""
    return torch.where(advantage > 0, pi <= mu * (1 + clip), pi >= mu * (1 - clip))


class Actor(train.Actor):
    """Asks at LEVELS, where so small a model is right now and then; the tasks' own levels are for a larger one."""

    def draw_prompt(self, rng):
        name = min(self.asked, key=self.asked.get)
        level = LEVELS[self.asked[name] % len(LEVELS)]
        self.asked[name] += 1
        return self.new_group(name, level, rng)


def right_or_wrong(group):
    """The verifier's word: train.py pays for parts of an answer too."""
    verify = train.find_task(group.problem.task).verify
    return [verify(group.problem, text)[0] for text in group.texts]


def learn(model, batches, rollouts, mask, replay):
    """The gradient of train.rl_step, with another mask, or with experts that the trainer's router chooses anew -> the
    share of tokens that were masked."""
    model.train()
    masked = tokens = 0
    for inputs, targets, positions, choices, sampled_logp, advantage in batches:
        routing = list(choices) if replay else []
        logp = train.token_logps(model, inputs, targets, positions, routing)
        keep = mask(logp.detach().exp(), sampled_logp.exp(), advantage, 0.1)
        masked, tokens = masked + (~keep).sum().item(), tokens + keep.numel()
        # With delta = 1 policy_loss masks nothing of its own.
        train.policy_loss(logp, sampled_logp, advantage * keep, rollouts, delta=1.0).backward()
    return masked / tokens


def reinforce(model, seed, stage=RL, advantage=train.maxrl_advantage, mask=train.dppo_mask, replay=True, lag=2,
              sampler=torch.float32):
    """train.rl_stage's loop without its files; an arm swaps some of the arguments -> one row a step."""
    config, rows = settings(seed), []
    optimizers = train.make_optimizers(model, stage.lr, momentum=0.0)
    balancer = PIDBalancer(model, config.balancer_lr / 10)
    actor = Actor(model, TOKENIZER, stage, f"{seed} rl", right_or_wrong, sampler)
    actor.sync_every = actor.most_stale = lag
    for step in range(stage.steps):
        if step % lag == 0:
            actor.sync(model, step)
        groups, generated = actor.take(step)
        row = train.rollout_metrics(generated, groups, step)
        if groups:
            rewards = torch.tensor([group.rewards for group in groups])                         # (P, G)
            bonus = torch.zeros_like(rewards)
            for i, group in enumerate(groups):
                lengths = torch.tensor(group.lengths()).float()
                bonus[i] = train.length_reward(lengths, rewards[i], actor.best(group), stage.length_reward)
            batches = train.rl_batches(groups, advantage(rewards, bonus), config.micro_batch, TOKENIZER.pad, "cpu")
            row["flips"], row["kl"], row["kl_live"] = train.replay_gap(model, batches[len(batches) // 2])
            row["masked"] = learn(model, batches, rewards.numel(), mask, replay)
            lr = train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
            train.optimizer_step(model, optimizers, config.grad_clip, lr)
            balancer.step()
        rows.append(row)
    return rows


FAR = dict(lag=8, sampler=torch.bfloat16)
# What each arm swaps, as arguments of `reinforce`.
SWAPPED = {"recipe": {},
           "GRPO": dict(advantage=train.grpo_advantage),
           "bf16, lag 8": FAR,
           "bf16, lag 8, PPO clip": dict(**FAR, mask=ppo_mask),
           "bf16, lag 8, no replay": dict(**FAR, replay=False)}


@dataclass
class Start:
    """What the arms of a seed share; seconds are the CPU's."""
    model: train.Zaya
    seed: int
    stage: train.RLStage
    problems: list
    sft_seconds: float


def prepare(seed, steps):
    """The same SFT for every arm of a seed, and held-out problems."""
    model = train.new_model(settings(seed), SHAPE, TOKENIZER)
    begun = time.process_time()
    imitate(model, seed)
    seconds = time.process_time() - begun
    return Start(model, seed, replace(RL, steps=steps), train.held_out_problems(TASKS, 60, LEVELS), seconds)


def measure(setting, name, rows):
    """An arm's pass@1, and what it took; of an RL arm also the flips and the KL divergence, means over its steps."""
    model, begun, row = copy.deepcopy(setting.model), time.process_time(), {}
    if name == "more SFT":                                      # at the rate RL begins with
        row["steps"] = round(SFT.steps * rows["recipe"]["seconds"] / setting.sft_seconds)
        imitate(model, setting.seed, replace(SFT, lr=RL.lr, steps=row["steps"]), "more")
    elif name != "SFT":
        log = reinforce(model, setting.seed, setting.stage, **SWAPPED[name])
        for key in ("flips", "kl_live", "masked"):
            found = [step[key] for step in log if key in step]
            row[key] = float(np.mean(found)) if found else None
    row["seconds"] = time.process_time() - begun
    return {"pass@1": float(train.solve_rates(model, TOKENIZER, setting.problems, 4).mean()), **row}


# Each arm and what it is compared with.
ARMS = {"SFT": None, "recipe": "SFT", "more SFT": "recipe", "GRPO": "recipe", "bf16, lag 8": "recipe",
        "bf16, lag 8, PPO clip": "bf16, lag 8", "bf16, lag 8, no replay": "bf16, lag 8"}
COLUMNS = {"pass@1": (arms.of("pass@1"), ".3f"), "CPU seconds": (arms.of("seconds"), ".0f"),
           "flips": (arms.of("flips"), ".4f"), "KL, sampler to trainer": (arms.of("kl_live"), ".2g"),
           "masked": (arms.of("masked"), ".4f")}

if __name__ == "__main__":
    arms.main(__doc__, "rl_parts", prepare, measure, ARMS, COLUMNS, RL.steps)
