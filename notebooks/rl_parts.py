"""What each part of the RL recipe does, on a model of 0.15M parameters: one part swapped at a time, all else equal.

    python notebooks/rl_parts.py 0          # a seed: notebooks/results/rl_parts/seed-0.json; goes on where it stopped
    python notebooks/rl_parts.py --table    # the table, over all seeds that are there

A seed is one SFT on two tasks whose teacher searches, and from its end the same number of RL steps by each arm.  The
`stale` arms sync the sampler every 8 steps instead of every 2, so that the mask and the replay have something to do.
"""
import copy
import dataclasses
import functools
import json
import operator
import os
import random
import re
import sys
import time
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from evidence import seeds  # noqa: E402
from zaya import PIDBalancer, Tokenizer  # noqa: E402

RESULTS = os.path.join(ROOT, "notebooks", "results", "rl_parts")
TASKS, LEVELS = ("find", "falsify"), (1, 2, 3)
SHAPE = dict(hidden_size=64, moe_intermediate_size=64, num_attention_heads=4, head_dim=16, router_hidden_size=16)
SFT = train.Stage(200, 128, 1e4, 1.0, 1e-2, 1e-3, difficulty=3, turns=1, mask_prompts=True)
RL = train.RLStage(40, 96, 1e4, 3e-3, 1e-3, TASKS, groups=8, group_size=8)
TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})                  # bytes: no merges to learn


def settings(seed):
    return train.parse_arguments(["--preset", "smoke", "--tasks", ",".join(TASKS), "--tokens-per-step", "2048",
                                  "--seed", str(seed)])[0]


def imitate(model, seed, stage=SFT, samples=0):
    """SFT on the teachers' searches, with train.py's loader and step; `samples` names other data -> the losses."""
    config = settings(seed)
    loader = train.Loader([train.TaskSource(TASKS, stage, TOKENIZER, f"{seed} {samples}")], stage,
                          config.tokens_per_step, seed, TOKENIZER.pad)
    optimizers, balancer = train.make_optimizers(model, stage.lr, 0.1), PIDBalancer(model, config.balancer_lr)
    return [train.train_step(model, optimizers, balancer, loader.next()[:3], config, torch.float32,
                             train.learning_rate(step, stage.steps, stage.lr, stage.lr_end))["loss"]
            for step in range(stage.steps)]


def reinforce(model, seed, stage=RL, advantage=train.maxrl_advantage, mask=train.dppo_mask, logps=train.token_logps,
              sync_every=2):
    """run_rl's loop without its files; what an arm swaps are the arguments -> one row a step."""
    config, rows = settings(seed), []
    optimizers = train.make_optimizers(model, stage.lr, momentum=0.0)
    balancer = PIDBalancer(model, config.balancer_lr / 10)
    actor = train.Actor(model, TOKENIZER, stage, f"{seed} rl")
    actor.sync_every = actor.most_stale = sync_every
    for step in range(stage.steps):
        if step % sync_every == 0:
            actor.sync(model, step)
        groups, generated = actor.take(step)
        row = train.rollout_health(generated, groups, step)
        if groups:
            rewards = torch.tensor([group.rewards for group in groups])
            bonus = torch.stack([train.length_reward(torch.tensor([float(len(t)) for t in group.tokens]), r,
                                                     actor.best(group), stage.length_reward)
                                 for group, r in zip(groups, rewards)])
            lr = train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
            measured = dict(zip(("flips", "kl", "kl_live"), gap(model, groups)))
            with mock.patch.multiple(train, dppo_mask=mask, token_logps=logps):
                row |= train.rl_step(model, optimizers, balancer, groups, advantage(rewards, bonus), config,
                                     torch.float32, lr, measure=False) | measured
        rows.append(row)
    return rows


def gap(model, groups):
    """replay_gap on all rollouts of the groups."""
    rollouts = [(g.prompt, *rollout, 0.0) for g in groups for rollout in zip(g.tokens, g.logps, g.choices)]
    return train.replay_gap(model, train.collate(rollouts, TOKENIZER.pad, "cpu"))


def ppo_mask(pi, mu, advantage, clip=0.2):
    """PPO: no gradient once pi / mu has left 1 ± clip in the direction the advantage pushes."""
    return torch.where(advantage > 0, pi <= mu * (1 + clip), pi >= mu * (1 - clip))


def no_mask(pi, mu, advantage, delta=None):
    return torch.ones_like(pi, dtype=torch.bool)


def own_experts(model, inputs, targets, positions, routing, token_logps=train.token_logps):
    """No replay: the trainer's router chooses anew."""
    return token_logps(model, inputs, targets, positions, [])


def asked(count=30):
    return train.held_out_problems(TASKS, count, LEVELS)


def right(model, problems, samples=4):
    """Held-out pass@1: each problem's share of right samples."""
    return train.solve_rates(model, TOKENIZER, problems, samples)


def right_replies(model, problems, samples=4):
    many = [p for p in problems for _ in range(samples)]
    texts = train.reply(model, TOKENIZER, [p.prompt for p in many], RL.context, 0)
    return [text for p, text in zip(many, texts) if train.find_task(p.task).verify(p, text)[0]]


def true_steps(texts):
    """Share of the sums written in the replies that hold modulo 10; no reward asks for it.

    >>> true_steps(["<think>9y:9+2=1/8*2=5#y9</think>9"])
    0.5
    """
    steps = re.findall(r"(\d)([-+*])(\d)=(\d)", " ".join(texts))
    made = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    return float(np.mean([made[o](int(a), int(b)) % 10 == int(c) for a, o, b, c in steps] or [0]))


def with_length(coefficient):
    return functools.partial(reinforce, stage=dataclasses.replace(RL, length_reward=coefficient))


stale = functools.partial(reinforce, sync_every=8)
ARMS = {"recipe": reinforce,
        "GRPO": functools.partial(reinforce, advantage=train.grpo_advantage),
        "PPO clip": functools.partial(reinforce, mask=ppo_mask),
        "no replay": functools.partial(reinforce, logps=own_experts),
        "no length reward": with_length(0.0),
        "length reward x 10": with_length(1.0),
        "stale": stale,
        "stale, PPO clip": functools.partial(stale, mask=ppo_mask),
        "stale, no mask": functools.partial(stale, mask=no_mask),
        "stale, no replay": functools.partial(stale, logps=own_experts)}


def score(model, problems, **more):
    rates = right(model, problems)
    by_task = {task: float(rates[[p.task == task for p in problems]].mean()) for task in TASKS}
    texts = right_replies(model, problems)
    return {"pass@1": float(rates.mean()), "ci95": train.interval(rates), "tasks": by_task,
            "length": float(np.mean([len(TOKENIZER.encode(text)) for text in texts] or [0])),
            "true steps": true_steps(texts), **more}


def measure(seed):
    """All arms of one seed; those that the file has are not run again."""
    os.makedirs(RESULTS, exist_ok=True)
    path = os.path.join(RESULTS, f"seed-{seed}.json")
    result = {"command": f"python notebooks/rl_parts.py {seed}", "seed": seed, "problems": len(asked()), "arms": {}}
    if os.path.exists(path):
        with open(path) as file:
            result = json.load(file)
    if len(result["arms"]) == len(ARMS) + 1:
        return
    problems, begun = asked(), time.perf_counter()
    start = train.new_model(settings(seed), SHAPE, TOKENIZER)
    imitate(start, seed)
    if "sft" not in result:
        result["sft"] = score(start, problems, seconds=time.perf_counter() - begun)
        train.write_json(path, result)
    for name, arm in {"more SFT": None, **ARMS}.items():
        if name in result["arms"]:
            continue
        model, begun = copy.deepcopy(start), time.perf_counter()
        if arm is None:                                         # as many steps again, at the rate RL began with
            imitate(model, seed, dataclasses.replace(SFT, lr=RL.lr), "more")
            rows = []
        else:
            rows = arm(model, seed)
        seconds = time.perf_counter() - begun
        curves = {key: [row.get(key) for row in rows] for key in
                  ("reward", "length", "masked", "flips", "kl", "kl_live", "norm", "zero_groups")} if rows else {}
        result["arms"][name] = score(model, problems, seconds=seconds, curves=curves)
        train.write_json(path, result)
        print(f"seed {seed} | {name} | pass@1 {result['sft']['pass@1']:.3f} -> {result['arms'][name]['pass@1']:.3f} | "
              f"length {result['arms'][name]['length']:.1f} | true steps "
              f"{result['arms'][name]['true steps']:.2f} | {seconds:.0f} s", flush=True)


def table():
    """All arms over the seeds that are there: means, and by seed the difference to the arm they are a change of."""
    results = seeds("rl_parts")
    there = [f"{r['seed']} ({len(r['arms'])} of {len(ARMS) + 1} arms)" for r in results]
    lines = ["seeds: " + (", ".join(there) or "none"),
             f"{'':18} pass@1  tokens  true sums  masked  KL a token, without replay  against     by seed"]
    for name in ("sft", "more SFT", *ARMS):
        there = [r for r in results if name in r["arms"] or name == "sft"]
        arms = [{**r, **r["arms"]}[name] for r in there]
        if not arms:
            lines.append(f"{name:18} not measured")
            continue
        line = f"{name:18} " + "{:.3f}   {:5.1f}   {:8.3f}".format(
            *(np.mean([arm[key] for arm in arms]) for key in ("pass@1", "length", "true steps")))
        if name in ARMS:
            steps = np.concatenate([[row for row in zip(*(arm["curves"][key] for key in ("masked", "kl", "kl_live")))
                                     if None not in row] for arm in arms]).mean(0)
            line += "   {:5.1%}  {:10.1e}  {:14.1e}".format(*steps)
        base = {"recipe": "more SFT", "stale": "recipe"}.get(name, "stale" if name.startswith("stale") else "recipe")
        differ = [r["arms"][name]["pass@1"] - r["arms"][base]["pass@1"] for r in there if {name, base} <= {*r["arms"]}]
        if name in ARMS and differ:
            line += f"  {base:9}" + "".join(f"  {d:+.3f}" for d in differ)
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        raise SystemExit(print(table()))
    if not sys.argv[1:] or not all(seed.isdigit() for seed in sys.argv[1:]):
        raise SystemExit("python notebooks/rl_parts.py SEED …: one or more whole numbers, or --table")
    for each in map(int, sys.argv[1:]):
        random.seed(each)
        measure(each)
