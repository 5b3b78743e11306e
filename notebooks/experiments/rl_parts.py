"""What each part of the RL recipe does, on a model of 0.15M parameters: one part swapped at a time, all else equal.

    python notebooks/experiments/rl_parts.py --seeds 3

A seed is one SFT on two tasks whose teacher searches, and from its end the same number of RL steps by each arm.  The
`stale` arms sync the sampler every 8 steps instead of every 2, so that the mask and the replay have something to do.
"""
import copy
import operator
import random
import re
import time
from dataclasses import replace
from unittest import mock

import arms
import numpy as np
import torch
from arms import train

import rsa
from zaya import PIDBalancer, Tokenizer

TASKS, LEVELS = ("find", "falsify"), (1, 2, 3)
SHAPE = dict(hidden_size=64, moe_intermediate_size=64, num_attention_heads=4, head_dim=16, router_hidden_size=16)
SFT = train.Stage(200, 128, 1e4, 1.0, 1e-2, 1e-3, difficulty=3, turns=1, mask_prompts=True)
RL = train.RLStage(40, 96, 1e4, 3e-3, 1e-3, TASKS, groups=8, group_size=8)
TOKENIZER = Tokenizer()                                                   # bytes: no merges to learn


def settings(seed):
    return train.parse_arguments(["--preset", "smoke", "--tasks", ",".join(TASKS), "--tokens-per-step", "2048",
                                  "--seed", str(seed)])[0]


def imitate(model, seed, stage=SFT, samples=0):
    """SFT on the teachers' searches; `samples` names other data -> the losses."""
    config, source = settings(seed), train.TaskSource(TASKS, stage, TOKENIZER, f"{seed} {samples}")
    loader = train.Loader([source], stage, config.tokens_per_step, seed, TOKENIZER.pad)
    return [row["loss"] for _, row in arms.practise(model, config, stage, loader, name="SFT")]


def reinforce(model, seed, stage=RL, advantage=train.maxrl_advantage, mask=train.dppo_mask, logps=train.token_logps,
              sync_every=2):
    """rl_stage's loop without its files; what an arm swaps are the arguments -> one row a step."""
    config, rows = settings(seed), []
    optimizers = train.make_optimizers(model, stage.lr, momentum=0.0)
    balancer = PIDBalancer(model, config.balancer_lr / 10)
    actor = train.Actor(model, TOKENIZER, stage, f"{seed} rl")
    actor.sync_every = actor.most_stale = sync_every
    for step in range(stage.steps):
        if step % sync_every == 0:
            actor.sync(model, step)
        groups, generated = actor.take(step)
        row = train.rollout_metrics(generated, groups, step)
        if groups:
            rewards = torch.tensor([group.rewards for group in groups])                         # (P, G)
            lengths = torch.tensor([group.lengths() for group in groups])
            bonus = torch.zeros_like(rewards)
            for i, group in enumerate(groups):
                bonus[i] = train.length_reward(lengths[i].float(), rewards[i], actor.best(group), stage.length_reward)
            row |= dict(zip(("flips", "kl", "kl_live"), gap(model, groups)))
            lr = train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
            batches = train.rl_batches(groups, advantage(rewards, bonus), config.micro_batch, TOKENIZER.pad, "cpu")
            with mock.patch.multiple(train, dppo_mask=mask, token_logps=logps):     # names that rl_step looks up
                learned = train.rl_step(model, optimizers, balancer, batches, rewards.numel(), lengths.sum().item(),
                                        config, torch.float32, lr, measure=False)
            row = learned | row
        rows.append(row)
    return rows


def gap(model, groups):
    """replay_gap on all rollouts of the groups."""
    rollouts = []
    for group in groups:
        for tokens, logps, choices in zip(group.tokens, group.logps, group.choices):
            rollouts.append((group.prompt, tokens, logps, choices, 0.0))
    return train.replay_gap(model, train.collate(rollouts, TOKENIZER.pad, "cpu"))


def ppo_mask(pi, mu, advantage, clip=0.2):
    """PPO: no gradient once pi / mu has left 1 ± clip in the direction the advantage pushes.

    policy_loss hands its delta on as `clip`, so the arms train with 0.1; their log counts what 0.2 would stop.
    """
    return torch.where(advantage > 0, pi <= mu * (1 + clip), pi >= mu * (1 - clip))


def no_mask(pi, mu, advantage, delta=None):
    return torch.ones_like(pi, dtype=torch.bool)


def own_experts(model, inputs, targets, positions, routing, token_logps=train.token_logps):
    """No replay: the trainer's router chooses anew."""
    return token_logps(model, inputs, targets, positions, [])


# What each arm swaps, as arguments of `reinforce`; None: no RL but as many steps of SFT again.
ARMS = {"more SFT": None,
        "recipe": {},
        "GRPO": dict(advantage=train.grpo_advantage),
        "PPO clip": dict(mask=ppo_mask),
        "no replay": dict(logps=own_experts),
        "no length reward": dict(stage=replace(RL, length_reward=0.0)),
        "length reward x 10": dict(stage=replace(RL, length_reward=1.0)),
        "stale": dict(sync_every=8),
        "stale, PPO clip": dict(sync_every=8, mask=ppo_mask),
        "stale, no mask": dict(sync_every=8, mask=no_mask),
        "stale, no replay": dict(sync_every=8, logps=own_experts)}
CURVES = ("reward", "length", "masked", "flips", "kl", "kl_live", "norm", "zero_groups")


def asked(count=30):
    return train.held_out_problems(TASKS, count, LEVELS)


def right(model, problems, samples=4):
    """Held-out pass@1: each problem's share of right samples."""
    return train.solve_rates(model, TOKENIZER, problems, samples)


def right_replies(model, problems, samples=4):
    many, found = np.repeat(problems, samples), []
    texts = rsa.reply(model, TOKENIZER, [problem.prompt for problem in many], RL.context, 0)
    for problem, text in zip(many, texts):
        if train.find_task(problem.task).verify(problem, text)[0]:
            found.append(text)
    return found


def true_steps(texts):
    """Share of the sums written in the replies that hold modulo 10; no reward asks for it.

    >>> true_steps(["<think>9y:9+2=1/8*2=5#y9</think>9"])
    0.5
    """
    made, holds = {"+": operator.add, "-": operator.sub, "*": operator.mul}, []
    for a, sign, b, c in re.findall(r"(\d)([-+*])(\d)=(\d)", " ".join(texts)):
        holds.append(made[sign](int(a), int(b)) % 10 == int(c))
    return float(np.mean(holds or [0]))


def score(model, problems, **more):
    rates, texts = right(model, problems), right_replies(model, problems)
    lengths = [len(TOKENIZER.encode(text)) for text in texts] or [0]
    return {"pass@1": float(rates.mean()), "ci95": train.interval(rates), "length": float(np.mean(lengths)),
            "true steps": true_steps(texts), **more}


def measure(seed, steps):
    random.seed(seed)
    problems, begun = asked(), time.perf_counter()
    found = arms.Seed("rl_parts", seed, problems=len(problems), steps=steps)
    start = None
    for name in found.missing(ARMS):
        if start is None:                                       # the same SFT, also when a stopped seed goes on
            start = train.new_model(settings(seed), SHAPE, TOKENIZER)
            imitate(start, seed)
            found.result.setdefault("sft", score(start, problems, seconds=time.perf_counter() - begun))
        model, begun, rows = copy.deepcopy(start), time.perf_counter(), []
        if ARMS[name] is None:                                  # at the rate RL began with
            imitate(model, seed, replace(SFT, lr=RL.lr), "more")
        else:
            swapped = {"stage": RL, **ARMS[name]}
            rows = reinforce(model, seed, **{**swapped, "stage": replace(swapped["stage"], steps=steps)})
        seconds, curves = time.perf_counter() - begun, {}
        for key in CURVES if rows else ():
            curves[key] = [row.get(key) for row in rows]
        found.add(name, score(model, problems, seconds=seconds, curves=curves))


def read_results():
    return arms.read_results("rl_parts", "arms")


def mean_of(key):
    """-> a measure: the mean of a curve over the steps that trained on something."""
    def measure(arm):
        steps = [number for number in arm["curves"].get(key, []) if number is not None]
        return np.mean(steps) if steps else None
    return measure


def table(results):
    """Each arm beside the one that it is a change of."""
    bases = {name: "stale" if name.startswith("stale,") else "recipe" for name in ARMS}
    return arms.table(results, {**bases, "recipe": "more SFT", "more SFT": None}, {
        "pass@1": (arms.of("pass@1"), ".3f"), "tokens": (arms.of("length"), ".1f"),
        "true sums": (arms.of("true steps"), ".3f"), "masked": (mean_of("masked"), ".1%"),
        "KL a token": (mean_of("kl"), ".1e"), "… without replay": (mean_of("kl_live"), ".1e")})


if __name__ == "__main__":
    arms.main(__doc__, lambda: table(read_results()), measure, steps=RL.steps)
