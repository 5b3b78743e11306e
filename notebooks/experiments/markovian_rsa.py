"""What Markovian RSA needs and what it costs, measured on finished runs of train.py.

    python notebooks/experiments/runs.py 0:default 1 2                              # the runs themselves
    python notebooks/experiments/markovian_rsa.py out/run-1-own out/run-2-own     # results/markovian_rsa/seed-1.json, …

A control: an sft from the run's own midtrain checkpoint, with the same steps, tokens, rates and data, but without rows
that show tails.  It is compared with the run's own sft checkpoint, so reinforcement learning has no part in it.  And
the finished model against the vote once more, which now gets as many seconds of the CPU instead of as many tokens.
"""
import os
import sys
import time
from dataclasses import replace

import arms
import numpy as np
import torch
from arms import train

import rsa

PROBLEMS, BUDGET = 50, rsa.BUDGETS["tiny"]
READERS = {"find": 8, "pass": 6}                # what the recipe asks the finished model, and at which difficulty
ASKED = {**READERS, "column_sums": 10}


def load(*folder):
    return train.load_checkpoint(os.path.join(*folder), "cpu")


def control(run, report):
    """Train the control, or go on with it -> model, tokenizer."""
    out = os.path.join(run, "control-no-rows")
    config = train.parse_arguments(["--preset", report["preset"], "--seed", str(report["seed"]), "--out", out])[0]
    os.makedirs(out, exist_ok=True)
    model, tokenizer, state = load(run, "midtrain")
    now = train.settings(config)
    if any(now.get(name) != value for name, value in state["settings"].items()):
        raise SystemExit(f"{run} was not made with the settings of --preset {report['preset']}: nothing to compare")
    model, tokenizer, state = load(out, "sft") or (model, tokenizer, None)
    stage = replace(train.stage_settings(config, "sft"), aggregation=0.0)
    train.supervised_stage("sft", config, stage, model, tokenizer, state, "cpu", torch.float32)
    return model, tokenizer


def solve(source, problems, tokenizer, population, rounds, seed):
    """-> the texts by round, and the seconds of the CPU that they took."""
    begun = time.process_time()
    prompts = [problem.prompt for problem in problems]
    results = rsa.markovian_rsa(prompts, source, population, BUDGET.subset, rounds, BUDGET.budget, BUDGET.tail, seed,
                                tokenizer)
    return train.texts_by_round(results), time.process_time() - begun


def by_round(model, tokenizer, seed):
    """{"find at 8": share of the population that is right after each round, …}."""
    found, source = {}, rsa.Checkpoint(model, tokenizer)
    for task, d in READERS.items():
        problems = train.held_out_problems([task], PROBLEMS, (d,))
        texts, _ = solve(source, problems, tokenizer, BUDGET.population, BUDGET.rounds, seed)
        found[f"{task} at {d}"] = [float(train.verify_replies(problems, replies).mean()) for replies in texts]
    return found


def equal_seconds(model, tokenizer, seed):
    """A row for each task: Markovian RSA, and the vote of as many samples as its seconds buy."""
    rows, source, N = [], rsa.Checkpoint(model, tokenizer), BUDGET.population
    for task, d in ASKED.items():
        problems = train.held_out_problems([task], PROBLEMS, (d,))
        texts, seconds = solve(source, problems, tokenizer, N, BUDGET.rounds, seed)
        plain, once = solve(source, problems, tokenizer, N, 0, seed + 1)
        more, took = solve(source, problems, tokenizer, max(1, round(N * seconds / once) - N), 0, seed + 2)
        votes = np.concatenate([plain[0], more[0]], 1)          # (problems, samples)
        right = train.verify_replies(problems, texts[-1]).mean(1)
        voted = train.majority_rates(problems, votes)
        rows.append({"task": task, "difficulty": d, "markovian_rsa": float(right.mean()), "vote": float(voted.mean()),
                     "markovian_rsa_ci95": train.interval(right), "vote_ci95": train.interval(voted),
                     "samples": votes.shape[1], "seconds": seconds, "vote_seconds": once + took})
    return rows


def measure(run):
    report, rounds = arms.read_json(os.path.join(run, "report.json")), {}
    rounds["no rows"] = by_round(*control(run, report), report["seed"])
    for name, folder in (("own rows", "sft"), ("finished", "final")):
        rounds[name] = by_round(*load(run, folder)[:2], report["seed"])
    seconds = equal_seconds(*load(run, "final")[:2], report["seed"])
    arms.write_result("markovian_rsa", report["seed"], rounds=rounds, seconds=seconds)


def tables():
    """Markdown: what rounds gain by what the model was trained on; Markovian RSA and the vote at equal seconds."""
    results = arms.read_results("markovian_rsa")
    gained = [["right after 0, 1, 2 rounds, mean (each seed's last)", *results[0]["rounds"]["own rows"]]]
    for name in ("no rows", "own rows", "finished"):
        gained.append([name])
        for task in gained[0][1:]:
            curves = np.array([result["rounds"][name][task] for result in results])
            shares = " → ".join(f"{share:.2f}" for share in curves.mean(0))
            gained[-1].append(f"{shares} ({', '.join(f'{share:.2f}' for share in curves[:, -1])})")
    columns = {"Markovian RSA": ("markovian_rsa", ".2f"), "the vote": ("vote", ".2f"),
               "samples it has": ("samples", ".0f"), "CPU seconds": ("seconds", ".0f"),
               "the vote's": ("vote_seconds", ".0f")}
    spent = [["finished model, about equal seconds", *columns]]
    for rows in zip(*(result["seconds"] for result in results)):
        spent.append([f"{rows[0]['task']} at {rows[0]['difficulty']}"])
        for key, form in columns.values():
            spent[-1].append(arms.by_seed([row[key] for row in rows], form))
    return "\n\n".join([arms.markdown(gained), arms.markdown(spent)])


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        measure(folder)
    print(tables())
