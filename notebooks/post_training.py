"""The comparisons behind the README's post-training table: what each RL stage adds, beside its control.

    python train.py --seed 1 --out out/seed-1                    # once a seed
    python notebooks/post_training.py out/seed-1                 # writes notebooks/results/post_training/seed-1.json
    python notebooks/post_training.py --table                    # the table, over all seeds that are there

Controls, each from the run's own checkpoints: the seconds of warmup + rlve + mathcode spent on more SFT instead; rlve
with its difficulty held where it began; the behavioral stage without the gate before its reward model.
"""
import argparse
import dataclasses
import glob
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402

RESULTS = os.path.join(ROOT, "notebooks", "results", "post_training")
ASKED = list(train.REASONING)


def load(run, stage):
    model, tokenizer, state = train.load_checkpoint(os.path.join(run, stage), "cpu")
    return model, tokenizer, state


def config_of(run, report, out):
    """The run's own settings, with another folder."""
    config = train.parse_arguments(["--preset", report["preset"], "--seed", str(report["seed"]),
                                    "--out", os.path.join(run, out)])[0]
    if train.settings(config) != load(run, "behavior")[2]["settings"]:
        raise SystemExit(f"{run} was not made with the settings of --preset {report['preset']}: nothing to compare")
    os.makedirs(config.out, exist_ok=True)
    return config


def more_sft(run, report):
    """From sft's end, as many seconds of SFT as the RL stages took; other samples, the peak rate anew."""
    config = config_of(run, report, "control-sft")
    stage = train.stage_settings(config, "sft")
    seconds = sum(report["seconds"][name] for name in ("warmup", "rlve", "mathcode"))
    stage = dataclasses.replace(stage, steps=int(stage.steps * seconds / report["seconds"]["sft"]))
    model, tokenizer, _ = load(run, "sft")
    state = train.run_stage("sft", dataclasses.replace(config, seed=config.seed + 1000), stage, model, tokenizer, None,
                            "cpu", torch.float32)
    result = train.pass_at_1(model, tokenizer, list(train.TASKS), config.eval_problems, config.eval_samples)
    return {"steps": stage.steps, "seconds": state["seconds"], **result}


def fixed_difficulty(run, report):
    """rlve again with the difficulty held; both asked at two to four levels above where they began."""
    config = config_of(run, report, "control-rlve")
    stage = train.stage_settings(config, "rlve")
    model, tokenizer, _ = load(run, "warmup")
    state = train.run_rl("rlve", config, stage, model, tokenizer, None, "cpu", torch.float32,
                         adapt=lambda d, solve_rate: d)
    start, rates = report["stages"]["rlve"]["start"], {}
    assert start == state["start"], "the control began elsewhere"
    harder = [problem for task in ASKED for problem in
              train.held_out_problems([task], 30, tuple(start[task] + more for more in (2, 3, 4)))]
    models = {"before": load(run, "warmup")[0], "fixed": model, "adaptive": load(run, "rlve")[0]}
    for name, each in models.items():
        solved = train.solve_rates(each, tokenizer, harder, 4)
        rates[name] = {"pass@1": float(solved.mean()), "ci95": train.interval(solved),
                       "tasks": {task: float(solved[[p.task == task for p in harder]].mean()) for task in ASKED}}
    return {"seconds": state["seconds"], **rates}


def without_gate(run, report):
    """behavior again, its reward not gated; both judged by the reward model, and by the checker."""
    config = config_of(run, report, "control-behavior")
    stage = train.stage_settings(config, "behavior")
    model, tokenizer, _ = load(run, "mathcode")
    state = train.run_rl("behavior", config, stage, model, tokenizer, None, "cpu", torch.float32,
                         gate=lambda group: [1] * len(group.texts))
    before = load(run, "mathcode")[0]
    judge = train.RewardModel(before).eval()
    judge.load_state_dict(load(run, "behavior")[2]["judge"])
    problems = train.held_out_problems(["constraints"], 60, (1, 2, 3, 4))
    result = {"seconds": state["seconds"]}
    for name, each in {"before": before, "gated": load(run, "behavior")[0], "not gated": model}.items():
        texts = train.reply(each, tokenizer, [p.prompt for p in problems for _ in range(4)], 160, 0)
        pairs = list(zip([p for p in problems for _ in range(4)], texts))
        task = train.find_task("constraints")
        obeys = np.array([task.verify(p, text)[0] for p, text in pairs]).reshape(len(problems), 4).mean(1)
        with torch.no_grad():
            score = judge([train.conversation(tokenizer, p, text) for p, text in pairs]).sigmoid().mean().item()
        result[name] = {"reward model": score, "obeys": float(obeys.mean()), "ci95": train.interval(obeys),
                        "example": pairs[0][0].prompt + " -> " + pairs[0][1]}
    return result


def replay(run):
    """Means over the log of each RL stage: expert flips, sampler-trainer KL with the replay and without."""
    rows = train.read_log(run)
    return {stage: {key: float(np.mean([float(row[key]) for row in rows if row["stage"] == stage and row[key]] or [0]))
                    for key in ("flips", "kl", "kl_live", "staleness", "rollouts_per_second")}
            for stage in train.STAGES[3:]}


def measure(run):
    with open(os.path.join(run, "report.json")) as file:
        report = json.load(file)
    os.makedirs(RESULTS, exist_ok=True)
    path = os.path.join(RESULTS, f"seed-{report['seed']}.json")
    result = {"command": f"python notebooks/post_training.py {run}", "report": report, "replay": replay(run)}
    for name, compare in (("more sft", more_sft), ("fixed difficulty", fixed_difficulty), ("no gate", without_gate)):
        result[name] = compare(run, report)
        train.write_json(path, result)
        print(f"{name}: {result[name]}", flush=True)


def table():
    """The markdown table over all seeds: mean, and each seed's number."""
    results = []
    for path in sorted(glob.glob(os.path.join(RESULTS, "seed-*.json"))):
        with open(path) as file:
            results.append(json.load(file))

    asked = list(results[0]["fixed difficulty"]["before"]["tasks"])             # what RL asked when they were made
    guessers = [name for name, task in train.TASKS.items() if not task.exact]   # imitating their teachers is capped
    searched = [task for task in asked if task in guessers]

    def over_tasks(stage, key="tasks", tasks=asked):
        return [np.mean([stage(r)[key][task] for task in tasks]) for r in results]

    def row(what, values, form="{:.3f}"):
        values = [float(v) for v in values]
        spread = f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
        return f"| {what} | {form.format(np.mean(values))}{spread} | {', '.join(map(form.format, values))} |"

    def stage(name):
        return lambda r: r["report"]["stages"][name]

    lines = ["| measured on held-out problems | mean (± sd over seeds) | each seed |", "|---|---|---|"]
    for name in ("sft", "warmup", "rlve", "mathcode", "behavior"):
        lines.append(row(f"pass@1 over the {len(asked)} RL tasks, after `{name}`", over_tasks(stage(name))))
    lines += [row("… greedy, after `sft`", over_tasks(stage("sft"), "greedy_tasks")),
              row("… greedy, after `mathcode`", over_tasks(stage("mathcode"), "greedy_tasks")),
              row("control: the same seconds on more SFT", over_tasks(lambda r: r["more sft"])),
              row("… greedy", over_tasks(lambda r: r["more sft"], "greedy_tasks")),
              row(f"the {len(searched)} of them whose teacher searches, after `sft`",
                  over_tasks(stage("sft"), tasks=searched)),
              row("… after `mathcode`", over_tasks(stage("mathcode"), tasks=searched)),
              row("… control: the same seconds on more SFT", over_tasks(lambda r: r["more sft"], tasks=searched)),
              row("tasks kept out of RL, after `sft`", over_tasks(stage("sft"), tasks=("base", "path"))),
              row("tasks kept out of RL, after `mathcode`", over_tasks(stage("mathcode"), tasks=("base", "path"))),
              row("environments whose difficulty rose by 3 or more in `rlve`",
                  [sum(s["end"][t] - s["start"][t] >= 3 for t in s["start"]) for s in map(stage("rlve"), results)],
                  "{:.0f}"),
              row("2-4 levels above the start: before `rlve`", [r["fixed difficulty"]["before"]["pass@1"]
                                                                for r in results]),
              row("… after `rlve`", [r["fixed difficulty"]["adaptive"]["pass@1"] for r in results]),
              row("… after as many steps at fixed difficulty", [r["fixed difficulty"]["fixed"]["pass@1"]
                                                                for r in results])]
    for key, what in (("obeys", "replies that obey all rules"), ("reward model", "reward model's score")):
        for name in ("before", "gated", "not gated"):
            lines.append(row(f"{what}, `behavior` {name}", [r["no gate"][name][key] for r in results]))
    for key, what in (("flips", "expert choices that differ from the sampler's, without replay"),
                      ("kl", "sampler-trainer KL per token, with replay"), ("kl_live", "… without replay")):
        lines.append(row(what, [np.mean([s[key] for s in r["replay"].values()]) for r in results], "{:.2g}"))
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help="finished runs of train.py")
    parser.add_argument("--table", action="store_true", help="print the table over all seeds measured so far")
    arguments = parser.parse_args()
    for folder in arguments.run:
        measure(folder)
    if arguments.table:
        table()
