"""What the experiments share: seeds that go on where they stopped, one training loop, paired intervals, one table.

    python notebooks/experiments/router.py               # the tables, over the seeds in notebooks/results/router
    python notebooks/experiments/router.py --seeds 3     # first measures what seeds 0, 1 and 2 lack

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


def read_results(name, group=None):
    """What results/<name>/seed-*.json hold; group: only those seeds that lack no arm which another seed has there."""
    results = [read_json(path) for path in sorted(glob.glob(os.path.join(RESULTS, name, "seed-*.json")))]
    if not results:
        raise SystemExit(f"{RESULTS}/{name} has no seed yet: notebooks/experiments/{name}.py -h says how to get one")
    if group:
        most = max(len(result[group]) for result in results)
        results = [result for result in results if len(result[group]) == most]
    return results


class Seed:
    """results/<name>/seed-N.json: whatever it lacks is measured and written at once, so a stopped run loses one arm.

    group: the key under which the arms stand; None: they are keys of the file.  run: the finished run measured.
    settings: what the numbers depend on.  A file that was made with other settings is refused, not mixed with new ones.
    """

    def __init__(self, name, seed, group="arms", run=None, **settings):
        self.path, self.seed = os.path.join(RESULTS, name, f"seed-{seed}.json"), seed
        command = run or f"--seeds {seed + 1} --steps {settings['steps']}"
        settings = json.loads(json.dumps({"seed": seed, **settings}))               # tuples as a file gives them back
        self.result = {"command": f"python notebooks/experiments/{name}.py {command}", **settings}
        if os.path.exists(self.path):
            self.result = read_json(self.path)
        for key, value in settings.items():
            if self.result.get(key, value) != value:
                raise SystemExit(f"{self.path} was made by `{self.result['command']}` with another {key!r}: move it "
                                 "away to measure this seed anew, or ask for the same settings")
        self.arms = self.result if group is None else self.result.setdefault(group, {})

    def missing(self, names):
        """The arms still to be measured; the body of the loop adds each."""
        for name in names:
            if name not in self.arms:
                begun = time.perf_counter()
                yield name
                print(f"seed {self.seed}, {name}: {time.perf_counter() - begun:.0f} s", flush=True)

    def add(self, name, row, **beside):
        """Keep an arm's row, and what else belongs beside the arms."""
        self.arms[name] = row
        self.result.update(beside)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        write_json(self.path, self.result)                      # to a temporary name, then renamed


class Setting(NamedTuple):
    """What the arms of a seed share."""
    config: object
    stage: train.Stage
    tokenizer: object
    sources: list
    shape: ZayaConfig


def prepare(preset, seed, steps, **shape):
    """train.py's pretraining stage at this preset, on its own data, with a model of another shape."""
    config = train.parse_arguments(["--preset", preset, "--seed", str(seed), "--steps", str(steps)])[0]
    stage, tokenizer = train.stage_settings(config, "pretrain"), train.make_tokenizer(config, None)
    shape = ZayaConfig.preset(preset, vocab_size=tokenizer.vocab_size, **shape)
    shape.rope_parameters["hybrid"]["rope_theta"] = stage.rope_theta
    return Setting(config, stage, tokenizer, train.make_sources(config, stage, tokenizer), shape)


def practise(model, config, stage, loader, balancer=None, name="training", **more):
    """One supervised stage without files -> for each step its batch (rows, context) and its row of the log."""
    optimizers = train.make_optimizers(model, stage.lr, weight_decay=0.1)
    balancer = balancer or PIDBalancer(model, config.balancer_lr)
    for step in tqdm(range(stage.steps), desc=name, unit=" steps", leave=False, disable=None):
        batch, lr = loader.next(), train.learning_rate(step, stage.steps, stage.lr, stage.lr_end)
        yield batch, train.train_step(model, optimizers, balancer, batch[:3], config, torch.float32, lr, **more)


def pretrain(model, setting, **more):
    """`practise` on the setting's sources -> the rows of the log."""
    config, stage, tokenizer, sources, _ = setting
    loader = train.Loader(sources, stage, config.tokens_per_step, config.seed, tokenizer.pad)
    for _, row in practise(model, config, stage, loader, **more):
        yield row


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


def interval(differences):
    """Mean and 95 % interval over seeds of paired differences, by Student's t; one seed has no interval.

    >>> [round(float(x), 3) for x in interval([0.1, 0.2, 0.3])]
    [0.2, -0.048, 0.448]
    """
    count, mean = len(differences), float(np.mean(differences))
    if count < 2:
        return mean, -np.inf, np.inf
    half = STUDENT.get(count, 2.306) * float(np.std(differences, ddof=1)) / count ** 0.5
    return mean, mean - half, mean + half


def paired(differences, form="+.3f"):
    """'+0.012 [-0.003, +0.027]': the interval in words."""
    mean, low, high = (format(number, form) for number in interval(differences))
    return f"{mean} [{low}, {high}]" if len(differences) > 1 else f"{mean} (one seed)"


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


def table(results, bases, columns, group="arms"):
    """Markdown, a row for each arm, over its seeds.

    columns: {head: (measure(arm), form)}.  bases: {arm: the arm that it is a change of, or None}: how the first measure
    differs from that arm's, paired by seed, is the last column.
    """
    (head, (first, _)), *_ = columns.items()
    rows = [["", *columns, f"{head} minus [95 %]"]]
    for name, base in bases.items():
        if name not in results[0][group]:                       # of a seed that was stopped
            continue
        row = [name]
        for measure, form in columns.values():
            row.append(by_seed([measure(result[group][name]) for result in results], form))
        if base in results[0][group]:
            differences = [first(result[group][name]) - first(result[group][base]) for result in results]
            row.append(f"{base}: {paired(differences)}")
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return markdown(rows)


def main(description, tables, measure=None, runs=False, steps=None):
    """measure(seed, steps), or measure(run) for finished runs of train.py, of all that is asked; then the tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if runs:
        parser.add_argument("runs", nargs="*", help="folders of finished runs of train.py to measure")
    elif measure:
        parser.add_argument("--seeds", type=int, default=0, help="measure what seeds 0 … N-1 lack")
        parser.add_argument("--steps", type=int, default=steps, help=f"of training; {steps} in the stored results")
    given = parser.parse_args()
    for run in given.runs if runs else ():
        measure(run)
    for seed in range(getattr(given, "seeds", 0)):
        measure(seed, given.steps)
    print(tables())
