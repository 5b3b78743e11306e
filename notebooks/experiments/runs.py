"""Whole default runs over seeds and arithmetics, and what holds in the worst of them.

    python notebooks/experiments/runs.py 0 1 2:avx2 0:default    # seeds, each with ATEN_CPU_CAPABILITY if one is named
    python notebooks/experiments/runs.py                         # what results/runs.json says, as a table

A run takes 20 minutes of two idle cores and stays in out/run-SEED-ARITHMETIC.  What is in runs.json, with as many
threads (OMP_NUM_THREADS), is not run again, and a run that was stopped goes on.
"""
import os
import platform
import re
import subprocess
import sys
import time

import arms
import numpy as np
import torch
from arms import train

PATH = os.path.join(arms.RESULTS, "runs.json")
# Our names in runs.json, and train.py's in report.json.
METHODS = {"single": "single", "vote": "maj@equal_tokens", "delethink": "delethink", "full_rsa": "full_rsa",
           "markovian_rsa": "markovian_rsa"}


def cpu_name():
    """What this machine's CPU calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"model name\s*: (.*)", file.read())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def whole_run(seed, arithmetic):
    """Run train.py to its end -> the entry of runs.json."""
    name = os.path.join("out", f"run-{seed}-{arithmetic or 'own'}")
    out = os.path.join(arms.ROOT, name)
    os.makedirs(out, exist_ok=True)
    environment = {**os.environ, **({"ATEN_CPU_CAPABILITY": arithmetic} if arithmetic else {})}
    command, begun = [sys.executable, "train.py", "--seed", str(seed), "--out", name], time.perf_counter()
    try:
        with open(os.path.join(out, "output.txt"), "a", encoding="utf-8") as file:
            subprocess.run(command, cwd=arms.ROOT, env=environment, check=True, stdout=file)
    finally:                                                    # also of a run that was stopped the time counts
        with open(os.path.join(out, "minutes.txt"), "a", encoding="utf-8") as file:
            file.write(f"{(time.perf_counter() - begun) / 60:.2f}\n")
    with open(os.path.join(out, "minutes.txt"), encoding="utf-8") as file:
        minutes = sum(map(float, file))
    report = arms.read_json(os.path.join(out, "report.json"))
    ttc = []
    for row in report["ttc"]:
        entry = {key: row[key] for key in ("after", "task", "difficulty", "problems")}
        entry |= {ours: row[key] for ours, key in METHODS.items() if key in row}
        ttc.append({**entry, "ci95": {ours: row[key + "_ci95"] for ours, key in METHODS.items() if key in row}})
    stages = report["stages"]
    return {"seed": seed, "arithmetic": arithmetic or torch.backends.cpu.get_cpu_capability().lower(),
            "cpu": cpu_name(), "threads": torch.get_num_threads(), "minutes": round(minutes, 1),
            "seconds": report["seconds"], "stages": {name: stage["pass@1"] for name, stage in stages.items()},
            "tasks": {name: stage["tasks"] for name, stage in stages.items()},
            "stories": {name: stage["stories"] for name, stage in stages.items()},
            "reads": {name: stage["reads"] for name, stage in stages.items() if "reads" in stage},
            "difficulty": {name: [stages["rlve"]["start"][name], stages["rlve"]["end"][name]]
                           for name in stages["rlve"]["end"]}, "ttc": ttc}


def stands_out(row):
    """Markovian RSA is at least twice one sample, and its interval is above those of one sample and of the vote."""
    low = row["ci95"]["markovian_rsa"][0]
    return (row["markovian_rsa"] >= 2 * row["single"] and low > row["ci95"]["single"][1]
            and low > row["ci95"]["vote"][1])


def draw(runs):
    """results/runs.png: of the finished models, each method's mean over the runs, and a dot for each run."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis, tasks = figure.subplots(), {}
    for row in (row for run in runs for row in run["ttc"] if row["after"] == "final"):
        tasks.setdefault(f"{row['task']}\ndifficulty {row['difficulty']}", []).append(row)
    for number, (method, name) in enumerate(METHODS.items()):
        shares = np.array([[row[method] for row in rows] for rows in tasks.values()])       # (tasks, runs)
        places = np.arange(len(tasks)) + 0.16 * number
        axis.bar(places, shares.mean(1), 0.15, label=train.METHODS[name], color=f"C{number}")
        axis.plot(places, shares, "k.", markersize=4)
    axis.set_xticks(np.arange(len(tasks)) + 0.32, tasks)
    axis.set(title="Reading tails finds what no vote finds, unless one answer is right", ylim=(0, 1),
             ylabel="held-out problems right", xlabel=f"a dot for each of {len(runs)} runs; bars are means")
    figure.legend(loc="outside right center")
    figure.savefig(os.path.join(arms.RESULTS, "runs.png"), dpi=110)


def table(runs):
    """Two tables: each run, and the worst of all."""
    rows = [["seed", "arithmetic", "threads", "minutes", "after", "task", *METHODS, "stands out"]]
    worst = {}
    for run in runs:
        for row in run["ttc"]:
            task = f"{row['task']} at {row['difficulty']}"
            shares = [f"{row[method]:.2f}" if method in row else "" for method in METHODS]
            rows.append([run["seed"], run["arithmetic"], run["threads"], run["minutes"], row["after"], task, *shares,
                         "yes" if stands_out(row) else "no"])
            worst.setdefault((row["after"], task), []).append(row)
    lines = [["after", "task", "runs", "Markovian RSA, least", "one sample, most", "vote, most", "stands out in"]]
    for (after, task), each in worst.items():
        least = min(row["markovian_rsa"] for row in each)
        most = [max(row[rival] for row in each) for rival in ("single", "vote")]
        lines.append([after, task, len(each), *(f"{share:.2f}" for share in (least, *most)),
                      sum(map(stands_out, each))])
    about = "Stands out: Markovian RSA is at least twice one sample, and its 95 % interval is above one sample's and " \
        "above the vote's."
    return "\n\n".join([arms.markdown(lines), about, arms.markdown(rows)])


def main():
    runs = arms.read_json(PATH) if os.path.exists(PATH) else []
    for name in sys.argv[1:]:
        seed, _, arithmetic = name.partition(":")
        own = arithmetic or torch.backends.cpu.get_cpu_capability().lower()
        known = [(run["seed"], run["arithmetic"], run["threads"]) for run in runs]
        if (int(seed), own, torch.get_num_threads()) not in known:
            runs.append(whole_run(int(seed), arithmetic))
            arms.write_json(PATH, runs)
            draw(runs)
    print(table(runs))


if __name__ == "__main__":
    main()
