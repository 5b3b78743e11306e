"""Traces longer than the context: answer-preserving trimming against cutting the end, cutting the middle, dropping.

    python notebooks/trimming.py 0 1 2      # notebooks/results/trimming/seed-N.json; goes on where it stopped
    python notebooks/trimming.py --table    # the tables, over all seeds that are there

Two phases, as in the recipe.  In the first one half of the traces are longer than the context, and every arm makes them
fit in its own way.  The second one is a tenth as long and the same for all: a long context, whole traces.  Held-out
problems are answered after each.  All arms have the same first weights, rates, steps, stream of problems and number of
positions a step.  05_answer_preserving_trimming.ipynb runs a smaller one live.
"""
import dataclasses
import json
import os
import random
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from evidence import interval, resume, seeds  # noqa: E402
from rl_parts import SHAPE, TOKENIZER  # noqa: E402
from zaya import PIDBalancer  # noqa: E402

BINS = (16, 32, 48, 64, 80, 104)            # tokens of the teacher's conversation


@dataclasses.dataclass
class Plan:
    """What is asked, and both phases.  Only replies count in the loss: the prompts are random digits."""
    tasks: tuple
    short: train.Stage
    long: train.Stage
    tokens_per_step: int = 2048
    problems: int = 400                     # held out


PLAN = Plan(("sort", "add"), train.Stage(600, 64, 1e4, 1.0, 2e-2, 6e-3, difficulty=8, turns=1, mask_prompts=True),
            train.Stage(60, 256, 1e4, 1.0, 6e-3, 6e-4, difficulty=8, turns=1, mask_prompts=True))


# ---- ways to make a conversation fit: (messages, context) -> (ids, which of them count), or None ---------------------


def whole(messages, context):
    return TOKENIZER.render(messages)


def keep_answer(messages, context):
    messages, _ = train.trim(messages, context, TOKENIZER)
    return TOKENIZER.render(messages) if messages else None


def cut_end(messages, context):
    """Plain truncation: a long trace stops in mid-thought, its answer is lost."""
    ids, wanted = TOKENIZER.render(messages)
    return ids[:context], wanted[:context]


def cut_middle(messages, context):
    """Start and end of the whole sample stay, half of the context each."""
    ids, wanted = TOKENIZER.render(messages)
    start = context // 2
    end = max(start, len(ids) - (context - start))
    return ids[:start] + ids[end:], wanted[:start] + wanted[end:]


def drop_long(messages, context):
    ids, wanted = TOKENIZER.render(messages)
    return (ids, wanted) if len(ids) <= context else None


ARMS = {"AP trimming": keep_answer, "cut the end": cut_end, "cut the middle": cut_middle, "drop long": drop_long,
        "whole, long context": whole,       # a reference: what a context that is long enough would give
        "no first phase": None}             # another: what the second phase teaches alone


def conversation(problem, reply=None):
    """The problem and a reply to it, the teacher's if none is given."""
    return [{"role": "user", "content": problem.prompt},
            {"role": "assistant", "content": train.find_task(problem.task).solve(problem) if reply is None else reply}]


def tokens(messages):
    return len(TOKENIZER.render(messages)[0])


class Traces:
    """Endless conversations of one problem each, all difficulties alike; what one arm makes of them."""
    name, is_traces = "traces", True

    def __init__(self, plan, fit, context, seed):
        self.plan, self.fit, self.context, self.seed = plan, fit, context, seed

    def size(self, held_out):
        return None

    def get(self, index, held_out):
        rng = random.Random(f"{self.seed} {index}")
        while True:                         # one that was dropped gives way to the next
            task = train.find_task(rng.choice(self.plan.tasks))
            seed, d = rng.getrandbits(48), rng.randint(1, self.plan.short.difficulty)
            problem = train.draw(task, seed, d, held_out)
            sample = self.fit(conversation(problem), self.context)
            if sample:
                return sample


# ---- training and held-out answers -----------------------------------------------------------------------------------


def practise(model, plan, stage, fit, seed, data):
    """One phase on the problems that `data` names -> what was seen: "loss" of each step, "tokens" without padding,
    "samples", and "answers": how many of those have the whole answer, up to its end."""
    config = train.parse_arguments(["--preset", "smoke", "--seed", str(seed)])[0]
    loader = train.Loader([Traces(plan, fit, stage.context, data)], stage, plan.tokens_per_step, seed, TOKENIZER.pad)
    optimizers, balancer = train.make_optimizers(model, stage.lr, 0.1), PIDBalancer(model, config.balancer_lr)
    seen = {"loss": [], "tokens": 0, "samples": 0, "answers": 0}
    for step in tqdm(range(stage.steps), leave=False, disable=None):
        inputs, targets, positions, origins = loader.next()                             # (rows, context)
        lr = train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
        row = train.train_step(model, optimizers, balancer, (inputs, targets, positions), config, torch.float32, lr)
        seen["loss"].append(round(row["loss"], 4))
        seen["tokens"] += int((positions >= 0).sum())
        seen["samples"] += len(origins)
        seen["answers"] += int((inputs == TOKENIZER.end).sum()) - len(origins)          # every question has an end, too
    return seen


def score(model, plan):
    """Greedy replies to held-out problems, by whether the teacher's conversation fits the short context.

    right: the verifier's verdict; answered: think tags and an answer, right or wrong; early: right, and the whole
    conversation fits the short context; tokens: the length of it.
    """
    problems = train.held_out_problems(plan.tasks, plan.problems // len(plan.tasks),
                                       range(1, plan.short.difficulty + 1))
    lengths, rows = np.array([tokens(conversation(p)) for p in problems]), []
    for start in range(0, len(problems), 128):
        part = problems[start:start + 128]
        for p, text in zip(part, train.reply(model, TOKENIZER, [p.prompt for p in part], 160, 0, temperature=0.0)):
            (right, answered), size = train.find_task(p.task).verify(p, text), tokens(conversation(p, text))
            rows.append((right, answered, right and size <= plan.short.context, size))
    rows, fits = np.array(rows, float), lengths <= plan.short.context

    def means(chosen):
        return dict(zip(("right", "answered", "early", "tokens"), rows[chosen].mean(0).round(4).tolist()),
                    problems=int(chosen.sum()))

    bins = np.digitize(lengths, BINS, right=True)
    return {"fits": means(fits), "longer": means(~fits),
            "longer, by task": {name: means(~fits & [p.task == name for p in problems]) for name in plan.tasks},
            "by length": [means(bins == i)["right"] if (bins == i).any() else None for i in range(1, len(BINS))]}


def fit(arm, plan, seed):
    """Both phases of one arm -> "short", "long": what was seen; "after short", "after long": the scores; "seconds"."""
    config, begun = train.parse_arguments(["--preset", "smoke", "--seed", str(seed)])[0], time.perf_counter()
    model, result = train.new_model(config, SHAPE, TOKENIZER), {}
    first = dataclasses.replace(plan.short, context=plan.long.context) if ARMS[arm] is whole else plan.short
    for name, stage, way in (("short", first, ARMS[arm]), ("long", plan.long, whole)):
        if way:
            result[name] = practise(model, plan, stage, way, seed, f"{seed} {name}")
            result[f"after {name}"] = score(model, plan)
    return result | {"seconds": time.perf_counter() - begun}


def measure(seed, plan):
    """All arms of one seed; those that the file has are not run again."""
    asked = json.loads(json.dumps(dataclasses.asdict(plan)))   # as a file gives it back
    path, result = resume("trimming", seed, {"command": f"python notebooks/trimming.py {seed}", "plan": asked,
                                             "seed": seed, "arms": {}}, "plan")
    for arm in ARMS:
        if arm in result["arms"]:
            continue
        result["arms"][arm] = found = fit(arm, plan, seed)
        train.write_json(path, result)
        shown = [f"{when} {found[when]['fits']['right']:.3f} / {found[when]['longer']['right']:.3f}"
                 for when in ("after short", "after long") if when in found]
        print(f"seed {seed} | {arm} | right where the trace fits / does not: {', '.join(shown)} | "
              f"{found['seconds']:.0f} s", flush=True)


# ---- tables ----------------------------------------------------------------------------------------------------------


def read_results():
    """All seeds that all arms were trained for."""
    return [result for result in seeds("trimming") if set(result["arms"]) == set(ARMS)]


COLUMNS = [(when, group) for when in ("after short", "after long") for group in ("fits", "longer")]


def values(results, arm, when, group, what="right"):
    """One number a seed; empty if the arm was not asked then."""
    return np.array([r["arms"][arm][when][group][what] for r in results if when in r["arms"][arm]])


def difference(a, b):
    """Mean of a - b over the seeds with its 95 % interval (Student's t), and each seed's.

    >>> difference(np.array([0.5, 0.6, 0.7]), np.array([0.4, 0.4, 0.4]))
    '+0.200 [-0.048, +0.448] (+0.100, +0.200, +0.300)'
    """
    mean, low, high = interval(a - b)
    each = ", ".join(f"{x:+.3f}" for x in a - b)
    return f"{mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}] ({each})" if len(a) > 1 else "")


def table(results, what="right"):
    """Markdown: mean and each seed of every arm, then AP trimming minus each of the others, paired."""
    heads = [f"{when}, trace {group if group == 'fits' else 'too long'}" for when, group in COLUMNS]
    lines = ["| " + " | ".join([what, *heads]) + " |", "|" + "---|" * (1 + len(COLUMNS))]
    for arm in ARMS:
        cells = [values(results, arm, *column, what) for column in COLUMNS]
        lines.append("| " + " | ".join([arm, *(f"{c.mean():.3f} ({', '.join(f'{x:.3f}' for x in c)})" if len(c) else "-"
                                               for c in cells)]) + " |")
    for arm in list(ARMS)[1:]:
        pairs = [(values(results, "AP trimming", *c, what), values(results, arm, *c, what)) for c in COLUMNS]
        lines.append("| " + " | ".join([f"AP trimming minus {arm}",
                                        *(difference(a, b) if len(b) else "-" for a, b in pairs)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        found = read_results()
        raise SystemExit(print("\n\n".join(table(found, what) for what in ("right", "answered", "early"))
                               if found else "no seed was measured yet"))
    if not sys.argv[1:] or not all(seed.isdigit() for seed in sys.argv[1:]):
        raise SystemExit("python notebooks/trimming.py SEED …: one or more whole numbers, or --table")
    for each in map(int, sys.argv[1:]):
        measure(each, PLAN)
