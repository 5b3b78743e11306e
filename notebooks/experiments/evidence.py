"""The table of evidence: a row for each claim of the reports, worked out from notebooks/results.

    python notebooks/experiments/evidence.py    # prints the table; the experiments beside it make the results

A verdict is a rule and no opinion: every effect of the row must have the claimed sign and a 95 % interval over seeds
(Student's t) that leaves 0 out; some of them make it "partly", none "not at this scale"; one on the other side of 0 is
called the opposite.  The row of Markovian RSA against the vote has a rule of its own: its intervals over the problems
must be apart in every seed.
"""
from itertools import starmap

import arms
import numpy as np
from arms import of
from residual_scaling import last_norm


def steps_to_even(arm):
    return arm["reached"]["0.99"] or 300                        # never: at least as many as there were


def gain(arm):
    """What two rounds of Markovian RSA gain, mean over the problem sets."""
    curves = np.array([row["accuracy"] for row in arm["rows"] if row["subset"] == 4])
    return (curves[:, 2] - curves[:, 0]).mean()


# What is measured on an arm, and whether a claim says that it is more (+1) or less (-1) than on the other arm.
MEASURES = {"loss": (arms.loss, -1), "steps": (steps_to_even, -1), "entropy": (of("end", "entropy"), 1),
            "log of the last layer's norm": (lambda kind: np.log(last_norm(kind)), -1), "pass@1": (of("pass@1"), 1),
            "right after short": (of("after short", "longer", "right"), 1),
            "right after long": (of("after long", "longer", "right"), 1), "gain of two rounds": (gain, 1)}
CLAIMS = [                      # (claim, published, notebook, experiment, the key of a result's arms, effects)
    ("CCGQA: a lower loss than MHA with an eighth of the cache", "2.286 and 2.297", "02_cca", "cca", "arms",
     [("loss", "+ q-k-mean", "MHA")]),
    ("Each part of CCA lowers the loss", "-0.016, -0.012, -0.004, -0.007", "02_cca", "cca", "arms",
     [("loss", "one conv", "nothing"), ("loss", "two convs", "one conv"), ("loss", "+ value shift", "two convs"),
      ("loss", "+ q-k-mean", "+ value shift")]),
    ("An MLP router with EDA reaches a load entropy of 0.99 several times sooner than a linear one", "several times",
     "03_router_and_balancing", "router", "arms", [("steps", "MLP + EDA", "linear")]),
    ("The PID-like bias update balances without an auxiliary loss", "no auxiliary loss", "03_router_and_balancing",
     "router", "arms", [("entropy", "MLP + EDA", "no balancing"), ("entropy", "MLP + EDA", "auxiliary loss")]),
    ("Top-1 without a residual expert is best at equal FLOPs", "no numbers", "03_router_and_balancing", "router",
     "arms", [("loss", "MLP + EDA", "top-2"), ("loss", "MLP + EDA", "residual expert")]),
    ("Residual scaling controls the norm of the stream, at next to no cost", "4·L·D parameters, L = 80 joins",
     "04_residual_scaling", "residual_scaling", "kinds",
     [("log of the last layer's norm", "residual scaling", "plain residual")]),
    ("Answer-preserving trimming learns from traces that do not fit", "no numbers", "05_answer_preserving_trimming",
     "trimming", "arms",
     [("right after short", "AP trimming", "cut the end"), ("right after short", "AP trimming", "cut the middle"),
      ("right after short", "AP trimming", "drop long"), ("right after long", "AP trimming", "cut the end"),
      ("right after long", "AP trimming", "cut the middle"), ("right after long", "AP trimming", "drop long")]),
    ("DPPO's mask learns more than PPO's clip", "no numbers", "06_sft_and_rl", "rl_parts", "arms",
     [("pass@1", "recipe", "PPO clip"), ("pass@1", "stale", "stale, PPO clip")]),
    ("MaxRL's advantage learns more than GRPO's", "no numbers", "06_sft_and_rl", "rl_parts", "arms",
     [("pass@1", "recipe", "GRPO")]),
    ("… and only with a model trained for it", "Qwen3-4B gains much less", "07_markovian_rsa", "markovian_rsa", None,
     [("gain of two rounds", "own rows", "no rows"), ("gain of two rounds", "own rows", "one candidate")]),
]


def line(claim, published, measured, seeds, held, notebook, opposite=False):
    """A row of the table; held: how many of the measured effects are as claimed."""
    verdict = "reproduced" if held == len(measured) else "partly" if held else "not at this scale"
    verdict += ": the opposite" if opposite else ""
    return [claim, published, "; ".join(measured), seeds, f"**{verdict}**",
            f"[{notebook}.ipynb](notebooks/{notebook}.ipynb)"]


def row(claim, published, notebook, experiment, group, effects):
    seeds = arms.read_results(experiment)
    if group:
        seeds = list(map(of(group), seeds))
    measured, held, opposite = [], 0, False
    for what, name, other in effects:
        measure, claimed = MEASURES[what]
        found = arms.compare(seeds, measure, name, other)
        _, low, high = arms.interval(found)
        held += min(claimed * low, claimed * high) > 0
        opposite |= max(claimed * low, claimed * high) < 0
        measured.append(f"{what}, {name} minus {other}, {arms.paired(found)}")
    return line(claim, published, measured, len(seeds), held, notebook, opposite)


def markovian_rsa_row():
    """Here the intervals are over the problems of one seed, and those of the rivals must not touch it in any."""
    results, measured, held = arms.read_results("markovian_rsa"), [], 0
    for when, key in (("after sft", "sft"), ("finished", "ttc")):
        for rows in zip(*map(of(key), results)):                # one problem set, a row for each seed
            task, apart = rows[0]["task"], 0
            if task == "column_sums":                           # never aggregated in training
                continue
            for row in rows:
                for rival in ("single", "maj@equal_tokens"):
                    apart += row["markovian_rsa_ci95"][0] > row[rival + "_ci95"][1]
            ours, single, vote = np.mean([(r["markovian_rsa"], r["single"], r["maj@equal_tokens"]) for r in rows], 0)
            measured.append(f"{task} at {rows[0]['difficulty']}, {when} {ours:.2f}, one sample {single:.2f}, "
                            f"the vote {vote:.2f}, apart in {apart} of {2 * len(rows)}")
            held += apart == 2 * len(rows)
    claim = "Markovian RSA beats one sample and the vote"
    return line(claim, "AIME'25 88.3 to 91.9", measured, len(results), held, "07_markovian_rsa")


def table():
    head = "claim", "published", "measured: mean over seeds [95 % interval]", "seeds", "verdict", "notebook"
    *others, codesign = starmap(row, CLAIMS)
    return arms.markdown([head, *others, markovian_rsa_row(), codesign])


if __name__ == "__main__":
    print(table())
