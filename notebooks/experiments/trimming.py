"""Traces longer than the context: answer-preserving trimming against cutting the end, cutting the middle, dropping.

    python notebooks/experiments/trimming.py --seeds 3

Two phases, as in the recipe.  In the first one half of the traces are longer than the context, and every arm makes them
fit in its own way.  The second one is a tenth as long and the same for all: a long context, whole traces.  Held-out
problems are answered after each.  05_answer_preserving_trimming.ipynb runs a smaller one live.
"""
import random
import time
from dataclasses import asdict, dataclass, replace

import arms
import numpy as np
from arms import train
from rl_parts import SHAPE, TOKENIZER, settings

import rsa

BINS = (16, 32, 48, 64, 80, 104)            # tokens of the teacher's conversation


@dataclass
class Plan:
    """What is asked, and both phases.  Only replies count in the loss: the prompts are random digits."""
    tasks: tuple
    short: train.Stage
    long: train.Stage
    tokens_per_step: int = 2048
    problems: int = 400                     # held out


PLAN = Plan(("sort", "add"), train.Stage(600, 64, 1e4, 1.0, 2e-2, 6e-3, difficulty=8, turns=1, mask_prompts=True),
            train.Stage(60, 256, 1e4, 1.0, 6e-3, 6e-4, difficulty=8, turns=1, mask_prompts=True))


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
    reply = train.find_task(problem.task).solve(problem) if reply is None else reply
    return [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": reply}]


def tokens(messages):
    return len(TOKENIZER.render(messages)[0])


class Traces:
    """A source for train.Loader: endless conversations of one problem each, made to fit by one arm."""
    name, is_traces = "traces", True

    def __init__(self, plan, fit, context, seed):
        self.plan, self.fit, self.context, self.seed = plan, fit, context, seed

    def size(self, held_out):
        return None

    def get(self, index, held_out):
        rng, sample = random.Random(f"{self.seed} {index}"), None
        while sample is None:               # one that was dropped gives way to the next
            task = train.find_task(rng.choice(self.plan.tasks))
            problem = train.draw(task, rng.getrandbits(48), rng.randint(1, self.plan.short.difficulty), held_out)
            sample = self.fit(conversation(problem), self.context)
        return sample


def practise(model, plan, stage, fit, seed, data):
    """One phase on the problems that `data` names -> what was seen: "loss" of each step, "tokens" without padding,
    "samples", and "answers": how many of those have the whole answer, up to its end."""
    loader = train.Loader([Traces(plan, fit, stage.context, data)], stage, plan.tokens_per_step, seed, TOKENIZER.pad)
    seen = {"loss": [], "tokens": 0, "samples": 0, "answers": 0}
    for (inputs, _, positions, origins), row in arms.practise(model, settings(seed), stage, loader, name=data):
        seen["loss"].append(round(row["loss"], 4))
        seen["tokens"] += int((positions >= 0).sum())
        seen["samples"] += len(origins)
        seen["answers"] += int((inputs == TOKENIZER.end).sum()) - len(origins)      # every question has an end, too
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
        texts = rsa.reply(model, TOKENIZER, [p.prompt for p in part], 160, 0, temperature=0.0)
        for problem, text in zip(part, texts):
            right, answered = train.find_task(problem.task).verify(problem, text)
            size = tokens(conversation(problem, text))
            rows.append((right, answered, right and size <= plan.short.context, size))
    rows, fits = np.array(rows, float), lengths <= plan.short.context

    def means(chosen):
        named = zip(("right", "answered", "early", "tokens"), rows[chosen].mean(0).round(4).tolist())
        return {**dict(named), "problems": int(chosen.sum())}

    result = {"fits": means(fits), "longer": means(~fits), "longer, by task": {}, "by length": []}
    for name in plan.tasks:
        result["longer, by task"][name] = means(~fits & [p.task == name for p in problems])
    for low, high in zip(BINS, BINS[1:]):
        chosen = (low < lengths) & (lengths <= high)
        result["by length"].append(means(chosen)["right"] if chosen.any() else None)
    return result


def fit(arm, plan, seed):
    """Both phases of one arm -> "short", "long": what was seen; "after short", "after long": the scores; "seconds"."""
    model, result, begun = train.new_model(settings(seed), SHAPE, TOKENIZER), {}, time.perf_counter()
    first = replace(plan.short, context=plan.long.context) if ARMS[arm] is whole else plan.short
    for name, stage, way in (("short", first, ARMS[arm]), ("long", plan.long, whole)):
        if way:
            result[name] = practise(model, plan, stage, way, seed, f"{seed} {name}")
            result[f"after {name}"] = score(model, plan)
    return {**result, "seconds": time.perf_counter() - begun}


def measure(seed, steps):
    plan = replace(PLAN, short=replace(PLAN.short, steps=steps))
    found = arms.Seed("trimming", seed, steps=steps, plan=asdict(plan))
    for arm in found.missing(ARMS):
        found.add(arm, fit(arm, plan, seed))


def read_results():
    return arms.read_results("trimming", "arms")


def table(results, when="after short"):
    """The share of right answers, by whether the teacher's trace fits the first phase's context."""
    bases = {arm: "AP trimming" for arm in ARMS if arm in results[0]["arms"] and when in results[0]["arms"][arm]}
    return arms.table(results, {**bases, "AP trimming": None}, {
        f"right {when}, too long": (arms.of(when, "longer", "right"), ".3f"),
        "… trace fits": (arms.of(when, "fits", "right"), ".3f"),
        "a reply's tokens, too long": (arms.of(when, "longer", "tokens"), ".0f")})


if __name__ == "__main__":
    arms.main(__doc__, lambda: table(read_results()) + "\n\n" + table(read_results(), "after long"), measure,
              steps=PLAN.short.steps)
