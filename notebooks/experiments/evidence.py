"""The table of evidence: a row for each claim of the reports, worked out from notebooks/results.

    python notebooks/experiments/evidence.py    # prints the table; the experiments beside it make the results

A verdict is a rule and no opinion: every effect of the row must have the claimed sign and a 95 % interval over seeds
(Student's t) that leaves 0 out; some of them make it "partly", none "not at this scale"; one on the other side of 0 is
called the opposite.  Two rows have rules of their own: Markovian RSA's intervals over the problems must be apart in
every seed, and the cost of the MoE, one run, at most 1.4 times the dense model's.
"""
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import arms
import numpy as np
from arms import of


class Effect(NamedTuple):
    """measure(arm) - measure(other), a seed; claimed: +1 if it should be more, -1 if less."""
    what: str
    measure: Callable
    arm: str
    other: str
    claimed: int


def log_norm(kind):
    return np.log(list(kind["norms"].values())[-1][-1])         # of the last layer, after the last step


def steps_to_even(arm):
    return arm["reached"]["0.99"] or 300                        # never: at least as many as there were


def gain(arm):
    """What two rounds of Markovian RSA gain, mean over the problem sets."""
    curves = np.array([row["accuracy"] for row in arm["rows"] if row["subset"] == 4])
    return (curves[:, 2] - curves[:, 0]).mean()


def loss(arm, other):
    return Effect("loss", arms.loss, arm, other, -1)


def entropy(other):
    return Effect("entropy", of("end", "entropy"), "MLP + EDA", other, 1)


def trimmed(when, other):
    return Effect(f"right {when}", of(when, "longer", "right"), "AP trimming", other, 1)


def passed(arm, other):
    return Effect("pass@1", of("pass@1"), arm, other, 1)


CLAIMS = [                      # (claim, published, notebook, experiment, where a result keeps its arms, effects)
    ("CCGQA: a lower loss than MHA with an eighth of the cache", "2.286 and 2.297", "02_cca", "cca", of("arms"),
     [loss("+ q-k-mean", "MHA")]),
    ("Each part of CCA lowers the loss", "-0.016, -0.012, -0.004, -0.007", "02_cca", "cca", of("arms"),
     [loss("one conv", "nothing"), loss("two convs", "one conv"), loss("+ value shift", "two convs"),
      loss("+ q-k-mean", "+ value shift")]),
    ("An MLP router with EDA reaches a load entropy of 0.99 several times sooner than a linear one", "several times",
     "03_router_and_balancing", "router", of("arms"), [Effect("steps", steps_to_even, "MLP + EDA", "linear", -1)]),
    ("The PID-like bias update balances without an auxiliary loss", "no auxiliary loss", "03_router_and_balancing",
     "router", of("arms"), [entropy("no balancing"), entropy("auxiliary loss")]),
    ("Top-1 without a residual expert is best at equal FLOPs", "no numbers", "03_router_and_balancing", "router",
     of("arms"), [loss("MLP + EDA", "top-2"), loss("MLP + EDA", "residual expert")]),
    ("Residual scaling controls the norm of the stream, at next to no cost", "4·L·D parameters, L = 80 joins",
     "04_residual_scaling", "residual_scaling", of("kinds"),
     [Effect("log of the last layer's norm", log_norm, "residual scaling", "plain residual", -1)]),
    ("Answer-preserving trimming learns from traces that do not fit", "no numbers", "05_answer_preserving_trimming",
     "trimming", of("arms"),
     [trimmed("after short", "cut the end"), trimmed("after short", "cut the middle"),
      trimmed("after short", "drop long"), trimmed("after long", "cut the end"),
      trimmed("after long", "cut the middle"), trimmed("after long", "drop long")]),
    ("DPPO's mask learns more than PPO's clip", "no numbers", "06_sft_and_rl", "rl_parts", of("arms"),
     [passed("recipe", "PPO clip"), passed("stale", "stale, PPO clip")]),
    ("MaxRL's advantage learns more than GRPO's", "no numbers", "06_sft_and_rl", "rl_parts", of("arms"),
     [passed("recipe", "GRPO")]),
    ("… and only with a model trained for it", "Qwen3-4B gains much less", "07_markovian_rsa", "markovian_rsa", of(),
     [Effect("gain of two rounds", gain, "own rows", "no rows", 1),
      Effect("gain of two rounds", gain, "own rows", "one candidate", 1)]),
]


def line(claim, published, measured, seeds, minutes, verdict, notebook):
    return [claim, published, "; ".join(measured), seeds, minutes, f"**{verdict}**",
            f"[{notebook}.ipynb](notebooks/{notebook}.ipynb)"]


def verdict_of(held, count):
    return "reproduced" if held == count else "partly" if held else "not at this scale"


def row(claim, published, notebook, experiment, arms_of, effects):
    found = [arms_of(result) for result in arms.read_results(experiment)]
    measured, held, opposite, seconds = [], 0, "", 0
    for what, measure, name, other, claimed in effects:
        differences = [measure(seed[name]) - measure(seed[other]) for seed in found if name in seed and other in seed]
        _, low, high = arms.interval(differences)
        held += min(low * claimed, high * claimed) > 0
        if max(low * claimed, high * claimed) < 0:
            opposite = ": the opposite"
        measured.append(f"{what}, {name} minus {other}, {arms.paired(differences)}")
    for seed in found:
        for arm in seed.values():
            seconds += arm.get("seconds", 0) if isinstance(arm, dict) else 0
    return line(claim, published, measured, len(differences), f"{seconds / 60:.0f}",
                verdict_of(held, len(effects)) + opposite, notebook)


def markovian_rsa_row():
    """Here the intervals are over the problems of one seed, and those of the rivals must not touch it in any."""
    results, measured, held = arms.read_results("markovian_rsa"), [], 0
    for when, key in (("after sft", "sft"), ("finished", "ttc")):
        for rows in zip(*(result[key] for result in results)):
            if rows[0]["task"] == "column_sums":                # never aggregated in training
                continue
            text, apart = f"{rows[0]['task']} at {rows[0]['difficulty']}, {when}", []
            for method, name in (("markovian_rsa", ""), ("single", ", one sample"), ("maj@equal_tokens", ", the vote")):
                text += f"{name} {np.mean([one[method] for one in rows]):.2f}"
                apart += [one["markovian_rsa_ci95"][0] > one[method + "_ci95"][1] for one in rows if name]
            measured.append(f"{text}, apart in {sum(apart)} of {len(apart)}")
            held += all(apart)
    return line("Markovian RSA beats one sample and the vote", "AIME'25 88.3 to 91.9", measured, len(results), "-",
                verdict_of(held, len(measured)), "07_markovian_rsa")


def cost_row():
    """From the stored printout of an earlier `python kernels.py`, which also measured a dense model."""
    with open(os.path.join(arms.RESULTS, "kernels.md"), encoding="utf-8") as file:
        text = file.read()
    moe, dense, times = re.search(r"top-1 of 8 experts takes (\d+) ms.*?size (\d+) ms: ([\d.]+) times", text).groups()
    small, large = re.search(r"grows by (\d+) bytes a token; .* of this width: (\d+)", text).groups()
    measured = [f"{moe} ms and {dense} ms a step: {times} times", f"{small} and {large} bytes a token"]
    claim = "A MoE costs what a dense model of its active size does; the cache is an eighth"
    return line(claim, "0.76B of 8.4B active", measured, "-", "-", verdict_of(float(times) <= 1.4, 1), "08_kernels")


def table():
    head = ("claim", "published", "measured: mean over seeds [95 % interval]", "seeds", "minutes", "verdict",
            "notebook")
    *others, codesign = [row(*claim) for claim in CLAIMS]
    return arms.markdown([head, *others, markovian_rsa_row(), codesign, cost_row()])


if __name__ == "__main__":
    arms.main(__doc__, table)
