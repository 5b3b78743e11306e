"""What Markovian RSA needs, measured on finished runs of train.py: training rows, rounds, a population, an order.

    python train.py --seed 1 --out out/seed-1                                 # once a seed, all stages
    python notebooks/experiments/markovian_rsa.py out/seed-1                  # results/markovian_rsa/seed-1.json

Controls, each an sft from the run's own midtrain checkpoint, with the same steps, tokens, rates and data, but for the
aggregation rows: none; rows with one candidate only; the problem before the candidates, as in the report.  They are
compared with the run's own sft checkpoint, so reinforcement learning has no part in it.
"""
import os
from dataclasses import replace
from unittest import mock

import arms
import numpy as np
import torch
from arms import train

import rsa

EARLY = [("find", 4), ("find", 6), ("synthesize", 2), ("synthesize", 4)]    # samples after sft are right now and then
LATE = [("find", 6), ("synthesize", 4)]
PROBLEMS, POPULATIONS, ROUNDS, TAILS = 40, (4, 8, 16, 32), 6, (8, 16, 24, 48)
BUDGET = rsa.BUDGETS["tiny"]


def problem_first(problem, tails):
    """terse_prompt in the report's order."""
    return f"{problem}|" + "".join(f"{tail}|" for tail in tails) if tails else problem


# What changes in the stage sft, and how a prompt is built, in training and later.
ROWS = {"own rows": ({}, rsa.terse_prompt), "no rows": (dict(aggregation=0.0), rsa.terse_prompt),
        "one candidate": (dict(candidates=(1,)), rsa.terse_prompt), "problem first": ({}, problem_first)}


def load(*folder):
    return train.load_checkpoint(os.path.join(*folder), "cpu")


def control(run, report, name):
    """Train one control, or go on with it -> model, tokenizer, trainer state."""
    changes, build = ROWS[name]
    out = os.path.join(run, "control-" + name.replace(" ", "-"))
    config = train.parse_arguments(["--preset", report["preset"], "--seed", str(report["seed"]), "--out", out])[0]
    os.makedirs(out, exist_ok=True)
    model, tokenizer, state = load(run, "midtrain")
    if train.settings(config) != state["settings"]:
        raise SystemExit(f"{run} was not made with the settings of --preset {report['preset']}: nothing to compare")
    model, tokenizer, state = load(out, "sft") or (model, tokenizer, None)
    if not (state and state.get("done")):
        stage = replace(train.stage_settings(config, "sft"), **changes)
        with mock.patch.object(train, "terse_prompt", build):   # the name by which train.py builds its prompts
            state = train.supervised_stage("sft", config, stage, model, tokenizer, state, "cpu", torch.float32)
    return model, tokenizer, state


def by_round(model, tokenizer, name, d, seed, population=16, subset=4, rounds=4, build=rsa.terse_prompt,
             tail=BUDGET.tail):
    """Mean correctness of the population after each round, 0 … `rounds`, with 95 % intervals over the problems."""
    held = train.held_out_problems([name], PROBLEMS, (d,))
    results = rsa.markovian_rsa([problem.prompt for problem in held], rsa.Checkpoint(model, tokenizer), population,
                                subset, rounds, BUDGET.budget, tail, seed, tokenizer, build)
    right, longest, tokens = np.zeros((rounds + 1, PROBLEMS)), 0, 0
    for column, (problem, result) in enumerate(zip(held, results)):
        longest, tokens = max(longest, result.longest_prompt), tokens + result.generated_tokens
        for row, candidates in enumerate(result.rounds):
            verdicts = [train.find_task(name).verify(problem, candidate.text)[0] for candidate in candidates]
            right[row, column] = np.mean(verdicts)
    return {"task": name, "difficulty": d, "problems": PROBLEMS, "population": population, "subset": subset,
            "tail": tail, "longest_prompt": longest, "accuracy": right.mean(1).tolist(),
            "ci95": list(map(train.interval, right)), "tokens": tokens / PROBLEMS}


def after_sft(run, report):
    """Beside everything else that as many tokens buy, as the run's own evaluation does for the finished model."""
    model, tokenizer, _ = load(run, "sft")
    rows = []
    for task, d in EARLY[1:]:
        asked = train.Evaluation({task: d}, report["ttc"][0]["problems"], BUDGET, most_rounds=2)
        rows.append(train.evaluate_ttc(model, tokenizer, task, asked, report["seed"]))
    return rows


def by_rows(run, report, name):
    model, tokenizer, state = load(run, "sft") if name == "own rows" else control(run, report, name)
    rows = []
    for task, d in EARLY:
        for subset in (4, 1) if name == "one candidate" else (4,):
            rows.append(by_round(model, tokenizer, task, d, report["seed"], subset=subset, build=ROWS[name][1]))
    return {"seconds": state["seconds"], "rows": rows}


def sweep(run, report, key, numbers, rounds):
    """The finished model under other settings of by_round."""
    model, tokenizer, _ = load(run, "final")
    rows = []
    for task, d in LATE:
        for number in numbers:
            rows.append(by_round(model, tokenizer, task, d, report["seed"], rounds=rounds, **{key: number}))
    return rows


def measure(run):
    report = arms.read_json(os.path.join(run, "report.json"))
    if not report["ttc"]:
        raise SystemExit(f"{run}/report.json has no test-time compute: run train.py --stages evaluate")
    found = arms.Seed("markovian_rsa", report["seed"], None, run, problems=PROBLEMS, ttc=report["ttc"])
    for name in found.missing(("sft", *ROWS, "population", "tails")):
        if name == "sft":
            found.add(name, after_sft(run, report))
        elif name in ROWS:
            found.add(name, by_rows(run, report, name))
        elif name == "population":
            found.add(name, sweep(run, report, "population", POPULATIONS, ROUNDS))
        else:
            found.add(name, sweep(run, report, "tail", TAILS, 2))


METHODS = {"single": "one sample", "greedy": "greedy", "maj@equal_tokens": "majority of equal tokens",
           "field_vote@equal_tokens": "… vote on each field", "certified@equal_tokens": "… first that says it holds",
           "pass@equal_tokens": "… any (oracle)", "delethink": "Delethink, C = 1", "full_rsa": "full RSA",
           "markovian_rsa": "**Markovian RSA**", "markovian_rsa_majority": "… majority of its last round"}


def table():
    """Markdown: ways to spend the same tokens; then what two rounds gain by the rows a model was trained on."""
    results = arms.read_results("markovian_rsa")
    rows, gains = [["mean (each seed)", *METHODS.values()]], [["after sft, T = 0 → T = 2"]]
    for when, key in (("after sft", "sft"), ("finished", "ttc")):
        for column in zip(*(result[key] for result in results)):
            rows.append([f"{column[0]['task']} at {column[0]['difficulty']}, {when}"])
            for method in METHODS:
                rows[-1].append(arms.by_seed([one.get(method) for one in column], ".2f"))
    for task, d in EARLY:
        gains[0].append(f"{task} at {d}")
    for name, subset in (*zip(ROWS, (4, 4, 4, 4)), ("one candidate", 1)):
        gains.append([f"trained with {name}, C = {subset}"])
        for task, d in EARLY:
            before, after = [], []
            for result in results:
                for row in result[name]["rows"]:
                    if (row["task"], row["difficulty"], row["subset"]) == (task, d, subset):
                        before.append(row["accuracy"][0])
                        after.append(row["accuracy"][2])
            gains[-1].append(f"{np.mean(before):.2f} → {arms.by_seed(after, '.2f')}")
    return arms.markdown(rows) + "\n\n" + arms.markdown(gains)


if __name__ == "__main__":
    arms.main(__doc__, table, measure, runs=True)
