"""What each part of the RL recipe does, on a model of 0.15M parameters: one part swapped at a time, all else equal.

    python notebooks/experiments/rl_parts.py --seeds 3

A seed is one SFT on two tasks whose teacher searches, and from its end the same number of RL steps by each arm.  The
`stale` arms sync the sampler every 8 steps instead of every 2, so that the mask and the replay have something to do.
06_sft_and_rl.ipynb runs one arm live.
"""
import copy
from dataclasses import replace

import arms
import torch
from arms import train

from zaya import PIDBalancer, Tokenizer

TASKS, LEVELS = ("find", "falsify"), (1, 2, 3)
SHAPE = dict(hidden_size=64, moe_intermediate_size=64, num_attention_heads=4, head_dim=16, router_hidden_size=16)
SFT = train.Stage(200, 128, 1e4, 1.0, 1e-2, 1e-3, difficulty=3, turns=1, mask_prompts=True)
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


def right_or_wrong(group):
    """The verifier's word: train.py pays for parts of an answer too."""
    verify = train.find_task(group.problem.task).verify
    return [verify(group.problem, text)[0] for text in group.texts]


def learn(model, batches, rollouts, mask, replay):
    """The gradient of train.rl_step, with another mask, or with experts that the trainer's router chooses anew."""
    model.train()
    for inputs, targets, positions, choices, sampled_logp, advantage in batches:
        routing = list(choices) if replay else []
        logp = train.token_logps(model, inputs, targets, positions, routing)
        keep = mask(logp.detach().exp(), sampled_logp.exp(), advantage, 0.1)
        # With delta = 1 policy_loss masks nothing of its own.
        train.policy_loss(logp, sampled_logp, advantage * keep, rollouts, delta=1.0).backward()


def reinforce(model, seed, stage=RL, advantage=train.maxrl_advantage, mask=train.dppo_mask, replay=True, sync_every=2):
    """train.rl_stage's loop without its files; an arm swaps one of the arguments -> one row a step."""
    config, rows = settings(seed), []
    optimizers = train.make_optimizers(model, stage.lr, momentum=0.0)
    balancer = PIDBalancer(model, config.balancer_lr / 10)
    actor = train.Actor(model, TOKENIZER, stage, f"{seed} rl", right_or_wrong)
    actor.sync_every = actor.most_stale = sync_every
    for step in range(stage.steps):
        if step % sync_every == 0:
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
            learn(model, batches, rewards.numel(), mask, replay)
            lr = train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
            train.optimizer_step(model, optimizers, config.grad_clip, lr)
            balancer.step()
        rows.append(row)
    return rows


# What each arm swaps, as arguments of `reinforce`.
SWAPPED = {"recipe": {},
           "GRPO": dict(advantage=train.grpo_advantage),
           "PPO clip": dict(mask=ppo_mask),
           "no replay": dict(replay=False),
           "stale": dict(sync_every=8),
           "stale, PPO clip": dict(sync_every=8, mask=ppo_mask),
           "stale, no replay": dict(sync_every=8, replay=False)}


def prepare(seed, steps):
    """The same SFT for every arm of a seed, and held-out problems."""
    model = train.new_model(settings(seed), SHAPE, TOKENIZER)
    imitate(model, seed)
    return model, seed, replace(RL, steps=steps), train.held_out_problems(TASKS, 30, LEVELS)


def measure(setting, name):
    start, seed, stage, problems = setting
    model = copy.deepcopy(start)
    if name == "more SFT":                                      # as many steps again, at the rate RL begins with
        imitate(model, seed, replace(SFT, lr=RL.lr), "more")
    else:
        reinforce(model, seed, stage, **SWAPPED[name])
    return {"pass@1": float(train.solve_rates(model, TOKENIZER, problems, 4).mean())}


# Each arm and what it is compared with.
ARMS = {"more SFT": None, "recipe": "more SFT", "GRPO": "recipe", "PPO clip": "recipe", "no replay": "recipe",
        "stale": "recipe", "stale, PPO clip": "stale", "stale, no replay": "stale"}

if __name__ == "__main__":
    arms.main(__doc__, "rl_parts", prepare, measure, ARMS, {"pass@1": (arms.of("pass@1"), ".3f")}, RL.steps)
