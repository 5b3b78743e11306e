"""The README's table of evidence: a row for each claim of the report, worked out from notebooks/results.

    python notebooks/evidence.py            # prints the table; the scripts named in its rows make the results

A verdict is a rule and no opinion: every effect of the row must have the claimed sign and a 95 % interval over seeds
(Student's t) that leaves 0 out; some of them make it "partly", none "not at this scale"; one on the other side of 0 is
called the opposite.  Two rows have rules of their own: Markovian RSA's intervals over the problems must be apart in
every seed, and the cost of the MoE, one run, at most 1.4 times the dense model's.
"""
import argparse
import glob
import json
import os
import re

import numpy as np

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
# 97.5 % quantile of Student's t by the number of seeds; 2.306 from 9 on, a little too wide for more
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def seeds(name):
    """What results/<name>/ has, one file a seed."""
    paths = sorted(glob.glob(os.path.join(RESULTS, name, "seed-*.json")))
    return [json.load(open(path)) for path in paths]            # noqa: SIM115, read at once


def complete(name, key="arms"):
    """Those seeds that no arm is missing of."""
    results = seeds(name)
    return [r for r in results if len(r[key]) == max(len(r[key]) for r in results)]


def resume(name, seed, fresh, key="command"):
    """-> path, what it has: the file of a seed that was stopped, if it was made as `fresh` says, or else `fresh`."""
    path = os.path.join(RESULTS, name, f"seed-{seed}.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.exists(path):
        return path, fresh
    with open(path) as file:
        older = json.load(file)
    if older[key] != fresh[key]:
        raise SystemExit(f"{path} was made by  {older['command']}, with other settings: delete it to measure anew")
    return path, older


def command_line(description, measure, tables, **numbers):
    """--seed N …, --table, and a flag for each of `numbers`, which go to measure(seed, *numbers); tables() -> text."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="*", default=[], help="seeds to measure")
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=f"instead of {number}")
    parser.add_argument("--table", action="store_true", help="print the tables over all seeds measured so far")
    given = parser.parse_args()
    for seed in given.seed:
        measure(seed, *(getattr(given, name) for name in numbers))
    if given.table:
        print(tables() or "no seed was measured yet")


def interval(differences):
    """Mean and 95 % interval over seeds of paired differences.

    >>> [round(float(x), 3) for x in interval([0.1, 0.2, 0.3])]
    [0.2, -0.048, 0.448]
    """
    mean = np.mean(differences)
    if len(differences) < 2:
        return mean, -np.inf, np.inf
    half = STUDENT.get(len(differences), 2.306) * np.std(differences, ddof=1) / len(differences) ** 0.5
    return mean, mean - half, mean + half


def effect(what, differences, claimed, form="{:+.3f}"):
    """One measured effect -> (its text, whether it is what is claimed, +1 more or -1 less, whether the opposite)."""
    mean, low, high = (float(x) for x in interval(differences))
    shown = f"{what} {form.format(mean)} " + (f"[{form.format(low)}, {form.format(high)}]" if len(differences) > 1
                                              else "(one seed)")
    return shown, min(low * claimed, high * claimed) > 0, max(low * claimed, high * claimed) < 0


def row(claim, published, effects, runs, seconds, notebook, also=""):
    held = sum(good for _, good, _ in effects)
    verdict = "reproduced" if held == len(effects) else "partly" if held else "not at this scale"
    verdict += ": the opposite" if any(opposite for *_, opposite in effects) else ""
    minutes = f"{seconds / 60:.0f}" if seconds else "-"
    measured = "; ".join(text for text, *_ in effects) + (f"; {also}" if also else "")
    return f"| {claim} | {published} | {measured} | {runs} | {minutes} | **{verdict}** | [{notebook}](notebooks/" \
           f"{notebook}) |"


def loss(arm):
    return float(np.mean(list(arm["held out"].values())))


def over_seeds(results, value, a, b):
    return [value(r["arms"][a]) - value(r["arms"][b]) for r in results]


def spent(results, arms="arms"):
    return sum(arm.get("seconds", 0) for r in results for arm in r[arms].values())


def cca_rows():
    results, book = complete("cca"), "02_cca.ipynb"
    minutes, n = spent(results), len(results)
    base = results[0]["arms"]
    cache = base["MHA"]["kv_bytes"] / base["+ q-k-mean"]["kv_bytes"]
    ladder = ["nothing", "one conv", "two convs", "+ value shift", "+ q-k-mean"]
    parts = [effect(after, over_seeds(results, loss, after, before), -1) for before, after in zip(ladder, ladder[1:])]
    return [row("CCGQA: a lower loss than MHA with an eighth of the cache", "2.286 and 2.297",
                [effect("loss minus MHA's", over_seeds(results, loss, "+ q-k-mean", "MHA"), -1)], n, minutes, book,
                f"the cache {cache:.1f} times smaller; minus MLA's "
                f"{np.mean(over_seeds(results, loss, '+ q-k-mean', 'MLA')):+.3f}, GQA's "
                f"{np.mean(over_seeds(results, loss, '+ q-k-mean', 'GQA')):+.3f}"),
            row("Each part of CCA lowers the loss", "-0.016, -0.012, -0.004, -0.007", parts, n, None, book)]


def router_rows():
    results, book = complete("router"), "03_router_and_balancing.ipynb"
    n, steps = len(results), results[0]["steps"]

    def reached(arm):
        return arm["reached"]["0.99"] or steps                  # never: at least that many

    def end(arm):
        return arm["end"]["entropy"]

    def minus(value, other):
        return over_seeds(results, value, "MLP + EDA", other)

    shown = "; ".join(f"{name} {', '.join(str(r['arms'][name]['reached']['0.99'] or 'never') for r in results)}"
                      for name in ("MLP + EDA", "linear", "MLP, no EDA"))
    ends = ", ".join(f"{end(r['arms']['MLP + EDA']):.3f}" for r in results)
    return [row("An MLP router with EDA reaches a load entropy of 0.99 several times sooner than a linear one",
                "several times", [effect("steps, minus linear's,", minus(reached, "linear"), -1, "{:+.0f}")],
                n, spent(results), book, f"of {steps} steps: {shown}"),
            row("The PID-like bias update balances without an auxiliary loss", "no auxiliary loss",
                [effect("entropy, minus that without balancing,", minus(end, "no balancing"), 1),
                 effect("entropy, minus that with an auxiliary loss,", minus(end, "auxiliary loss"), 1)],
                n, None, book, f"entropy at the end {ends}; loss, minus that with an auxiliary loss, "
                f"{np.mean(minus(loss, 'auxiliary loss')):+.3f}"),
            row("Top-1 without a residual expert is best at equal FLOPs", "no numbers",
                [effect("loss, minus top-2's with experts half as wide,", minus(loss, "top-2"), -1),
                 effect("minus that with a residual expert,", minus(loss, "residual expert"), -1)], n, None, book)]


def residual_row():
    results = complete("residual_scaling", "kinds")

    def last(kind):
        return [list(r["kinds"][kind]["norms"].values())[-1][-1] for r in results]

    logs = np.log(last("residual scaling")) - np.log(last("plain residual"))
    losses = [loss(r["kinds"]["residual scaling"]) - loss(r["kinds"]["plain residual"]) for r in results]
    means = [np.mean(last(kind)) for kind in ("residual scaling", "plain residual")]
    return row("Residual scaling controls the norm of the stream, at next to no cost", "4·L·D parameters, L = 80 joins",
               [effect("log of the last layer's norm, minus plain's,", logs, -1)], len(results),
               spent(results, "kinds"), "04_residual_scaling.ipynb",
               "norms {:.1f} and {:.1f}; loss minus plain's {:+.3f}".format(*means, np.mean(losses)))


def trimming_row():
    results = complete("trimming")

    def right(when):
        return lambda arm: arm[f"after {when}"]["longer"]["right"]

    others = ["cut the end", "cut the middle", "drop long"]
    when = {"short": "after short context", "long": "after a second phase with long context"}
    effects = [effect(f"{when[phase]}, minus {other}", over_seeds(results, right(phase), "AP trimming", other), 1)
               for phase in when for other in others]
    return row("Answer-preserving trimming learns from traces that do not fit", "no numbers", effects, len(results),
               spent(results), "05_answer_preserving_trimming.ipynb",
               "share of right answers to problems whose trace does not fit")


def rl_rows():
    results, book = seeds("post_training"), "06_sft_and_rl.ipynb"
    asked = list(results[0]["fixed difficulty"]["before"]["tasks"])

    def mean(tasks):
        return np.mean([tasks[task] for task in asked])

    def after(stage):
        return [mean(r["report"]["stages"][stage]["tasks"]) for r in results]

    sft, rl, control = after("sft"), after("mathcode"), [mean(r["more sft"]["tasks"]) for r in results]
    seconds = sum(sum(r["report"]["seconds"].values()) for r in results)
    kl = [[np.mean([stage[key] for stage in r["replay"].values()]) for r in results] for key in ("kl", "kl_live")]
    parts = complete("rl_parts")

    def better(arm, other):
        return effect(f"pass@1, {arm} minus {other},", over_seeds(parts, lambda a: a["pass@1"], arm, other), 1)

    return [row("The RL stages lift what SFT reached", "AIME'26 68.3 to 89.1",
                [effect("pass@1 on held-out problems, minus SFT's,", np.subtract(rl, sft), 1),
                 effect("… minus that of as much more SFT", np.subtract(rl, control), 1)], len(results), seconds, book),
            row("Router replay keeps sampler and trainer alike, and RL learns more", "the most important MoE change",
                [effect("sampler-trainer KL, minus that without,", np.subtract(*kl) * 1e3, -1, "{:+.2f}e-3"),
                 better("recipe", "no replay"), better("stale", "stale, no replay")], len(results), spent(parts), book,
                "stale: weights synced every 8 steps instead of 2"),
            row("DPPO's mask learns more than PPO's clip", "no numbers",
                [better("recipe", "PPO clip"), better("stale", "stale, PPO clip")], len(parts), None, book),
            row("MaxRL's advantage learns more than GRPO's", "no numbers", [better("recipe", "GRPO")], len(parts), None,
                book)]


def apart(rows, key):
    """In how many rows Markovian RSA is above `key` with 95 % intervals, over the problems, that do not touch."""
    return sum(row["markovian_rsa_ci95"][0] > row[key + "_ci95"][1] for row in rows)


def mrsa_rows():
    results, book = seeds("markovian_rsa"), "07_markovian_rsa.ipynb"
    shown = [(f"{rows[0]['task']} at {rows[0]['difficulty']}, {when}", rows) for when, key in
             (("after sft", "sft"), ("finished", "ttc")) for rows in zip(*(r[key] for r in results))
             if (rows[0]["task"], rows[0]["difficulty"]) in (("find", 6), ("synthesize", 2), ("synthesize", 4))]
    kinds = {"single": "one sample", "maj@equal_tokens": "the vote"}

    def gain(rows, key):
        return np.mean([row["markovian_rsa"] - row[key] for row in rows])

    effects = [(f"{where}: {np.mean([row['markovian_rsa'] for row in rows]):.2f}, "
                + ", ".join(f"minus {what} {gain(rows, key):+.2f} (apart in {apart(rows, key)})"
                            for key, what in kinds.items()) + f", minus full RSA {gain(rows, 'full_rsa'):+.2f}",
                all(apart(rows, key) == len(rows) for key in kinds), False) for where, rows in shown]
    control = [r for r in results if "no rows" in r]

    def gained(r, name):
        rows = [row["accuracy"] for row in r[name]["rows"] if row["subset"] == 4]
        return np.mean([a[2] - a[0] for a in rows])

    seconds = sum(r["own rows"]["seconds"] for r in results)
    names = [name for name in ("no rows", "one candidate") if sum(name in r for r in results) > 1]
    codesign = [effect(f"gain of two rounds, minus that with {name} in training",
                       [gained(r, "own rows") - gained(r, name) for r in results if name in r], 1, "{:+.2f}")
                for name in names]
    note = "apart: in how many seeds the intervals over 100 problems are; the vote has as many tokens"
    return [row("Markovian RSA beats one sample and the vote", "AIME'25 88.3 to 91.9", effects, len(results), None,
                book, note),
            row("… and only with a model trained for it", "Qwen3-4B gains much less", codesign, len(control),
                seconds + sum(r[name]["seconds"] for r in results for name in names if name in r), book)]


def cost_row():
    with open(os.path.join(RESULTS, "kernels.md")) as file:
        text = file.read()
    moe, dense, times = re.search(r"top-1 of 8 experts takes (\d+) ms.*?size (\d+) ms: ([\d.]+) times", text).groups()
    small, large = re.search(r"grows by (\d+) bytes a token; .* of this width: (\d+)", text).groups()
    verdict = "reproduced" if float(times) <= 1.4 else "not at this scale"
    return "| A MoE costs what a dense model of its active size does; the cache is an eighth | 0.76B of 8.4B active " \
           f"| {moe} ms and {dense} ms a step: {times} times (medians of one run, bound 1.4); {small} and {large} " \
           f"bytes a token | - | - | **{verdict}** | [08_kernels.ipynb](notebooks/08_kernels.ipynb) |"


if __name__ == "__main__":
    print("| claim | published | measured: mean over seeds [95 % interval] | seeds | minutes | verdict | notebook |")
    print("|---" * 7 + "|")
    print(*cca_rows(), *router_rows(), residual_row(), trimming_row(), *rl_rows(), *mrsa_rows(), cost_row(), sep="\n")
