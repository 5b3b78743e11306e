"""What Markovian RSA needs, measured on finished runs of train.py: the rows that a model was trained on.

    python train.py --seed 1 --out out/seed-1                                 # once a seed, all stages
    python notebooks/experiments/markovian_rsa.py out/seed-1                  # results/markovian_rsa/seed-1.json

Two controls, each an sft from the run's own midtrain checkpoint, with the same steps, tokens, rates and data, but for
the aggregation rows: none, or rows with one candidate only.  They are compared with the run's own sft checkpoint, so
reinforcement learning has no part in it.
"""
import os
import sys
from dataclasses import replace

import arms
import torch
from arms import train

import rsa

EARLY = [("find", 4), ("find", 6), ("synthesize", 2), ("synthesize", 4)]    # samples after sft are right now and then
PROBLEMS, BUDGET, ROUNDS = 40, rsa.BUDGETS["tiny"], 4
# What changes in the stage sft.
ROWS = {"own rows": {}, "no rows": dict(aggregation=0.0), "one candidate": dict(candidates=(1,))}
# … and C, the number of tails that its prompts then show.
TRAINED = [("own rows", 4), ("no rows", 4), ("one candidate", 4), ("one candidate", 1)]


def load(*folder):
    return train.load_checkpoint(os.path.join(*folder), "cpu")


def control(run, report, name):
    """Train one control, or go on with it -> model, tokenizer."""
    out = os.path.join(run, "control-" + name.replace(" ", "-"))
    config = train.parse_arguments(["--preset", report["preset"], "--seed", str(report["seed"]), "--out", out])[0]
    os.makedirs(out, exist_ok=True)
    model, tokenizer, state = load(run, "midtrain")
    if train.settings(config) != state["settings"]:
        raise SystemExit(f"{run} was not made with the settings of --preset {report['preset']}: nothing to compare")
    model, tokenizer, state = load(out, "sft") or (model, tokenizer, None)
    stage = replace(train.stage_settings(config, "sft"), **ROWS[name])
    train.supervised_stage("sft", config, stage, model, tokenizer, state, "cpu", torch.float32)
    return model, tokenizer


def by_round(model, tokenizer, name, d, seed, subset):
    """Mean correctness of the population after each round, 0 … ROUNDS."""
    problems = train.held_out_problems([name], PROBLEMS, (d,))
    prompts, source = [problem.prompt for problem in problems], rsa.Checkpoint(model, tokenizer)
    N, beta, tau = BUDGET.population, BUDGET.budget, BUDGET.tail
    results = rsa.markovian_rsa(prompts, source, N, subset, ROUNDS, beta, tau, seed, tokenizer)
    accuracy = []
    for t in range(ROUNDS + 1):
        replies = [[candidate.text for candidate in result.rounds[t]] for result in results]
        accuracy.append(float(train.verify_replies(problems, replies).mean()))
    return {"task": name, "difficulty": d, "subset": subset, "accuracy": accuracy}


def measure(run):
    report = arms.read_json(os.path.join(run, "report.json"))
    if not report["ttc"]:
        raise SystemExit(f"{run}/report.json has no test-time compute: run train.py --stages evaluate")
    result, seed = {"ttc": report["ttc"], "sft": []}, report["seed"]
    for name, subset in TRAINED:
        model, tokenizer = load(run, "sft")[:2] if name == "own rows" else control(run, report, name)
        rows = result.setdefault(name, {"rows": []})["rows"]
        for task, d in EARLY:
            rows.append(by_round(model, tokenizer, task, d, seed, subset))
    # The run's own sft checkpoint beside what else as many tokens buy, as its report has it for the finished model.
    model, tokenizer, _ = load(run, "sft")
    for task, d in EARLY[1:]:
        asked = train.Evaluation({task: d}, report["ttc"][0]["problems"], BUDGET)
        result["sft"].append(train.evaluate_ttc(model, tokenizer, task, asked, seed))
    arms.write_result("markovian_rsa", seed, **result)


METHODS = {"single": "one sample", "maj@equal_tokens": "majority of equal tokens", "delethink": "Delethink, C = 1",
           "full_rsa": "full RSA", "markovian_rsa": "**Markovian RSA**",
           "markovian_rsa_majority": "… majority of its last round"}


def table():
    """Markdown: ways to spend the same tokens, a row for each problem set."""
    results, rows = arms.read_results("markovian_rsa"), [["mean (each seed)", *METHODS.values()]]
    for when, key in (("after sft", "sft"), ("finished", "ttc")):
        for found in zip(*map(arms.of(key), results)):          # a row of each seed
            rows.append([f"{found[0]['task']} at {found[0]['difficulty']}, {when}"])
            for method in METHODS:
                numbers = list(map(arms.of(method), found))
                rows[-1].append(arms.by_seed(numbers, ".2f"))
    return arms.markdown(rows)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        measure(folder)
    print(table())
