"""Traces longer than the context: answer-preserving trimming against cutting the end, cutting the middle, dropping.

    python notebooks/experiments/trimming.py --seeds 3

Two phases, as in the recipe.  In the first one half of the traces are longer than the context, and every arm makes them
fit in its own way.  The second one is a tenth as long and the same for all: a long context, whole traces.  Held-out
problems are answered after each.  05_answer_preserving_trimming.ipynb runs a smaller one live.
"""
import random
from dataclasses import replace

import arms
import numpy as np
from arms import train
from rl_parts import SHAPE, TOKENIZER, settings

TASKS, PROBLEMS = ("sort", "add"), 400          # held-out problems, of both tasks together
# Only replies count in the loss: the prompts are random digits.
SHORT = train.Stage(600, 64, 1e4, 1.0, 2e-2, 6e-3, difficulty=15, turns=1, mask_prompts=True)
LONG = replace(SHORT, steps=60, context=256, lr=6e-3, lr_end=6e-4)


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


WAYS = {"AP trimming": keep_answer, "cut the end": cut_end, "cut the middle": cut_middle, "drop long": drop_long,
        "whole, long context": whole}       # a reference: what a context that is long enough would give


def conversation(problem):
    """The problem and the teacher's reply to it."""
    reply = train.find_task(problem.task).solve(problem)
    return [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": reply}]


class Traces:
    """A source for train.Loader: endless conversations of one problem each, made to fit by one arm's function."""
    name, is_traces = "traces", True

    def __init__(self, tasks, stage, fit, seed):
        self.tasks, self.stage, self.fit, self.seed = tasks, stage, fit, seed

    def size(self, held_out):
        return None

    def get(self, index, held_out):
        rng, sample = random.Random(f"{self.seed} {index}"), None
        while sample is None:               # one that was dropped gives way to the next
            task = train.find_task(rng.choice(self.tasks))
            problem = train.draw(task, rng.getrandbits(48), rng.randint(1, self.stage.difficulty), held_out)
            sample = self.fit(conversation(problem), self.stage.context)
        return sample


def practise(model, config, stage, fit, data, tasks=TASKS):
    """One phase on the problems that `data` names."""
    setting = arms.Setting(config, stage, TOKENIZER, [Traces(tasks, stage, fit, data)])
    list(arms.practise(model, setting, name=data))


def score(model, stage, tasks=TASKS, count=PROBLEMS):
    """Greedy replies to held-out problems: the share of right ones, by whether the teacher's conversation fits the
    stage's context: {"fits": {"right"}, "longer": {"right"}}."""
    problems = train.held_out_problems(tasks, count // len(tasks), range(1, stage.difficulty + 1))
    rates = train.solve_rates(model, TOKENIZER, problems, 1, temperature=0.0)
    lengths = np.array([len(TOKENIZER.render(conversation(problem))[0]) for problem in problems])
    fits = lengths <= stage.context
    return {"fits": {"right": rates[fits].mean()}, "longer": {"right": rates[~fits].mean()}}


def measure(setting, arm, rows):
    """Both phases of one arm -> "after short", "after long": the scores."""
    (config, short), way, result = setting, WAYS[arm], {}
    model = train.new_model(config, SHAPE, TOKENIZER)
    first = replace(short, context=LONG.context) if way is whole else short
    practise(model, config, first, way, f"{config.seed} short")
    result["after short"] = score(model, short)
    practise(model, config, LONG, whole, f"{config.seed} long")
    result["after long"] = score(model, short)
    return result


ARMS = {**dict.fromkeys(WAYS, "AP trimming"), "AP trimming": None}          # each arm and what it is compared with
COLUMNS = {"right after short, too long": (arms.of("after short", "longer", "right"), ".3f"),
           "… trace fits": (arms.of("after short", "fits", "right"), ".3f"),
           "right after long, too long": (arms.of("after long", "longer", "right"), ".3f"),
           "… fits": (arms.of("after long", "fits", "right"), ".3f")}

if __name__ == "__main__":
    arms.main(__doc__, "trimming", lambda seed, steps: (settings(seed), replace(SHORT, steps=steps)), measure, ARMS,
              COLUMNS, SHORT.steps)
