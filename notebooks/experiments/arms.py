"""What the experiments share: one training loop, paired intervals, one table, one command line.

    python notebooks/experiments/router.py               # the table, over the seeds in notebooks/results/router
    python notebooks/experiments/router.py --seeds 2     # first measures those of seeds 0 and 1 that are not there
    ATEN_CPU_CAPABILITY=default python notebooks/experiments/router.py --seeds 3    # and 2 with other arithmetic

An experiment has arms, one change each.  The arms of a seed share first weights, batches and rates, so that what
differs between two of them is paired by seed.
"""
import argparse
import glob
import json
import os
import sys
import time
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)        # for this import and for those of whoever imports arms first

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from zaya import PIDBalancer, ZayaConfig, write_json  # noqa: E402

RESULTS = os.path.join(ROOT, "notebooks", "results")
# The 97.5 % quantile of Student's t by the number of seeds; from 9 seeds on 2.306, which is a little too wide.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_results(name):
    """What results/<name>/seed-*.json hold, one dict for each seed."""
    return list(map(read_json, sorted(glob.glob(os.path.join(RESULTS, name, "seed-*.json")))))


def write_result(name, seed, **result):
    """results/<name>/seed-N.json, with the command that made it, and the arithmetic: the CPU's vector instructions."""
    folder = os.path.join(RESULTS, name)
    os.makedirs(folder, exist_ok=True)
    arithmetic = torch.backends.cpu.get_cpu_capability().lower()
    result = {"command": "python " + " ".join(sys.argv), "seed": seed, "arithmetic": arithmetic, **result}
    write_json(os.path.join(folder, f"seed-{seed}.json"), result)


class Setting(NamedTuple):
    """What the arms of a seed share."""
    config: train.TrainConfig
    stage: train.Stage
    tokenizer: object
    sources: list
    shape: ZayaConfig | None = None


def prepare(seed, steps, preset="tiny", **shape):
    """train.py's pretraining stage at this preset, on its own data, with a model of another shape."""
    config = train.parse_arguments(["--preset", preset, "--seed", str(seed), "--steps", str(steps)])[0]
    stage, tokenizer = train.stage_settings(config, "pretrain"), train.make_tokenizer(config, None)
    shape = ZayaConfig.preset(preset, vocab_size=tokenizer.vocab_size, **shape)
    shape.rope_parameters["hybrid"]["rope_theta"] = stage.rope_theta
    return Setting(config, stage, tokenizer, train.make_sources(config, stage, tokenizer, config.seed), shape)


def practise(model, setting, balancer=None, name="training", **more):
    """The setting's stage without files -> yields each step's row of the log.  more: as in train.train_step."""
    config, stage, tokenizer, sources, _ = setting
    loader = train.Loader(sources, stage, config.tokens_per_step, config.seed, tokenizer.pad)
    optimizers = train.make_optimizers(model, stage.lr, weight_decay=0.1)
    balancer = balancer or PIDBalancer(model, config.balancer_lr)
    for step in tqdm(range(stage.steps), desc=name, unit=" steps", leave=False, disable=None):
        batch, lr = loader.next()[:3], train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
        yield train.train_step(model, optimizers, balancer, batch, config, torch.float32, lr, **more)


def held_out(model, setting):
    """{source: loss in nats a token} on held-out English, code and problems."""
    _, stage, tokenizer, sources, _ = setting
    return train.held_out_loss(model, sources, stage, tokenizer.pad)


def of(*keys):
    """-> a measure of an arm: what stands under these keys; None if that is not there."""
    def measure(arm):
        for key in keys:
            arm = arm.get(key, {})
        return None if arm == {} else arm
    return measure


def loss(arm):
    """An arm's mean loss over the held-out sources."""
    return float(np.mean(list(arm["held out"].values())))


def compare(seeds, measure, arm, other):
    """What `measure` says of one arm minus what it says of another, seed by seed."""
    return [measure(seed[arm]) - measure(seed[other]) for seed in seeds]


def interval(differences):
    """Mean and 95 % interval over seeds of paired differences, by Student's t; endless for one seed.

    >>> [round(float(x), 3) for x in interval([0.1, 0.2, 0.3])]
    [0.2, -0.048, 0.448]
    """
    count, mean = len(differences), float(np.mean(differences))
    half = np.inf
    if count > 1:
        half = STUDENT.get(count, 2.306) * float(np.std(differences, ddof=1)) / count ** 0.5
    return mean, mean - half, mean + half


def paired(differences):
    """'+0.012 [-0.003, +0.027]': the interval in words."""
    mean, low, high = interval(differences)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def by_seed(numbers, form=".3f"):
    """'0.553 (0.545, 0.561)': the mean, and each seed's number; just these where one is missing, or one for all."""
    each = ["-" if number is None else format(number, form) for number in numbers]
    if len(set(each)) == 1:
        return each[0]
    return ", ".join(each) if None in numbers else f"{np.mean(numbers):{form}} ({', '.join(each)})"


def markdown(rows):
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def table(results, bases, columns):
    """Markdown, a row for each arm, over its seeds.

    columns: {head: (measure(arm), form)}.  bases: {arm: the arm that it is a change of, or None}: how the first measure
    differs from that arm's, paired by seed, is the last column.
    """
    (head, (first, _)), *_ = columns.items()
    rows, seeds = [["", *columns, f"{head} minus [95 %]"]], list(map(of("arms"), results))
    for arm, base in bases.items():
        if any(name and name not in seed for seed in seeds for name in (arm, base)):
            continue                                            # not measured yet
        rows.append([arm])
        for measure, form in columns.values():
            rows[-1].append(by_seed([measure(seed[arm]) for seed in seeds], form))
        rows[-1].append(f"{base}: {paired(compare(seeds, first, arm, base))}" if base else "")
    return markdown(rows)


def main(description, name, prepare, measure, bases, columns, steps):
    """Command line of an experiment: measure(prepare(seed, steps), arm, {arm: row so far}) each arm of the seeds that
    are asked for and not there yet, then print the `table` of all seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=0, help="measure those of seeds 0 … N-1 that are not there")
    parser.add_argument("--steps", type=int, default=steps, help=f"of training; {steps} in the stored results")
    parser.add_argument("--name", default=name, help=f"of the folder in results; {name} in the evidence")
    given = parser.parse_args()
    for seed in range(given.seeds):
        path = os.path.join(RESULTS, given.name, f"seed-{seed}.json")
        rows = read_json(path)["arms"] if os.path.exists(path) else {}
        missing = [arm for arm in bases if arm not in rows]
        setting = prepare(seed, given.steps) if missing else None
        for arm in missing:
            begun = time.perf_counter()
            rows[arm] = measure(setting, arm, rows)
            print(f"seed {seed}, {arm}: {time.perf_counter() - begun:.0f} s", flush=True)
            write_result(given.name, seed, steps=given.steps, arms=rows)
    results = read_results(given.name)
    print(table(results, bases, columns) if results else "no seed has been measured yet: --seeds 3 does")
