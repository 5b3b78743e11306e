"""What Markovian RSA needs, measured on finished runs of train.py: training rows, rounds, a population, an order.

    python train.py --seed 1 --out out/seed-1                    # once a seed, all stages
    python notebooks/markovian_rsa.py out/seed-1                 # writes notebooks/results/markovian_rsa/seed-1.json
    python notebooks/markovian_rsa.py --table --picture          # the tables and the picture, over all seeds

Controls, each an sft from the run's own midtrain checkpoint, with the same steps, tokens, rates and data, but for the
aggregation rows: none; rows with one candidate only; the problem before the candidates, as in the report.  They are
compared with the run's own sft checkpoint, so reinforcement learning has no part in it.
"""
import argparse
import dataclasses
import functools
import glob
import json
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import rsa  # noqa: E402
import train  # noqa: E402

RESULTS = os.path.join(ROOT, "notebooks", "results", "markovian_rsa")
EARLY = {"find": (4, 6), "synthesize": (2, 4)}      # where single samples after sft are right now and then
MEASURED = (("find", 6), ("synthesize", 2), ("synthesize", 4))      # … and what else is compared there
POPULATIONS, ROUNDS, TAILS = (4, 8, 16, 32), 6, (8, 16, 24, 48)


def problem_first(problem, tails):
    """terse_prompt in the report's order."""
    return f"{problem}|" + "".join(f"{tail}|" for tail in tails) if tails else problem


CONTROLS = {"no rows": (dict(aggregation=0.0), rsa.terse_prompt),
            "one candidate": (dict(candidates=(1,)), rsa.terse_prompt),
            "problem first": ({}, problem_first)}


def control(run, report, name):
    """Train one control, or go on with it -> model, tokenizer, seconds."""
    changes, train.terse_prompt = CONTROLS[name]                # the name by which train.py builds its prompts
    config = train.parse_arguments(["--preset", report["preset"], "--seed", str(report["seed"]),
                                    "--out", os.path.join(run, "control-" + name.replace(" ", "-"))])[0]
    os.makedirs(config.out, exist_ok=True)
    model, tokenizer, state = train.load_checkpoint(os.path.join(run, "midtrain"), "cpu")
    if train.settings(config) != state["settings"]:
        raise SystemExit(f"{run} was not made with the settings of --preset {report['preset']}: nothing to compare")
    found, state = train.load_checkpoint(os.path.join(config.out, "sft"), "cpu"), None
    if found:
        model, tokenizer, state = found
    if not (state and state.get("done")):
        settings = dataclasses.replace(train.stage_settings(config, "sft"), **changes)
        state = train.run_stage("sft", config, settings, model, tokenizer, state, "cpu", torch.float32)
    train.terse_prompt = rsa.terse_prompt
    return model, tokenizer, state["seconds"]


def by_round(model, tokenizer, name, d, problems, seed, population=16, subset=4, rounds=4, build=rsa.terse_prompt,
             tail=rsa.BUDGETS["tiny"].tail):
    """Mean correctness of the population after each round, 0 … `rounds`, with 95 % intervals over the problems."""
    task, budget = train.find_task(name), rsa.BUDGETS["tiny"]
    held = train.held_out_problems([name], problems, (d,))
    source = rsa.Checkpoint(model, tokenizer)

    def generate(prompts, *more):
        return source(prompts, *more, progress=functools.partial(
            tqdm, desc=f"{name} at {d}, N = {population}", total=len(prompts), unit=" rollouts", leave=False,
            disable=None))

    results = rsa.markovian_rsa([p.prompt for p in held], generate, population, subset, rounds, budget.budget, tail,
                                seed, tokenizer, build)
    right = np.array([[np.mean([task.verify(p, c.text)[0] for c in population_]) for population_ in result.rounds]
                      for p, result in zip(held, results)])                         # (problems, rounds + 1)
    return {"task": name, "difficulty": d, "problems": problems, "population": population, "subset": subset,
            "tail": tail, "longest_prompt": max(result.longest_prompt for result in results),
            "accuracy": right.mean(0).tolist(), "ci95": [train.interval(list(column)) for column in right.T],
            "tokens": float(np.mean([result.generated_tokens for result in results]))}


def measure(run, problems, controls):
    """Write what is not there yet: "sft", "own rows", each control under its name, "population", "tails"."""
    with open(os.path.join(run, "report.json")) as file:
        report = json.load(file)
    if not report["ttc"]:
        raise SystemExit(f"{run}/report.json has no test-time compute: run train.py --stages evaluate")
    os.makedirs(RESULTS, exist_ok=True)
    path, seed = os.path.join(RESULTS, f"seed-{report['seed']}.json"), report["seed"]
    result = {"command": f"python notebooks/markovian_rsa.py {run} --problems {problems}", "seed": seed,
              "problems": problems, "ttc": report["ttc"]}
    if os.path.exists(path):
        with open(path) as file:
            older = json.load(file)
        if (older["ttc"], older["problems"]) != (report["ttc"], problems):
            raise SystemExit(f"{path} is another run's, or of another number of problems: delete it to measure {run}")
        result = older

    def add(name, compute):
        if name not in result:
            begun = time.perf_counter()
            result[name] = compute()
            train.write_json(path, result)
            print(f"seed {seed}, {name}: {time.perf_counter() - begun:.0f} s", flush=True)

    def by_rows(name):
        model, tokenizer, seconds = load(run, "sft") if name == "own rows" else control(run, report, name)
        build = CONTROLS[name][1] if name in CONTROLS else rsa.terse_prompt
        return {"seconds": seconds, "rows": [
            by_round(model, tokenizer, task, d, problems, seed, subset=subset, build=build)
            for task, ds in EARLY.items() for d in ds for subset in ((4, 1) if name == "one candidate" else (4,))]}

    def after_sft(task, d):
        asked = train.Evaluation({task: d}, report["ttc"][0]["problems"], rsa.BUDGETS["tiny"], most_rounds=2)
        return train.evaluate_ttc(*load(run, "sft")[:2], task, asked, seed)

    add("sft", lambda: [after_sft(task, d) for task, d in MEASURED])
    add("own rows", lambda: by_rows("own rows"))
    for name in controls:
        add(name, lambda name=name: by_rows(name))
    add("population", lambda: [by_round(*load(run, "final")[:2], row["task"], row["difficulty"], problems, seed, n, 4,
                                        ROUNDS)
                               for row in report["ttc"] if row["task"] in EARLY for n in POPULATIONS])
    add("tails", lambda: [by_round(*load(run, "final")[:2], row["task"], row["difficulty"], problems, seed, rounds=2,
                                   tail=tail)
                          for row in report["ttc"] if row["task"] in EARLY for tail in TAILS])


def load(run, stage):
    model, tokenizer, state = train.load_checkpoint(os.path.join(run, stage), "cpu")
    return model, tokenizer, state.get("seconds") if state else None


def read_results():
    results = []
    for path in sorted(glob.glob(os.path.join(RESULTS, "seed-*.json"))):
        with open(path) as file:
            results.append(json.load(file))
    return results


def shown(values):
    return f"{np.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def comparison(columns):
    """Markdown rows: the ways to spend tokens, a column of rows of evaluate_ttc, one a seed, each."""
    first = columns[0][0]
    N, equal = first["population"], first["population"] * (first["T"] + 1)
    kinds = [("single", "one sample"), ("greedy", "greedy"), ("maj@equal_tokens", f"majority of {equal}: equal tokens"),
             ("field_vote@equal_tokens", f"… vote on each field, of {equal}"),
             ("certified@equal_tokens", f"the first of {equal} that says it holds"),
             ("pass@equal_tokens", f"any of {equal} (oracle)"), ("delethink", "Delethink, C = 1"),
             ("full_rsa", "full RSA"), ("markovian_rsa", f"**Markovian RSA**, N = {N}, T = {first['T']}"),
             ("markovian_rsa_majority", "… majority of its last round")]
    lines = [f"| {what} | " + " | ".join(shown([row[key] for row in rows]) if key in rows[0] else "-"
                                        for rows in columns) + " |" for key, what in kinds]
    longest = [[max(row[key] for row in rows) for key in ("longest_prompt", "longest_prompt_full_rsa")]
               for rows in columns]
    return [*lines, "| longest prompt (full RSA's) | " + " | ".join(f"{a} ({b})" for a, b in longest) + " |"]


def table():
    """Two markdown tables, mean and each seed: what it gains over other uses of tokens, what rows it needs."""
    results = read_results()
    columns = [("after sft", rows) for rows in zip(*(r["sft"] for r in results))] + \
        [("finished", rows) for rows in zip(*(r["ttc"] for r in results))]
    heads = [f"{rows[0]['task']}, difficulty {rows[0]['difficulty']}, {when}" for when, rows in columns]
    lines = ["| mean (each seed) | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|",
             *comparison([rows for _, rows in columns])]
    early = [(task, d) for task, ds in EARLY.items() for d in ds]
    lines += ["", "| after sft, T = 0 → T = 2 | " + " | ".join(f"{task}, difficulty {d}" for task, d in early) + " |",
              "|---" * (len(early) + 1) + "|"]
    names = [("own rows", 4, "trained with rows of 1 to 4 candidates"), ("no rows", 4, "no aggregation rows"),
             ("one candidate", 4, "rows with one candidate"), ("one candidate", 1, "… used with C = 1"),
             ("problem first", 4, "the problem before the candidates")]
    for name, subset, what in names:
        cells = []
        for task, d in early:
            rows = [row["accuracy"] for r in results if name in r for row in r[name]["rows"]
                    if (row["task"], row["difficulty"], row["subset"]) == (task, d, subset)]
            cells.append(f"{np.mean([a[0] for a in rows]):.2f} → {shown([a[2] for a in rows])}" if rows else "-")
        if any(cell != "-" for cell in cells):
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    print("\n".join(lines))


def picture():
    """results/markovian_rsa/rounds.png: where rounds and population stop helping; what the rows are for."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = read_results()
    swept = [r for r in results if "population" in r]
    tasks = list(dict.fromkeys((row["task"], row["difficulty"]) for row in swept[0]["population"]))
    figure, axes = plt.subplots(1, len(tasks) + 1, figsize=(4.6 * (len(tasks) + 1), 3.8), constrained_layout=True)
    for axis, (task, d) in zip(axes, tasks):
        for n, color in zip(POPULATIONS, plt.cm.viridis(np.linspace(0.85, 0, len(POPULATIONS)))):
            seeds = np.array([row["accuracy"] for r in swept for row in r["population"]
                              if (row["task"], row["difficulty"], row["population"]) == (task, d, n)])
            axis.errorbar(range(ROUNDS + 1), seeds.mean(0), seeds.std(0), color=color, marker="o", markersize=4,
                          capsize=2, label=f"N = {n}")
        axis.set(title=f"{task}, difficulty {d}, the finished model", xlabel="rounds of aggregation T", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"right (mean and deviation; seeds: {len(swept)})")
    axes[0].legend(fontsize=8)
    for name, color, what in (("own rows", "C0", "1 to 4 candidates"), ("problem first", "C1", "… problem first"),
                              ("one candidate", "C2", "one candidate"), ("no rows", "C3", "no aggregation rows")):
        if not any(name in r for r in results):
            continue
        seeds = np.array([[row["accuracy"] for row in r[name]["rows"] if row["subset"] == 4]
                          for r in results if name in r])
        axes[-1].plot(range(seeds.shape[-1]), seeds.mean((0, 1)), color=color, marker="o", markersize=4, label=what)
        for one in seeds.mean(1):
            axes[-1].plot(range(seeds.shape[-1]), one, color=color, alpha=0.3, linewidth=1)
    axes[-1].set(title="after sft, by the rows trained on (four problem sets)", xlabel="rounds of aggregation T",
                 ylim=(0, 1.02), xticks=range(seeds.shape[-1]))
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    figure.savefig(os.path.join(RESULTS, "rounds.png"), dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help="finished runs of train.py")
    parser.add_argument("--problems", type=int, default=40, help="held-out problems of each measurement")
    parser.add_argument("--controls", default=",".join(CONTROLS), help="which ones, separated by commas")
    parser.add_argument("--table", action="store_true", help="print the tables over all seeds measured so far")
    parser.add_argument("--picture", action="store_true", help="draw results/markovian_rsa/rounds.png from them")
    arguments = parser.parse_args()
    for folder in arguments.run:
        measure(folder, arguments.problems, [name for name in arguments.controls.split(",") if name])
    if arguments.table:
        table()
    if arguments.picture:
        picture()
