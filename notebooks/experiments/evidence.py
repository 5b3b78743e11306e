"""notebooks/results/EVIDENCE.md: a row for each claim of the reports, and below it what was measured.

    python notebooks/experiments/evidence.py    # worked out from the files in notebooks/results

A verdict is a rule and no opinion: every effect of the row must have the claimed sign and a 95 % interval over seeds
(Student's t) that leaves 0 out; some of them make it "partly", none "not at this scale"; one on the other side of 0 is
called the opposite.  A row is "open" before three seeds have been measured.  Of Markovian RSA and its rivals the effect
is the difference from the better rival, over runs, and beside it stands in how many runs its interval over the problems
is above theirs.  Until a fifth whole run failed, the rule for these rows was: above in every run.  That run, seed 0
with one thread, is in the row of equal tokens; the two rows below it are of three of the others.
"""
import os
import sys

import arms
import cca
import markovian_rsa
import numpy as np
import residual_scaling
import rl_parts
import router
import runs
import trimming
from arms import of

PATH = os.path.join(arms.RESULTS, "EVIDENCE.md")


def steps_to_even(arm):
    return arm["reached"]["0.99"] or 300                        # never: at least as many as there were


def recalled(arm):
    """Mean accuracy over the drills."""
    return float(np.mean(list(arm["drills"].values())))


# What is measured on an arm, and whether a claim says that it is more (+1) or less (-1) than on the other arm.
MEASURES = {"loss": (arms.loss, -1), "drills": (recalled, 1), "steps to 0.99": (steps_to_even, -1),
            "entropy": (of("end", "entropy"), 1), "pass@1": (of("pass@1"), 1),
            "log of the last layer's norm": (lambda arm: np.log(residual_scaling.last_norm(arm)), -1),
            "right after short": (of("after short", "longer", "right"), 1),
            "right after long": (of("after long", "longer", "right"), 1)}
CLAIMS = [                      # (claim, published, notebook, experiment, effects)
    ("CCGQA: a lower loss than MHA with an eighth of the cache", "2.286 and 2.297", "02_cca", "cca",
     [("loss", "+ q-k-mean", "MHA")]),
    ("Each part of CCA lowers the loss", "-0.016, -0.012, -0.004, -0.007", "02_cca", "cca",
     [("loss", "one conv", "nothing"), ("loss", "two convs", "one conv"), ("loss", "+ value shift", "two convs"),
      ("loss", "+ q-k-mean", "+ value shift")]),
    ("Recall and copying ask for a convolution", "no numbers", "02_cca", "cca",
     [("drills", "one conv", "nothing"), ("drills", "canon", "nothing"), ("drills", "+ q-k-mean", "nothing")]),
    ("An MLP router with EDA evens the load several times sooner", "several times",
     "03_router_and_balancing", "router", [("steps to 0.99", "MLP + EDA", "linear")]),
    ("The PID-like bias update balances without an auxiliary loss", "no auxiliary loss", "03_router_and_balancing",
     "router", [("entropy", "MLP + EDA", "no balancing"), ("entropy", "MLP + EDA", "auxiliary loss")]),
    ("Top-1 without a residual expert is best at equal FLOPs", "no numbers", "03_router_and_balancing", "router",
     [("loss", "MLP + EDA", "top-2"), ("loss", "MLP + EDA", "residual expert")]),
    ("Residual scaling controls the stream's norm nearly for free", "4·L·D parameters, L = 80 joins",
     "04_residual_scaling", "residual_scaling",
     [("log of the last layer's norm", "residual scaling", "plain residual")]),
    ("Answer-preserving trimming learns from traces too long to fit", "no numbers", "05_answer_preserving_trimming",
     "trimming",
     [("right after short", "AP trimming", "cut the end"), ("right after short", "AP trimming", "cut the middle"),
      ("right after short", "AP trimming", "drop long"), ("right after long", "AP trimming", "cut the end"),
      ("right after long", "AP trimming", "cut the middle"), ("right after long", "AP trimming", "drop long")]),
    ("RL learns on where a searching teacher caps SFT, in equal seconds", "no numbers",
     "06_sft_and_rl", "rl_parts", [("pass@1", "recipe", "SFT"), ("pass@1", "recipe", "more SFT")]),
    ("MaxRL's advantage learns more than GRPO's", "no numbers", "06_sft_and_rl", "rl_parts",
     [("pass@1", "recipe", "GRPO")]),
    ("DPPO's mask learns more than PPO's clip (bf16 sampler, lag 8)", "no numbers",
     "06_sft_and_rl", "rl_parts", [("pass@1", "bf16, lag 8", "bf16, lag 8, PPO clip")]),
    ("Replaying the sampler's experts learns more (bf16 sampler, lag 8)", "no numbers",
     "06_sft_and_rl", "rl_parts", [("pass@1", "bf16, lag 8", "bf16, lag 8, no replay")]),
]


def line(claim, published, measured, results, held, notebook, opposite=False):
    """A row of the table, of one result a seed or run; held: how many of the measured effects are as claimed."""
    verdict = "reproduced" if held == len(measured) else "partly" if held else "not at this scale"
    verdict += ": the opposite" if opposite else ""
    if len(results) < 3:
        verdict = "open"
    return [claim, published, "; ".join(measured), len(results), f"**{verdict}**", f"[{notebook}](../{notebook}.ipynb)"]


def row(claim, published, notebook, experiment, effects):
    results, measured, held, opposite = arms.read_results(experiment), [], 0, False
    seeds = list(map(of("arms"), results))
    for what, name, other in effects:
        measure, claimed = MEASURES[what]
        found = arms.compare(seeds, measure, name, other)
        _, low, high = arms.interval(found)
        held += min(claimed * low, claimed * high) > 0
        opposite |= max(claimed * low, claimed * high) < 0
        measured.append(f"{what}, {name} minus {other}, {arms.paired(found)}")
    return line(claim, published, measured, results, held, notebook, opposite)


def beats(row, rival):
    """Markovian RSA's interval over the problems is above the rival's."""
    return row["ci95"]["markovian_rsa"][0] > row["ci95"][rival][1]


def against_rivals(task, rows, rivals, above):
    """-> whether Markovian RSA is above the better of its rivals over runs, and the sentence that says so."""
    better = [row["markovian_rsa"] - max(row[rival] for rival in rivals) for row in rows]
    said = f"{task}: {np.mean([row['markovian_rsa'] for row in rows]):.2f}"
    for rival in rivals:
        said += f", {'one sample' if rival == 'single' else 'the vote'} {np.mean([row[rival] for row in rows]):.2f}"
    return arms.interval(better)[1] > 0, f"{said}, above by {arms.paired(better)}, in {above} of {len(rows)} runs"


def equal_tokens_row(found):
    """Of the finished models; column_sums, which is asked because the vote wins there, is in the details."""
    measured, held, by_task = [], 0, {}
    for row in (row for run in found for row in run["ttc"] if row["after"] == "final" and row["task"] != "column_sums"):
        by_task.setdefault(f"{row['task']} at {row['difficulty']}", []).append(row)
    for task, rows in by_task.items():
        above = sum(beats(row, "single") and beats(row, "vote") for row in rows)
        well, said = against_rivals(task, rows, ("single", "vote"), above)
        held += well
        measured.append(said)
    return line("Markovian RSA beats one sample and the vote of as many tokens", "AIME'25 88.3 to 91.9", measured,
                found, held, "07_markovian_rsa")


def equal_seconds_row(results):
    measured, held = [], 0
    for rows in zip(*map(of("seconds"), results)):
        if rows[0]["task"] == "column_sums":
            continue
        above = sum(row["markovian_rsa_ci95"][0] > row["vote_ci95"][1] for row in rows)
        well, said = against_rivals(f"{rows[0]['task']} at {rows[0]['difficulty']}", rows, ("vote",), above)
        held += well
        measured.append(said)
    return line("… and the vote of about as many seconds", "no numbers", measured, results, held,
                "07_markovian_rsa")


def codesign_row(results):
    measured, held = [], 0
    for task in results[0]["rounds"]["own rows"]:
        more = []
        for rounds in map(of("rounds"), results):
            gain = {name: rounds[name][task][-1] - rounds[name][task][0] for name in ("own rows", "no rows")}
            more.append(gain["own rows"] - gain["no rows"])
        held += arms.interval(more)[1] > 0
        measured.append(f"{task}, gain of two rounds, own rows minus no rows, {arms.paired(more)}")
    return line("… and only with a model trained for it", "Qwen3-4B gains much less", measured, results,
                held, "07_markovian_rsa")


def about(module):
    """What a script says of itself below its commands."""
    return module.__doc__.split("\n\n")[2].strip()


def of_seeds(results):
    """Which seeds, with which arithmetic."""
    return ", ".join(f"seed {result['seed']} ({result['arithmetic']})" for result in results)


def every_stage(found):
    """Markdown: the share of Markovian RSA's last round that is right after each stage, mean and range over runs."""
    tasks = list(found[0]["reads"]["sft"])
    rows = [["after", *tasks]]
    for stage in found[0]["reads"]:
        rows.append([stage])
        for task in tasks:
            first, last = (np.array([run["reads"][stage][task][t] for run in found]) for t in (0, -1))
            rows[-1].append(f"{first.mean():.2f} → {last.mean():.2f} ({last.min():.2f} to {last.max():.2f})")
    return arms.markdown(rows)


def text():
    head = "claim", "published", "measured: mean [95 % interval]", "seeds or runs", "verdict", "notebook"
    whole, results = arms.read_json(runs.PATH), arms.read_results("markovian_rsa")
    rows = [head, *(row(*claim) for claim in CLAIMS), equal_tokens_row(whole), equal_seconds_row(results),
            codesign_row(results)]
    parts = ["# Evidence", "Made by `python notebooks/experiments/evidence.py`.", about(sys.modules[__name__]),
             arms.markdown(rows)]
    for title, module, name in (("CCA", cca, "cca"), ("Routers and balancers", router, "router"),
                                ("Residual scaling", residual_scaling, "residual_scaling"),
                                ("… three times as long", residual_scaling, "residual_scaling_long"),
                                ("Trimming", trimming, "trimming"), ("Parts of RL", rl_parts, "rl_parts")):
        stored = arms.read_results(name)
        told = f"`notebooks/experiments/{module.__name__}.py`, {stored[0]['steps']} steps: {of_seeds(stored)}."
        parts += [f"## {title}", about(module), told, arms.table(stored, module.ARMS, module.COLUMNS)]
    parts += ["## Markovian RSA", about(markovian_rsa),
              f"`notebooks/experiments/markovian_rsa.py`: {of_seeds(results)}.", markovian_rsa.tables(),
              "After every stage, share right with one sample → after two rounds, mean (range) over the whole runs, on "
              "12 problems:", every_stage(whole), "## Whole runs", "`notebooks/experiments/runs.py`.",
              runs.table(whole)]
    return "\n\n".join(parts) + "\n"


def main():
    with open(PATH + ".tmp", "w", encoding="utf-8") as file:
        file.write(text())
    os.replace(PATH + ".tmp", PATH)
    print(os.path.relpath(PATH, arms.ROOT))


if __name__ == "__main__":
    main()
