"""Train ZAYA1 from random weights: data, tasks, answer-preserving trimming, Muon, and the stages one after another.

    python train.py                     every stage at preset tiny, into out/tiny; goes on where it stopped
    python train.py --preset smoke      the same path in under a minute
    python train.py --data my.jsonl --out out/mine --stages pretrain,midtrain

TR sections III-IV: pretraining at a short context, then midtraining at a longer one with a larger RoPE base and mostly
long chains of thought, each trimmed so that the answer survives.  A run is a pure function of its settings and seed:
the data order has no hidden state, so a killed run goes on bit for bit.

Read in this order: settings, tasks, data (trim, pack, sources), Muon, run_stage, evaluation, main.
Does NOT include: SFT and the RL stages, more than one process.
"""
import argparse
import csv
import dataclasses
import difflib
import hashlib
import json
import math
import os
import random
import re
import shutil
import time
from dataclasses import dataclass, field

# Threads that wait asleep: on a busy machine spinning ones made a step 3 to 60 times slower, on an idle one they gain
# nothing.  It has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from zaya import PIDBalancer, Tokenizer, Zaya, ZayaConfig

# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What one stage trains on, and how long.  Lengths in tokens; `traces` is the share of reasoning traces."""
    steps: int
    context: int
    rope_theta: float
    traces: float
    lr: float
    lr_end: float
    difficulty: int                         # generated problems go up to this difficulty …
    turns: int                              # … and conversations up to this many problems
    mask_prompts: bool = False              # only what the assistant says counts in the loss


STAGES = ["pretrain", "midtrain"]
# lr: one value for Muon and AdamW, whose update sizes are matched.  balancer_lr: AMD Primus' 1e-3 at full size; a run
# of a thousand steps needs larger ones.  zaya1-8b has the report's own contexts, bases and rates (TR section III), but
# not its 13.2T tokens.
PRESETS = {
    "smoke": dict(
        tokens_per_step=1024, text_bytes=300_000, balancer_lr=1e-2, eval_problems=4, eval_samples=2,
        stages=dict(pretrain=Stage(30, 128, 1e4, 0.5, 8e-3, 3e-3, 2, 1),
                    midtrain=Stage(15, 256, 1e5, 0.86, 3e-3, 1e-3, 4, 3))),
    "tiny": dict(
        tokens_per_step=2048, text_bytes=4_000_000, balancer_lr=5e-3, eval_problems=30, eval_samples=4,
        stages=dict(pretrain=Stage(800, 256, 1e4, 0.6, 1e-2, 4e-3, 4, 1),
                    midtrain=Stage(520, 1024, 1e5, 0.86, 6e-3, 1e-3, 8, 8))),
    "small": dict(
        tokens_per_step=131_072, text_bytes=400_000_000, balancer_lr=1e-3, eval_problems=100, eval_samples=4,
        stages=dict(pretrain=Stage(20_000, 1024, 1e4, 0.5, 2e-3, 6e-4, 8, 2),
                    midtrain=Stage(5_000, 4096, 1e6, 0.86, 6e-4, 2e-4, 16, 16))),
    "zaya1-8b": dict(
        tokens_per_step=4_194_304, text_bytes=10**12, balancer_lr=1e-3, eval_problems=100, eval_samples=4,
        stages=dict(pretrain=Stage(100_000, 4096, 1e4, 0.5, 6e-4, 2e-4, 8, 2),
                    midtrain=Stage(20_000, 32768, 1e6, 0.86, 2e-4, 1e-4, 32, 64))),
}


def option(default, help, group, type=None):
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata=dict(help=help, group=group, type=type))


@dataclass
class TrainConfig:
    """Every setting of a run; the command line is built from these fields.  None: the preset decides."""
    preset: str = option("tiny", "smoke, tiny, small or zaya1-8b: the model's shape and the stages' lengths", "run")
    stages: str = option(",".join(STAGES), "which stages, in this order", "run")
    out: str = option(None, "folder of the run, default out/<preset>; an existing run goes on", "run", str)
    seed: int = option(0, "seed of the weights, the data order and the sampled answers", "run")
    device: str = option("auto", "cpu, cuda (CUDA and ROCm alike) or mps", "run")
    dtype: str = option("auto", "float32 or bfloat16 (autocast; weights stay float32)", "run")
    data: list = option([], "your own .txt and .jsonl files, instead of the text that Python brings", "data")
    tasks: str = option("all", "generated reasoning problems: all, none, or names such as add,sort", "data")
    tokenizer: str = option(None, "a tiktoken encoding such as gpt2; default: train one on the data", "data", str)
    skip_bad_lines: bool = option(False, "skip and count unreadable lines of --data instead of stopping", "data")
    steps: dict = option(None, "optimizer steps: 500, or pretrain=500,midtrain=200", "training", int)
    context: dict = option(None, "tokens a sample may have, likewise per stage", "training", int)
    lr: dict = option(None, "peak learning rate, likewise per stage (0.2 x lr is an update's RMS)", "training", float)
    tokens_per_step: int = option(None, "tokens in one optimizer step", "training", int)
    micro_batch: int = option(None, "most tokens in one forward pass; a step adds up several", "training", int)
    weight_decay: float = option(0.1, "decoupled weight decay on matrices", "training")
    grad_clip: float = option(1.0, "largest gradient norm", "training")
    balancer_lr: float = option(None, "learning rate of the router's balancing biases", "training", float)
    log_every: int = option(20, "print a line every so many steps (log.csv gets them all)", "bookkeeping")
    save_every: int = option(100, "write a checkpoint every so many steps", "bookkeeping")
    eval_problems: int = option(None, "held-out problems per task", "bookkeeping", int)
    eval_samples: int = option(None, "sampled answers per held-out problem", "bookkeeping", int)


SHAPE_FLAGS = ["hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size", "vocab_size"]


def parse_stage_values(text, kind):
    """'5' -> {None: 5} for every stage;  'pretrain=5,midtrain=3' -> one each.

    >>> parse_stage_values("5", int), parse_stage_values("pretrain=5,midtrain=3", int)
    ({None: 5}, {'pretrain': 5, 'midtrain': 3})
    """
    values = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        if name and name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r} is no stage; there are {', '.join(STAGES)}")
        try:
            values[name or None] = kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} is not a {'whole ' * (kind is int)}number; write one for all "
                                             "stages, or pretrain=…,midtrain=…") from None
    return values


def parse_arguments(arguments):
    """Command line -> (TrainConfig, {ZayaConfig field: value}).  An unknown option is an error with the closest one."""
    parser = argparse.ArgumentParser(prog="python train.py", allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for setting in dataclasses.fields(TrainConfig):
        about = setting.metadata
        group = groups.setdefault(about["group"], None) or parser.add_argument_group(about["group"])
        groups[about["group"]] = group
        default = "" if setting.default in (None, False, dataclasses.MISSING) else f" (default {setting.default})"
        flag = "--" + setting.name.replace("_", "-")
        shown = {"help": about["help"] + default, "default": argparse.SUPPRESS}
        if setting.type is bool:
            group.add_argument(flag, action="store_true", **shown)
        elif setting.type is list:
            group.add_argument(flag, nargs="+", metavar="FILE", **shown)
        elif setting.type is dict:
            kind = about["type"]
            group.add_argument(flag, type=lambda text, kind=kind: parse_stage_values(text, kind), metavar="N", **shown)
        else:
            kind = about["type"] or setting.type
            group.add_argument(flag, type=kind, metavar={int: "N", float: "X"}.get(kind, "NAME"), **shown)
    shape = parser.add_argument_group("model shape (every integer of ZayaConfig works, these are the usual ones)")
    for setting in dataclasses.fields(ZayaConfig):
        if setting.type is int and not setting.name.endswith("token_id"):       # those are the tokenizer's
            shape.add_argument("--" + setting.name.replace("_", "-"), type=int, metavar="N", default=argparse.SUPPRESS,
                               help="" if setting.name in SHAPE_FLAGS else argparse.SUPPRESS)
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        parser.error(f"unknown option {unknown[0]}" + (f"; did you mean {close[0]}?" if close else "; see -h"))
    ours = {setting.name for setting in dataclasses.fields(TrainConfig)}
    values = vars(values)
    changes = {name: value for name, value in values.items() if name not in ours}
    return resolve(TrainConfig(**{name: value for name, value in values.items() if name in ours})), changes


def resolve(config):
    """Fill in what the preset decides, and check names."""
    if config.preset not in PRESETS:
        raise SystemExit(f"--preset {config.preset}: there are {', '.join(PRESETS)}")
    preset = PRESETS[config.preset]
    for name in config.stages.split(","):
        if name not in STAGES:
            close = difflib.get_close_matches(name, STAGES, 1, 0)
            raise SystemExit(f"--stages {config.stages}: no stage {name!r}; did you mean {close[0]}? "
                             f"There are {', '.join(STAGES)}")
    config.out = config.out or os.path.join("out", config.preset)
    for name in ("tokens_per_step", "balancer_lr", "eval_problems", "eval_samples"):
        if getattr(config, name) is None:
            setattr(config, name, preset[name])
    for name in ("steps", "context", "lr"):
        given = getattr(config, name) or {}
        setattr(config, name, {stage: given.get(stage, given.get(None, getattr(preset["stages"][stage], name)))
                               for stage in STAGES})
    config.micro_batch = config.micro_batch or max(16384, *config.context.values())
    least = dict(tokens_per_step=1, micro_batch=1, log_every=1, save_every=1, seed=0, eval_problems=0, eval_samples=0)
    values = [(name, getattr(config, name), limit) for name, limit in least.items()]
    values += [(name, value, 1 if name == "steps" else 2) for name in ("steps", "context")
               for value in getattr(config, name).values()]
    for name, value, limit in values:
        if value < limit:
            raise SystemExit(f"--{name.replace('_', '-')} {value} must be at least {limit}")
    for name in config.stages.split(","):
        context = config.context[name]
        if config.tokens_per_step % context or config.micro_batch < context:
            raise SystemExit(f"--tokens-per-step {config.tokens_per_step} must be a multiple of {name}'s context "
                             f"({context}), and --micro-batch {config.micro_batch} at least as long")
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise SystemExit(f"--device {config.device}: there are auto, cpu, cuda and mps")
    if len(set(config.data)) < len(config.data):
        raise SystemExit("--data names a file twice")
    return config


def stage_settings(config, name):
    """The preset's Stage with the command line's changes in it; the final rate keeps its ratio to the peak."""
    stage = PRESETS[config.preset]["stages"][name]
    lr = config.lr[name]
    return dataclasses.replace(stage, steps=config.steps[name], context=config.context[name], lr=lr,
                               lr_end=lr * stage.lr_end / stage.lr)


# ---- tasks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One problem: what the user asks, and the data that checks an answer (JSON only: a verifier keeps no state)."""
    task: str
    difficulty: int
    prompt: str
    data: dict


def split_answer(text):
    """A reply's answer: what stands after its one </think>, without the end token; None if the form is not kept.

    >>> split_answer("<think>7+5=12</think>12<|end|>"), split_answer("12"), split_answer("</think></think>1")
    ('12', None, None)
    """
    reasoning, tag, answer = text.partition("</think>")
    if not tag or "</think>" in answer or not reasoning.startswith("<think>"):
        return None
    return answer.removesuffix("<|end|>").strip()


class Task:
    """A family of problems: make(seed, d), verify(problem, text), solve(problem, seed), corrupt(problem, seed).

    A subclass gives `pose(rng, d)` -> (prompt, data); `reason(data, rng, slip)` -> (reasoning, answer), where each step
    goes wrong with probability `slip`; and `check(data, answer)` -> bool, total: any string gets a verdict.
    `exact`: the teacher always finds the answer; otherwise it searches honestly within a budget, and can fail.
    """
    exact = True

    def __init__(self, name):
        self.name = name

    def make(self, seed, d):
        """The same seed and difficulty (an integer from 1) give the same problem."""
        prompt, data = self.pose(random.Random(f"{self.name} {seed} {d}"), max(1, d))
        return Problem(self.name, d, prompt, data)

    def verify(self, problem, text):
        """(reward, format), 0 or 1 each, for any text."""
        answer = split_answer(text)
        if answer is None or len(answer) > 1000:
            return 0, 0
        return int(self.check(problem.data, answer)), 1

    def solve(self, problem, seed=0):
        """A worked reply by the teacher: <think>…</think>answer."""
        reasoning, answer = self.reason(problem.data, random.Random(f"solve {seed}"), 0.0)
        return f"<think>{reasoning}</think>{answer}"

    def corrupt(self, problem, seed=0):
        """A plausible reply with a wrong answer, by a teacher who slips."""
        rng = random.Random(f"corrupt {seed}")
        slip = 0.1
        while True:
            reasoning, answer = self.reason(problem.data, rng, slip)
            if not self.check(problem.data, answer):
                return f"<think>{reasoning}</think>{answer}"
            slip = min(1.0, slip + 0.1)


def slipped(value, rng, slip, base=10):
    """`value`, or with probability `slip` another number of as many digits."""
    if not slip or rng.random() >= slip:
        return value
    unit = rng.randrange(1, base)
    return value - value % base + (value + unit) % base


def labels(rng, count):
    """`count` letters in a row of the alphabet with a random start; after z comes A, then a again."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    start = rng.randrange(52)
    return [letters[(start + i) % 52] for i in range(count)]


class ColumnSums(Task):
    """The last digit of each column's sum; d columns.  One right answer, made of independent steps.

    sum 75c39d -> <think>c7+5=2d3+9=2#c2d2</think>c2d2
    """

    def pose(self, rng, d):
        columns = [[rng.randrange(10), rng.randrange(10), label] for label in labels(rng, d)]
        return "sum " + "".join(f"{a}{b}{label}" for a, b, label in columns), {"columns": columns}

    def reason(self, data, rng, slip):
        steps = [(label, a, b, slipped((a + b) % 10, rng, slip)) for a, b, label in data["columns"]]
        answer = "".join(f"{label}{total}" for label, _, _, total in steps)
        return "".join(f"{label}{a}+{b}={total}" for label, a, b, total in steps) + "#" + answer, answer

    def check(self, data, answer):
        return answer == "".join(f"{label}{(a + b) % 10}" for a, b, label in data["columns"])


def add_steps(a, b, rng, slip):
    """Written addition from the last digit on, 'digit+digit+carry=carry digit': ('7+5+0=12,4+8+1=13', 132)."""
    steps, carry, total, place = [], 0, 0, 1
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        value = slipped(x + y + carry, rng, slip)
        steps.append(f"{x}+{y}+{carry}={value // 10}{value % 10}")
        carry, total, place = value // 10, total + value % 10 * place, place * 10
    return ",".join(steps), total + carry * place


class Add(Task):
    """Addition of two d-digit numbers with carries.  A slip spoils only what follows it.

    47+85 -> <think>7+5+0=12,4+8+1=13</think>132
    """

    def pose(self, rng, d):
        a, b = (rng.randrange(10 ** (d - 1) if d > 1 else 0, 10**d) for _ in range(2))
        return f"{a}+{b}", {"a": a, "b": b}

    def reason(self, data, rng, slip):
        steps, total = add_steps(data["a"], data["b"], rng, slip)
        return steps, str(total)

    def check(self, data, answer):
        return answer == str(data["a"] + data["b"])


class Multiply(Task):
    """Long multiplication: a row per digit of the second number, then their running sum; d + 1 digits in all.

    47*6 -> <think>6:7*6+0=42,4*6+4=28:282</think>282
    """

    def pose(self, rng, d):
        first, second = (d + 2) // 2, (d + 1) // 2
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in (first, second))
        return f"{a}*{b}", {"a": a, "b": b}

    def reason(self, data, rng, slip):
        a, b, total, lines = data["a"], data["b"], 0, []
        for i in range(len(str(b))):
            y, carry, row, steps = b // 10**i % 10, 0, 0, []
            for j in range(len(str(a))):
                x = a // 10**j % 10
                value = slipped(x * y + carry, rng, slip)
                steps.append(f"{x}*{y}+{carry}={value // 10}{value % 10}")
                carry, row = value // 10, row + value % 10 * 10**j
            row = (row + carry * 10 ** len(str(a))) * 10**i
            lines.append(f"{y}:{','.join(steps)}:{row}")
            if i:
                steps, total = add_steps(total, row, rng, slip)
                lines.append(f"{steps}:{total}")
            else:
                total = row
        return ";".join(lines), str(total)

    def check(self, data, answer):
        return answer == str(data["a"] * data["b"])


class Sort(Task):
    """Sort d + 1 digits by selection: the smallest one, then what is left.

    sort 3917 -> <think>1:397,3:97,7:9,9:</think>1379
    """

    def pose(self, rng, d):
        digits = "11"
        while len(set(digits)) == 1:
            digits = "".join(str(rng.randrange(10)) for _ in range(d + 1))
        return f"sort {digits}", {"digits": digits}

    def reason(self, data, rng, slip):
        left, steps, answer = list(data["digits"]), [], ""
        while left:
            pick = min(left) if rng.random() >= slip else rng.choice(left)
            left.remove(pick)
            answer += pick
            steps.append(f"{pick}:{''.join(left)}")
        return ",".join(steps), answer

    def check(self, data, answer):
        return answer == "".join(sorted(data["digits"]))


class Registers(Task):
    """Predict what a program of d + 1 lines leaves in its registers (all arithmetic mod 10).

    run a=3;b=7;a=b*2 -> <think>a3;a3b7;a4b7</think>a4b7
    """

    def pose(self, rng, d):
        names, lines = "abcde"[:2 + d // 4], []
        for _ in range(d + 1):
            known = sorted({line[0] for line in lines})
            if not known or (len(known) < len(names) and rng.random() < 0.4):
                lines.append(f"{names[len(known)]}={rng.randrange(10)}")
            else:
                other = rng.choice([*known, str(rng.randrange(10))])
                lines.append(f"{rng.choice(known)}={rng.choice(known)}{rng.choice('+-*')}{other}")
        return "run " + ";".join(lines), {"lines": lines}

    def run(self, lines, rng=None, slip=0.0):
        """The state after each line, as text."""
        state, texts = {}, []
        for line in lines:
            def value(name):
                return int(name) if name.isdigit() else state[name]
            if len(line) == 3:
                result = value(line[2])
            else:
                a, b = value(line[2]), value(line[4])
                result = {"+": a + b, "-": a - b, "*": a * b}[line[3]] % 10
            state[line[0]] = slipped(result, rng, slip)
            texts.append("".join(f"{name}{state[name]}" for name in sorted(state)))
        return texts

    def reason(self, data, rng, slip):
        texts = self.run(data["lines"], rng, slip)
        return ";".join(texts), texts[-1]

    def check(self, data, answer):
        return answer == self.run(data["lines"])[-1]


class Find(Task):
    """Predict an input: for each of d columns (a, t) find a digit x with (a + x) mod 10 < t.  Many valid answers.

    find 06b85c -> <think>b555c08.#b5c.</think>b5c.   (label, guess, (a + x) mod 10, the guess if it holds, else a dot)
    The teacher guesses once per column, uniformly, and checks honestly; a dot is a column it did not solve.
    """
    exact = False

    def pose(self, rng, d):
        columns = [[rng.randrange(10), rng.randrange(4, 9), label] for label in labels(rng, d)]
        return "find " + "".join(f"{a}{t}{label}" for a, t, label in columns), {"columns": columns}

    def reason(self, data, rng, slip):
        steps, answer = "", ""
        for a, t, label in data["columns"]:
            x = rng.randrange(10)
            value = slipped((a + x) % 10, rng, slip)
            kept = str(x) if value < t else "."
            steps += f"{label}{x}{value}{kept}"
            answer += label + kept
        return f"{steps}#{answer}", answer

    def check(self, data, answer):
        columns = data["columns"]
        if len(answer) != 2 * len(columns):
            return False
        return all(mark == label and x in "0123456789" and (a + int(x)) % 10 < t
                   for (a, t, label), mark, x in zip(columns, answer[::2], answer[1::2]))


class Countdown(Task):
    """Reach a target with d + 1 numbers, each used once, by + - *, evaluated left to right.  Many valid answers.

    make 13 of 3,5,2 -> <think>3+2-5=0;3*5-2=13</think>3*5-2
    The teacher tries up to eight random expressions and keeps the first that works, else the last.
    """
    exact = False
    tries = 8

    def pose(self, rng, d):
        while True:
            numbers = [rng.randrange(1, 10) for _ in range(min(d + 1, 8))]
            expression, target = self.guess(numbers, rng)
            if target <= 99:
                return f"make {target} of {','.join(map(str, numbers))}", {"numbers": numbers, "target": target}

    def guess(self, numbers, rng):
        """A random expression over all numbers that never goes below 0, and its value."""
        numbers = rng.sample(numbers, len(numbers))
        text, value = str(numbers[0]), numbers[0]
        for number in numbers[1:]:
            operator = rng.choice("+-*" if value >= number else "+*")
            text += f"{operator}{number}"
            value = {"+": value + number, "-": value - number, "*": value * number}[operator]
        return text, value

    def reason(self, data, rng, slip):
        tried = []
        for _ in range(self.tries):
            text, value = self.guess(data["numbers"], rng)
            value = slipped(value, rng, slip)
            tried.append(f"{text}={value}")
            if value == data["target"]:
                break
        return ";".join(tried), text

    def check(self, data, answer):
        if not re.fullmatch(r"[0-9]([-+*][0-9])*", answer):
            return False
        numbers, value = [int(c) for c in answer[::2]], int(answer[0])
        if sorted(numbers) != sorted(data["numbers"]):
            return False
        for operator, number in zip(answer[1::2], numbers[1:]):
            value = {"+": value + number, "-": value - number, "*": value * number}[operator]
        return value == data["target"]


class Base(Task):
    """Write a number in another base by repeated division; d sets its size.

    13 in 2 -> <think>13=6*2+1,6=3*2+0,3=1*2+1,1=0*2+1</think>1101
    """

    def pose(self, rng, d):
        base = rng.randrange(2, 10)
        number = rng.randrange(base ** d, base ** (d + 1))
        return f"{number} in {base}", {"number": number, "base": base}

    def reason(self, data, rng, slip):
        number, base, steps, answer = data["number"], data["base"], [], ""
        while number:
            digit = slipped(number % base, rng, slip, base)
            steps.append(f"{number}={number // base}*{base}+{digit}")
            answer, number = str(digit) + answer, number // base
        return ",".join(steps), answer

    def check(self, data, answer):
        return re.fullmatch("[0-9]{1,400}", answer) is not None and answer[0] != "0" and \
            all(int(c) < data["base"] for c in answer) and int(answer, data["base"]) == data["number"]


TASKS = {task.name: task for task in (
    ColumnSums("column_sums"), Add("add"), Multiply("multiply"), Sort("sort"), Registers("registers"), Find("find"),
    Countdown("countdown"), Base("base"))}


def held_out(problem):
    """A tenth of all problems, by a hash of what is asked: never trained on, whatever seed made them."""
    return hashlib.md5(f"{problem.task} {problem.prompt}".encode()).digest()[0] < 26


def draw(task, seed, d, hold):
    """The first problem from `seed` on that is held out (hold=True) or may be trained on (False).

    The smallest difficulties have few problems, perhaps none held out: then the next one is taken.
    """
    for attempt in range(1000):
        problem = task.make(f"{seed}/{attempt}", d + attempt // 200)
        if held_out(problem) == hold:
            return problem
    raise RuntimeError(f"task {task.name} made no {'held-out' if hold else 'training'} problem at difficulty {d}")


# ---- data -----------------------------------------------------------------------------------------------------------


def split_think(content):
    """'<think>reasoning</think>answer' -> ('reasoning', 'answer'); no reasoning: ('', content)."""
    before, tag, rest = content.partition("<think>")
    reasoning, closed, answer = rest.partition("</think>")
    return (reasoning, before + answer) if tag and closed else ("", content)


def trim(messages, context, tokenizer):
    """Answer-preserving trimming: make a conversation fit `context` tokens without losing a question or an answer.

    1. It fits: keep it.  2. Else cut the last assistant turn's reasoning from its tail, so that it just fits: the
    start of the reasoning and the whole answer stay.  3. Still too long: remove the <think> blocks of the earlier
    turns, then 2 again.  4. Problem and answers alone are too long: drop it.  (TR section III.)

    messages [{"role", "content"}, …] -> (messages, "kept" | "cut" | "stripped" | "dropped"); None when dropped.

    >>> byte = Tokenizer({bytes([i]): i for i in range(256)})             # one token per character
    >>> talk = [dict(role="user", content="7+5?"), dict(role="assistant", content="<think>seven, five</think>12")]
    >>> len(byte.render(talk)[0])                                           # 4 + 11 + 2 characters, 6 special tokens
    23
    >>> trim(talk, 23, byte)[1], trim(talk, 9, byte)
    ('kept', (None, 'dropped'))
    >>> trim(talk, 17, byte)[0][1]["content"], trim(talk, 17, byte)[1]
    ('<think>seven</think>12', 'cut')
    """
    def size(candidate):
        return len(tokenizer.render(candidate)[0])

    def cut(candidate):
        """Rule 2 on the last turn; None if even without reasoning it does not fit."""
        reasoning, answer = split_think(candidate[-1]["content"])
        if candidate[-1]["role"] != "assistant":
            return None
        ids = tokenizer.encode(reasoning)

        def keep(count):
            text = tokenizer.decode_bytes(ids[:count]).decode("utf-8", "ignore")
            content = f"<think>{text}</think>{answer}" if count else answer
            return [*candidate[:-1], {**candidate[-1], "content": content}]

        # A cut text can have a token more or less than was counted, so look at both sides of the estimate.
        count = max(0, len(ids) - (size(candidate) - context))
        while count and size(keep(count)) > context:
            count -= 1
        while count < len(ids) and size(keep(count + 1)) <= context:
            count += 1
        return keep(count) if size(keep(count)) <= context else None

    if size(messages) <= context:
        return messages, "kept"
    short = cut(messages)
    if short:
        return short, "cut"
    bare = [{**message, "content": split_think(message["content"])[1]}
            if message["role"] == "assistant" and message is not messages[-1] else message for message in messages]
    if size(bare) <= context:
        return bare, "stripped"
    short = cut(bare)
    return (short, "stripped") if short else (None, "dropped")


def pack(lengths, capacity, bins):
    """Best-fit decreasing: the longest sample first, each into the fullest bin that still takes it whole.

    Returns at most `bins` lists of indices; what fits nowhere is in none of them.

    >>> pack([5, 3, 6, 2, 4], capacity=8, bins=2)
    [[2, 3], [0, 1]]
    """
    rows, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[index]]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
        elif len(rows) < bins and lengths[index] <= capacity:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        else:
            continue
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


PAIRS = [("question", "answer"), ("problem", "solution"), ("prompt", "completion"), ("problem", "answer"),
         ("instruction", "output")]


def to_messages(row):
    """One JSON row -> messages.  Raises ValueError that says what is wrong with it.

    >>> to_messages({"question": "1+1?", "answer": "One and one.\\n#### 2"})[1]["content"]      # GSM8K's form
    '<think>One and one.</think>2'
    """
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, this is a {type(row).__name__}")
    if "messages" not in row:
        pair = next((pair for pair in PAIRS if all(isinstance(row.get(key), str) for key in pair)), None)
        if pair is None:
            raise ValueError("no 'messages', and no pair of texts such as " + ", ".join("/".join(p) for p in PAIRS[:3])
                             + f"; its keys are {', '.join(map(str, list(row)[:6])) or 'none'}")
        reply = row[pair[1]]
        gsm8k = re.fullmatch(r"(.+)\n#### ([^\n]+)\n?", reply, re.S)                # a last line with the answer
        if gsm8k and "<think>" not in reply and "\n#### " not in gsm8k[1]:
            reply = f"<think>{gsm8k[1].strip()}</think>{gsm8k[2].strip()}"
        row = {"messages": [{"role": "user", "content": row[pair[0]]}, {"role": "assistant", "content": reply}]}
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list with at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} needs a 'role' and a 'content' that is a text")
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"message {number} has role {message.get('role')!r}; there are system, user, assistant")
        tags = re.findall("</?think>", message["content"])
        if message["role"] == "assistant" and tags != ["<think>", "</think>"] * (len(tags) // 2):
            raise ValueError(f"message {number} opens or closes <think> without the other")
    return messages


def read_jsonl(path, skip_bad_lines=False):
    """Yield each line's messages.  A bad line stops with file and line number, or is skipped and counted."""
    bad = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield to_messages(json.loads(line.decode("utf-8")))
            except ValueError as error:                         # JSON and UTF-8 errors are ValueErrors too
                if not skip_bad_lines:
                    raise SystemExit(f"{path}:{number}: {error}. Mend the line, or pass --skip-bad-lines") from None
                bad += 1
    if bad:
        print(f"{path}: skipped {bad} bad line{'s' if bad > 1 else ''}")


def python_text(limit):
    """Text that every Python brings: English (the language reference in pydoc) and code (the standard library)."""
    import pydoc_data.topics
    import sysconfig
    english = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:limit // 2]
    code, root = [], sysconfig.get_path("stdlib")
    for folder in ("", "asyncio", "collections", "email", "html", "http", "importlib", "json", "logging",
                   "multiprocessing", "unittest", "urllib", "xml/dom", "xml/etree"):
        for name in sorted(os.listdir(os.path.join(root, folder))):
            if name.endswith(".py") and sum(map(len, code)) < limit - len(english):
                with open(os.path.join(root, folder, name), encoding="utf-8", errors="replace") as file:
                    code.append(file.read())
    return {"english": english, "code": "\n\n".join(code)}


# A source has numbered samples: get(index, hold) -> ids, and which of them the assistant wrote; size(hold): how many,
# None without end.  Held-out samples (hold=True) are never trained on.


def fingerprint(tokens):
    """What tells one array of tokens from another: its length and a hash of up to a million of them."""
    sample = np.ascontiguousarray(tokens[::max(1, len(tokens) // 1_000_000)])
    return f"{len(tokens)} {hashlib.md5(sample.tobytes()).hexdigest()}"


class TextSource:
    """Windows of `context` tokens of one long text, every twentieth held out."""
    is_traces = False

    def __init__(self, name, tokens, context):
        self.name, self.tokens, self.context = name, tokens, context
        self.fingerprint = fingerprint(tokens)
        self.windows = math.ceil(len(tokens) / context)
        few = self.windows < 20                                 # a short text gives its last window, if it has two
        self.held = [self.windows - 1] * (self.windows > 1) if few else list(range(19, self.windows, 20))

    def size(self, hold):
        return len(self.held) if hold else self.windows - len(self.held)

    def get(self, index, hold):
        window = self.held[index] if hold else index + index // 19
        ids = self.tokens[window * self.context:(window + 1) * self.context].tolist()
        return ids, [True] * len(ids)


class ChatSource:
    """A .jsonl file's conversations, trimmed to the context, every twentieth held out."""
    is_traces = True

    def __init__(self, name, tokens, targets, offsets):
        self.name, self.tokens, self.targets, self.offsets = name, tokens, targets, offsets
        self.fingerprint = fingerprint(tokens)

    def size(self, hold):
        count = len(self.offsets) - 1
        return count // 20 if hold else count - count // 20

    def get(self, index, hold):
        row = 20 * index + 19 if hold else index + index // 19
        part = slice(self.offsets[row], self.offsets[row + 1])
        return self.tokens[part].tolist(), self.targets[part].astype(bool).tolist()


class TaskSource:
    """Endless conversations about generated problems, solved by the teacher, trimmed to the context."""
    name, is_traces = "traces", True

    def __init__(self, tasks, stage, tokenizer, seed):
        self.tasks, self.stage, self.tokenizer, self.seed = tasks, stage, tokenizer, seed
        self.fingerprint = ",".join(tasks)
        self.verdicts = dict.fromkeys(("kept", "cut", "stripped", "dropped"), 0)

    def size(self, hold):
        return None

    def get(self, index, hold):
        for attempt in range(100):                              # a conversation that was dropped gives way to the next
            rng = random.Random(f"{self.seed} {hold} {index} {attempt}")
            messages = []
            for _ in range(rng.randint(1, self.stage.turns)):
                task = TASKS[rng.choice(self.tasks)]
                problem = draw(task, rng.getrandbits(48), rng.randint(1, self.stage.difficulty), hold)
                messages += [{"role": "user", "content": problem.prompt},
                             {"role": "assistant", "content": task.solve(problem, rng.getrandbits(48))}]
            messages, verdict = trim(messages, self.stage.context, self.tokenizer)
            self.verdicts[verdict] += 1
            if messages:
                return self.tokenizer.render(messages)
        raise SystemExit(f"no generated conversation fits --context {self.stage.context}; make it longer")


def cached_tokens(path, folder, tokenizer, context, skip_bad_lines):
    """Tokenise a file once into memory-mapped arrays beside the run, and open them: (tokens, targets, offsets).

    .txt: one stream of tokens, read in pieces of a megabyte, so several GB never sit in memory; .jsonl: a row's tokens
    after trimming for this context, found by offsets.  The cache's name holds all that its content depends on.
    """
    chat = path.endswith(".jsonl")
    about = os.stat(path)
    vocabulary = hashlib.md5(repr(sorted(tokenizer.ranks.items())).encode()).hexdigest()
    identity = [os.path.abspath(path), about.st_size, about.st_mtime_ns, vocabulary, chat and context, skip_bad_lines]
    stem = os.path.join(folder, f"{os.path.basename(path)}-{hashlib.md5(repr(identity).encode()).hexdigest()[:12]}")
    kind = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    if not os.path.exists(stem + ".json"):
        os.makedirs(folder, exist_ok=True)
        verdicts, offsets = dict.fromkeys(("kept", "cut", "stripped", "dropped"), 0), [0]
        with open(stem + ".tokens", "wb") as tokens, open(stem + ".targets", "wb") as targets, \
                tqdm(total=about.st_size, unit="B", unit_scale=True, desc=f"tokenising {path}", disable=None) as bar:
            if chat:
                for messages in read_jsonl(path, skip_bad_lines):
                    bar.update(sum(len(message["content"]) for message in messages))
                    messages, verdict = trim(messages, context, tokenizer)
                    verdicts[verdict] += 1
                    if messages:
                        ids, wanted = tokenizer.render(messages)
                        np.array(ids, kind).tofile(tokens)
                        np.array(wanted, np.uint8).tofile(targets)
                        offsets.append(offsets[-1] + len(ids))
            else:
                with open(path, encoding="utf-8", errors="replace", newline="") as file:
                    while piece := file.read(1 << 20):
                        piece += file.readline(1 << 16)         # not in the middle of a word
                        np.array(tokenizer.encode(piece), kind).tofile(tokens)
                        bar.update(len(piece.encode()))
        np.array(offsets, np.int64).tofile(stem + ".offsets")
        write_json(stem + ".json", verdicts)                    # last: it says that the others are whole
    with open(stem + ".json") as file:
        verdicts = json.load(file)
    if chat:
        print(f"{path}, trimmed to {context} tokens: " + ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()))
    if os.path.getsize(stem + ".tokens") == 0:
        raise SystemExit(f"{path} gave no tokens: " + (f"none of its rows fits {context}" if chat else "it is empty"))
    targets = np.memmap(stem + ".targets", np.uint8, "r") if chat else None
    return np.memmap(stem + ".tokens", kind, "r"), targets, np.fromfile(stem + ".offsets", np.int64)


def make_sources(config, stage, tokenizer):
    """The stage's sources: --data files or Python's own text, and the generated problems."""
    sources, folder = [], os.path.join(config.out, "data")
    for path in config.data:
        tokens, targets, offsets = cached_tokens(path, folder, tokenizer, stage.context, config.skip_bad_lines)
        name = os.path.basename(path)
        name = path if name in [os.path.basename(other) for other in config.data if other != path] else name
        sources.append(ChatSource(name, tokens, targets, offsets) if path.endswith(".jsonl")
                       else TextSource(name, tokens, stage.context))
    if not config.data:
        for name, text in python_text(PRESETS[config.preset]["text_bytes"]).items():
            sources.append(TextSource(name, np.array(tokenizer.encode(text), np.uint32), stage.context))
    tasks = task_names(config.tasks)
    if tasks:
        sources.append(TaskSource(tasks, stage, tokenizer, config.seed))
    if not sources:
        raise SystemExit("--tasks none without --data leaves nothing to train on")
    return sources


def task_names(text):
    """--tasks -> names; unknown ones are an error with the closest match."""
    names = {"all": list(TASKS), "none": []}.get(text, text.split(","))
    for name in names:
        if name not in TASKS:
            raise SystemExit(f"--tasks {text}: no task {name!r}; did you mean "
                             f"{difflib.get_close_matches(name, TASKS, 1, 0)[0]}? There are {', '.join(TASKS)}")
    return names


class Loader:
    """Packed batches of a fixed mixture.  What it has given is all its state: a number per source, and the samples
    that wait because they fitted nowhere."""

    def __init__(self, sources, stage, tokens_per_step, seed, pad, hold=False):
        self.sources, self.stage, self.seed, self.pad = {s.name: s for s in sources}, stage, seed, pad
        self.context, self.hold = stage.context, hold
        self.rows = tokens_per_step // stage.context
        traces = [s.name for s in sources if s.is_traces]
        texts = [s.name for s in sources if not s.is_traces]
        share = stage.traces if traces and texts else float(bool(traces))
        # Texts count by their size, so that none is read more often than another; kinds of traces count alike.
        size = {name: self.sources[name].size(hold) for name in texts}
        self.weight = {**{name: share / len(traces) for name in traces},
                       **{name: (1 - share) * size[name] / sum(size.values()) for name in texts}}
        self.given = dict.fromkeys(self.sources, 0)             # tokens
        self.drawn = dict.fromkeys(self.sources, 0)             # samples
        self.waiting = []                                       # ((source name, sample number), sample)
        self.shuffled = {}                                      # source name: (epoch, its order)

    def sample(self, name, number):
        """Sample `number` of a source, in an order shuffled anew each time through."""
        source = self.sources[name]
        size = source.size(self.hold)
        if size is None:
            return source.get(number, self.hold)
        epoch, place = divmod(number, size)
        if self.shuffled.get(name, (None,))[0] != epoch:
            self.shuffled[name] = epoch, np.random.default_rng([self.seed, epoch, size]).permutation(size)
        return source.get(int(self.shuffled[name][1][place]), self.hold)

    def next(self):
        """-> input_ids, targets, position_ids (rows, context) int64, and where the samples came from.

        targets: the next token, -100 where there is none in this sample or it does not count.
        position_ids restart with each sample and are -1 on padding, so nothing leaks from one into the next.
        """
        pool = self.waiting
        tokens = sum(len(ids) for _, (ids, _) in pool)
        while tokens < self.rows * self.context * 1.05:
            total = sum(self.given.values()) + 1
            name = min(self.given, key=lambda n: self.given[n] - self.weight[n] * total)    # the one most behind
            origin = (name, self.drawn[name])
            sample = self.sample(*origin)
            self.drawn[name] += 1
            self.given[name] += len(sample[0])
            tokens += len(sample[0])
            pool.append((origin, sample))
        rows = pack([len(ids) for _, (ids, _) in pool], self.context, self.rows)
        used = {index for row in rows for index in row}
        self.waiting = [item for index, item in enumerate(pool) if index not in used]
        inputs = np.full((self.rows, self.context), self.pad, np.int64)
        targets, positions = np.full_like(inputs, -100), np.full_like(inputs, -1)
        for row, members in enumerate(rows):
            start = 0
            for ids, wanted in (pool[index][1] for index in members):
                end = start + len(ids)
                inputs[row, start:end] = ids
                counts = np.array(wanted[1:]) if self.stage.mask_prompts else True
                targets[row, start:end - 1] = np.where(counts, ids[1:], -100)
                positions[row, start:end] = np.arange(len(ids))
                start = end
        origins = [pool[index][0] for index in sorted(used)]
        return *(torch.from_numpy(array) for array in (inputs, targets, positions)), origins

    def state_dict(self):
        return {"given": self.given, "drawn": self.drawn, "waiting": [origin for origin, _ in self.waiting]}

    def load_state_dict(self, state):
        self.given, self.drawn = dict(state["given"]), dict(state["drawn"])
        self.waiting = [(tuple(origin), self.sample(*origin)) for origin in state["waiting"]]


# ---- optimizers -----------------------------------------------------------------------------------------------------


def orthogonalize(matrices, steps=5):
    """The nearest (semi-)orthogonal matrices, roughly: (…, m, n) -> U V^T of each, by Newton-Schulz iterations.

    x <- a x + (b x x^T + c (x x^T)^2) x pushes every singular value towards 1 (to within about 0.7 … 1.2, which is
    enough); the coefficients are Keller Jordan's.  fp32 on the CPU, bf16 on a GPU.

    >>> u = orthogonalize(torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)))
    >>> bool((torch.linalg.svdvals(u) - 1).abs().max() < 0.35)
    True
    """
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.bfloat16() if matrices.is_cuda else x.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                                     # the small side's Gram matrix is the cheap one
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by 0.2 sqrt(max(m, n)) lr U V^T, an AdamW update's usual size.

    TR section III ("AdamW-RMS matching": one learning rate serves both optimizers).  Parameters are matrices (m, n) or
    stacks of experts (X, m, n); those of one shape are orthogonalised in one batch.  `momentum` 0 is the RL stages'.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape[-2:], []).append(parameter)
            for shape, parameters in shapes.items():
                updates = [self.update(p, group["momentum"]).reshape(-1, *shape) for p in parameters]
                moves = orthogonalize(torch.cat(updates)).split([len(update) for update in updates])
                for parameter, move in zip(parameters, moves):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(move.view_as(parameter), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def update(self, parameter, momentum):
        """The gradient with Nesterov momentum."""
        if not momentum:
            return parameter.grad
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


def make_optimizers(model, lr, weight_decay=0.0, momentum=0.95):
    """Muon for the weights of linear layers and experts, AdamW for all else: embeddings, convolutions, norms, scales,
    biases, temperatures."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not re.search("conv_qk|embed_tokens|lm_head", name)
        (matrices if is_matrix else rest).append(parameter)
    return [Muon(matrices, lr, momentum, weight_decay), torch.optim.AdamW(rest, lr, (0.9, 0.95), weight_decay=0.0)]


def learning_rate(step, steps, peak, final):
    """Linear warm-up over a twentieth of the steps, then a cosine from `peak` to `final`.

    >>> [round(learning_rate(step, 100, 1.0, 0.1), 3) for step in (0, 4, 51, 99)]
    [0.2, 1.0, 0.557, 0.1]
    """
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return final + (peak - final) * (1 + math.cos(math.pi * (step - warm + 1) / max(1, steps - warm))) / 2


# ---- files ----------------------------------------------------------------------------------------------------------


def write_json(path, content):
    with open(path + ".tmp", "w") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".tmp", path)


def save_checkpoint(folder, model, tokenizer, state=None):
    """Write a checkpoint beside the old one, then swap them by rename: at any moment one of the two is whole."""
    shutil.rmtree(folder + ".new", ignore_errors=True)
    model.save_pretrained(folder + ".new")
    tokenizer.save_pretrained(folder + ".new")
    if state is not None:
        torch.save(state, os.path.join(folder + ".new", "trainer.pt"))
    if os.path.exists(folder):
        shutil.rmtree(folder + ".old", ignore_errors=True)
        os.rename(folder, folder + ".old")
    os.rename(folder + ".new", folder)
    shutil.rmtree(folder + ".old", ignore_errors=True)


def load_checkpoint(folder, device):
    """-> model, tokenizer, trainer state (None if it has none); None for a folder that is not there.

    Puts right what a kill between the renames of `save_checkpoint` left behind.
    """
    if not os.path.exists(folder) and os.path.exists(folder + ".old"):
        os.rename(folder + ".old", folder)
    for leftover in (folder + ".new", folder + ".old"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not os.path.exists(folder):
        return None
    model = Zaya.from_pretrained(folder, torch.float32, device)
    for parameter in model.parameters():                        # out of the mapped file, into aligned memory:
        parameter.data = parameter.data.clone()                 # else a resumed run may round differently
    path = os.path.join(folder, "trainer.pt")
    state = torch.load(path, map_location=device, weights_only=True) if os.path.exists(path) else None
    return model, Tokenizer.from_pretrained(folder), state


class Log:
    """log.csv, one row a step.  Opened at a step, it forgets the rows after it: a resumed run writes them again."""
    COLUMNS = ["stage", "step", "loss", "lr", "norm", "load", "entropy", "bias", "skip", "tokens_per_second"]

    def __init__(self, out, stage, step):
        path = os.path.join(out, "log.csv")
        rows = [row for row in read_log(out) if STAGES.index(row["stage"]) < STAGES.index(stage)
                or (row["stage"] == stage and int(row["step"]) <= step)]
        with open(path + ".tmp", "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)

    def add(self, **row):
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()


def read_log(out):
    """log.csv as dictionaries; a last row that a kill cut in half is left out."""
    path = os.path.join(out, "log.csv")
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row["stage"] in STAGES]


# ---- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model, sources, stage, pad, late, tokens=16384):
    """Mean loss on held-out samples: {source: {"loss": all positions, "late": from position `late` on}}."""
    result = {}
    model.eval()
    for source in sources:
        if source.size(hold=True) == 0:
            continue
        inputs, targets, positions, _ = Loader([source], stage, max(tokens, stage.context), 0, pad, hold=True).next()
        losses = []
        for x, y, p in zip(inputs.split(8), targets.split(8), positions.split(8)):
            x, y, p = (t.to(model.norm.weight.device) for t in (x, y, p))
            logits = model.logits(model.hidden_states(x, position_ids=p))
            losses.append(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").cpu())
        losses, counted = torch.cat(losses), targets.flatten() >= 0
        if not counted.any():
            continue
        far = counted & (positions.flatten() >= late)
        result[source.name] = {"loss": losses[counted].mean().item(),
                               "late": losses[far].mean().item() if far.any() else None}
    return result


def reply(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0):
    """Sample the assistant's answer to each prompt: list of str -> list of str, special tokens included."""
    device = model.norm.weight.device
    ids = [tokenizer.render([{"role": "user", "content": prompt}], generation_prompt=True)[0] for prompt in prompts]
    width = max(map(len, ids))
    inputs = torch.tensor([[tokenizer.pad] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    out = model.generate(inputs, max_new_tokens, temperature, attention_mask=mask, eos_token_id=tokenizer.end,
                         generator=torch.Generator().manual_seed(seed))[:, width:]
    return [tokenizer.decode(row[:row.index(tokenizer.end)] if tokenizer.end in row else row) for row in out.tolist()]


EVAL_DIFFICULTIES = (1, 2, 3)


def pass_at_1(model, tokenizer, tasks, problems, samples, seed=0, batch=128):
    """Mean accuracy of single samples at temperature 1 on held-out problems, `problems` a task over difficulties 1-3.

    -> {"pass@1", "ci95": [low, high], "problems", "tasks": {name: pass@1}, "chance": {name: pass@1}}; the interval is
    over problems, whose samples are not independent of each other; chance is the teacher's reply to another problem of
    the same task and difficulty.
    """
    held, seen = [], set()
    for name in tasks:
        for i in range(problems):
            for attempt in range(1000):                         # no problem twice; easy ones run out, then harder ones
                problem = draw(TASKS[name], f"eval {i} {attempt}", EVAL_DIFFICULTIES[i % 3] + attempt // 50, hold=True)
                if (name, problem.prompt) not in seen:
                    break
            seen.add((name, problem.prompt))
            held.append(problem)
    # A reply may be half as long again as the teacher's; sorted by that, so a batch ends together.
    limit = {p.prompt: len(tokenizer.encode(TASKS[p.task].solve(p))) * 3 // 2 + 16 for p in held}
    order = sorted((i for i in range(len(held)) for _ in range(samples)), key=lambda i: limit[held[i].prompt])
    scores = np.zeros(len(held))
    for start in tqdm(range(0, len(order), batch), desc="held-out problems", leave=False, disable=None):
        part = [held[i] for i in order[start:start + batch]]
        texts = reply(model, tokenizer, [p.prompt for p in part], max(limit[p.prompt] for p in part), seed + start)
        for i, problem, text in zip(order[start:start + batch], part, texts):
            scores[i] += TASKS[problem.task].verify(problem, text)[0] / samples
    # All right or all wrong is no proof of 0 or 1: the interval is never narrower than one problem's worth.
    half = 1.96 * max(scores.std(ddof=1) / len(scores) ** 0.5, 1 / len(scores)) if len(scores) > 1 else 1.0
    mean = scores.mean()
    chance = [np.mean([TASKS[p.task].verify(p, TASKS[p.task].solve(other, i))[0] for other in held
                       if (other.task, other.difficulty) == (p.task, p.difficulty) and other.prompt != p.prompt] or [0])
              for i, p in enumerate(held)]
    by_task, chance = (np.reshape(x, (len(tasks), problems)).mean(1).tolist() for x in (scores, chance))
    return {"pass@1": float(mean), "ci95": [float(max(0, mean - half)), float(min(1, mean + half))],
            "problems": len(held), "tasks": dict(zip(tasks, by_task)), "chance": dict(zip(tasks, chance))}


def show_samples(model, tokenizer, sources, seed):
    """Print how the model goes on with a held-out sample of each source, and how it answers two held-out problems."""
    rng, device = random.Random(seed), model.norm.weight.device
    generator = torch.Generator().manual_seed(seed)
    for source in (source for source in sources if not isinstance(source, TaskSource) and source.size(hold=True)):
        ids, wanted = source.get(rng.randrange(source.size(hold=True)), hold=True)
        ids = ids[:wanted.index(True)] if source.is_traces and True in wanted else ids[:24]     # up to the reply
        text = model.generate(torch.tensor([ids[-200:]], device=device), 48, 0.8, generator=generator)[0].tolist()
        print(f"    {source.name} | {tokenizer.decode(ids)[-100:]!r} -> {tokenizer.decode(text[len(ids[-200:]):])!r}")
    tasks = [name for source in sources if isinstance(source, TaskSource) for name in source.tasks]
    for name in rng.sample(tasks, min(2, len(tasks))):
        problem = draw(TASKS[name], f"show {seed}", 2, hold=True)
        answer = reply(model, tokenizer, [problem.prompt], 96, seed)[0]
        verdict = "right" if TASKS[name].verify(problem, answer)[0] else "wrong"
        print(f"    {verdict} | {problem.prompt} -> {answer!r}")


# ---- a stage --------------------------------------------------------------------------------------------------------


def choose_device(config):
    """-> device, dtype, and the sentence that says why."""
    device, because = config.device, "as asked"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        because = f"a {'ROCm' if torch.version.hip else 'CUDA'} GPU is there" if device == "cuda" else "no GPU is there"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this PyTorch sees no GPU; use --device cpu, or install a CUDA or ROCm build")
    dtype, why = config.dtype, "as asked"
    if dtype == "auto":
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
        why = "this GPU multiplies it fast" if fast else "nothing here is known to be faster in bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise SystemExit(f"--dtype {dtype}: there are float32 and bfloat16")
    return device, getattr(torch, dtype), f"device {device} ({because}), dtype {dtype} ({why}), " \
        f"{torch.get_num_threads()} threads"


def train_step(model, optimizers, balancer, batch, config, dtype, lr):
    """One optimizer step over micro-batches -> {"loss", "norm", "load", "entropy", "bias", "skip"}.  Does not step if
    the loss or the gradient is not finite."""
    inputs, targets, positions = batch
    device = model.norm.weight.device
    rows = max(1, config.micro_batch // inputs.shape[1])
    count = (targets >= 0).sum().clamp_min(1)                   # a batch without a target has loss 0, not NaN
    total = 0.0
    model.train()
    for x, y, p in zip(inputs.split(rows), targets.split(rows), positions.split(rows)):
        x, y, p = x.to(device), y.to(device), p.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = model.hidden_states(x, position_ids=p)
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), y.flatten(), reduction="sum") / count.to(device)
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
    if math.isfinite(total) and math.isfinite(norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        health = balancer.step()
    else:
        health = {}
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return {"loss": total, "norm": norm, **health}


def run_stage(name, config, stage, model, tokenizer, state, device, dtype):
    """Train one stage to its end, from `state` if it was begun, and leave its checkpoint in out/<stage>.

    Returns the state: "before" and "after" are held-out losses, "seconds" is all it took, data and samples included."""
    folder = os.path.join(config.out, name)
    clock = time.perf_counter()
    sources = make_sources(config, stage, tokenizer)
    loader = Loader(sources, stage, config.tokens_per_step, config.seed, tokenizer.pad)
    late = min(config.context[name] for name in STAGES)
    for later in (os.path.join(config.out, other) for other in STAGES[STAGES.index(name) + 1:]):
        if os.path.exists(later):
            raise SystemExit(f"{name} is still to be trained, but {later} was made from another one: delete it, or "
                             "take another --out")
    if state is None:
        state = {"step": 0, "seconds": 0.0, "before": held_out_loss(model, sources, stage, tokenizer.pad, late)}
    model.config.rope_parameters["hybrid"]["rope_theta"] = stage.rope_theta
    optimizers = make_optimizers(model, stage.lr, config.weight_decay)
    balancer = PIDBalancer(model, config.balancer_lr)
    prints = {source.name: source.fingerprint for source in sources}
    if "loader" in state:
        if state["data"] != prints:
            changed = sorted(key for key in {*prints, *state["data"]} if prints.get(key) != state["data"].get(key))
            raise SystemExit(f"{folder} was begun on other data: {', '.join(changed)} changed since. Bring the old "
                             f"data back, take another --out, or delete {folder}")
        loader.load_state_dict(state["loader"])
        balancer.load_state_dict(state["balancer"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        print(f"{name}: going on after step {state['step']}")

    def save(step, **more):
        nonlocal clock
        state["seconds"] += time.perf_counter() - clock
        clock = time.perf_counter()
        state.update(step=step, settings=settings(config), data=prints, loader=loader.state_dict(),
                     balancer=balancer.state_dict(),
                     optimizers=[optimizer.state_dict() for optimizer in optimizers], **more)
        save_checkpoint(folder, model, tokenizer, state)

    log, saved = Log(config.out, name, state["step"]), state["step"] if "loader" in state else None
    for step in range(state["step"] + 1, stage.steps + 1):
        begun = time.perf_counter()
        *batch, origins = loader.next()
        lr = learning_rate(step - 1, stage.steps, stage.lr, stage.lr_end)
        row = train_step(model, optimizers, balancer, batch, config, dtype, lr)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["norm"])):
            where = ", ".join(f"{source} {number}" for source, number in origins[:6])
            good = f"{folder} (step {saved})" if saved else "none of this stage yet"
            raise SystemExit(f"{name} step {step}: loss {row['loss']}, gradient norm {row['norm']}; stopped before the "
                             f"update. Samples of the batch: {where}{' …' if len(origins) > 6 else ''}. Last good "
                             f"checkpoint: {good}. Try a lower --lr, or look at those samples")
        seconds = time.perf_counter() - begun
        speed = config.tokens_per_step / seconds
        log.add(stage=name, step=step, lr=lr, tokens_per_second=speed, **row)
        if step % config.log_every == 0 or step in (1, stage.steps):
            print(f"{name} {step}/{stage.steps} | loss {row['loss']:.3f} | norm {row['norm']:.2f} | lr {lr:.1e} | "
                  f"load {row['load']:.2f} entropy {row['entropy']:.3f} bias {row['bias']:.3f} | "
                  f"{seconds * 1e3:.0f} ms {speed / 1e3:.1f}k tok/s", flush=True)
        if step % max(1, stage.steps // 4) == 0 and step < stage.steps:
            show_samples(model, tokenizer, sources, step)
        if step % config.save_every == 0 or step == stage.steps:    # the last one too, before anything is evaluated
            save(step)
            saved = step
    state["after"] = held_out_loss(model, sources, stage, tokenizer.pad, late)
    show_samples(model, tokenizer, sources, stage.steps)
    save(stage.steps, done=True)
    for source in sources:
        if isinstance(source, TaskSource):
            print(f"{name}: generated conversations trimmed to {stage.context} tokens: "
                  + ", ".join(f"{n} {verdict}" for verdict, n in source.verdicts.items()))
    return state


# ---- a run ----------------------------------------------------------------------------------------------------------

MUST_STAY = ["preset", "seed", "data", "tasks", "tokenizer", "context", "tokens_per_step", "micro_batch",
             "weight_decay", "grad_clip", "balancer_lr", "lr", "steps", "dtype"]


def settings(config):
    return {name: getattr(config, name) for name in MUST_STAY}


def check_same_run(folder, name, state, model, config, changes):
    """A run goes on only with the settings and the shape it began with; which one differs is said."""
    pairs = [(setting, state["settings"][setting], now) for setting, now in settings(config).items()]
    pairs += [(setting, getattr(model.config, setting), now) for setting, now in changes.items()]
    for setting, then, now in pairs:
        then, now = (value[name] if isinstance(value, dict) else value for value in (then, now))
        if then != now:
            raise SystemExit(f"{folder} was made with {setting}={then}, and now it is {now}. Go on with the old value, "
                             f"take another --out, or delete {folder}")


def make_tokenizer(config, vocab_size):
    """A new run's tokenizer: named, or trained on the data (digits stay single).  Every checkpoint keeps it."""
    if config.tokenizer:
        if vocab_size:
            raise SystemExit("--tokenizer brings its own vocabulary: leave out --vocab-size")
        try:
            tokenizer = Tokenizer.named(config.tokenizer)
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"--tokenizer {config.tokenizer}: {error}") from None
    else:
        texts = []
        for path in config.data:
            if path.endswith(".jsonl"):
                budget = 4_000_000
                for messages in read_jsonl(path, config.skip_bad_lines):
                    texts += [message["content"] for message in messages]
                    budget -= sum(len(message["content"]) + 1 for message in messages)
                    if budget < 0:
                        break
            else:
                with open(path, encoding="utf-8", errors="replace") as file:
                    texts.append(file.read(4_000_000))
        texts = texts or list(python_text(min(2_000_000, PRESETS[config.preset]["text_bytes"])).values())
        try:
            tokenizer = Tokenizer.train("\n".join(texts), vocab_size or ZayaConfig.preset(config.preset).vocab_size,
                                        lambda merges: tqdm(merges, desc="learning tokens", leave=False, disable=None))
        except ValueError as error:
            raise SystemExit(f"--vocab-size: {error}") from None
    return tokenizer


def new_model(config, changes, tokenizer):
    changes = {**changes, "vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad,
               "bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end}
    try:
        shape = ZayaConfig.preset(config.preset, **changes)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    torch.manual_seed(config.seed)
    return Zaya(shape)


def write_report(out, report):
    """report.json for programs; report.md, report.png and loss.png for people."""
    write_json(os.path.join(out, "report.json"), report)
    stages = [name for name in STAGES if name in report["stages"]]
    results = [report["stages"][name] for name in stages]
    params = {name: f"{count / 1e6:.2f}M" for name, count in report["params"].items()}

    def table(*rows):
        """Markdown lines; the first row is the head."""
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""]

    text = [f"# {report['preset']}, seed {report['seed']}", "",
            f"{params['total']} parameters, {params['active']} active per token (without the embedding)", "",
            "Held-out pass@1 at temperature 1, difficulties 1 to 3 (chance: the teacher's answer to another one):", ""]
    text += table(["task", "chance", *stages],
                  *([task, f"{chance:.2f}", *(f"{r['tasks'].get(task, 0):.2f}" for r in results)]
                    for task, chance in results[-1]["chance"].items()),
                  ["**all** [95 % interval]", "",
                   *("**{pass@1:.3f}** [{ci95[0]:.3f}, {ci95[1]:.3f}]".format(**r) for r in results)],
                  ["problems", "", *(str(result["problems"]) for result in results)],
                  ["minutes", "", *(f"{report['seconds'][name] / 60:.1f}" for name in stages)])
    text += ["Held-out loss per token (late: at positions beyond the first stage's context):", ""]
    text += table(["stage", "source", "before", "after", "late, before", "late, after"],
                  *([name, source, *("-" if loss[key] is None else f"{loss[key]:.3f}"
                                     for key in ("before", "after", "late_before", "late_after"))]
                    for name, result in zip(stages, results) for source, loss in result["loss"].items()))
    with open(os.path.join(out, "report.md.tmp"), "w") as file:
        file.write("\n".join(text))
    os.replace(os.path.join(out, "report.md.tmp"), os.path.join(out, "report.md"))
    draw_report(out, report, stages)


def draw_report(out, report, stages):
    """report.png: what each stage solves.  loss.png: loss and balance over the steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(os.path.join(out, name + ".tmp"), format="png", dpi=110)
        plt.close(figure)
        os.replace(os.path.join(out, name + ".tmp"), os.path.join(out, name))

    tasks, width = list(report["stages"][stages[-1]]["tasks"]), 0.8 / len(stages)
    figure, axis = plt.subplots(figsize=(9, 4))
    for i, stage in enumerate(stages):
        solved = [report["stages"][stage]["tasks"].get(task, 0) for task in tasks]
        place = np.arange(len(tasks)) + (i - (len(stages) - 1) / 2) * width
        axis.bar_label(axis.bar(place, solved, width, label=f"after {stage}"), fmt="%.2f", fontsize=7)
    chance = list(report["stages"][stages[-1]]["chance"].values())
    axis.hlines(chance, np.arange(len(tasks)) - 0.45, np.arange(len(tasks)) + 0.45, "black", "dotted", label="chance")
    axis.set_xticks(range(len(tasks)), tasks, rotation=20)
    axis.set(ylim=(0, 1.05), ylabel="pass@1", title="Held-out problems solved, one sample at temperature 1")
    axis.legend()
    save(figure, "report.png")

    log, start = read_log(out), 0
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=[2, 1])
    for stage in STAGES:
        rows = [row for row in log if row["stage"] == stage]
        if rows:
            steps = [start + int(row["step"]) for row in rows]
            loss = np.array([float(row["loss"]) for row in rows])
            smooth = np.convolve(np.pad(loss, 7, "edge"), np.ones(15) / 15, "valid")
            line, = top.plot(steps, smooth, label=stage)
            top.plot(steps, loss, color=line.get_color(), alpha=0.25, linewidth=0.7)
            bottom.plot(steps, [float(row["entropy"]) for row in rows], color=line.get_color())
            start = steps[-1]
    top.set(ylabel="training loss (nats per token)", title=f"{report['preset']}, seed {report['seed']}")
    top.legend()
    bottom.set(xlabel="step", ylabel="expert load entropy\n(1 = even)", ylim=(None, 1.01))
    bottom.axhline(1, color="gray", linewidth=0.5)
    save(figure, "loss.png")


def main(arguments=None):
    config, changes = parse_arguments(arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("train.py runs in one process so far; start it without torchrun")
    for path in config.data:
        if not os.path.isfile(path):
            raise SystemExit(f"--data {path}: no such file")
        if not path.endswith((".txt", ".jsonl")):
            raise SystemExit(f"--data {path}: .txt and .jsonl files are read; rename or convert it")
    begun = time.perf_counter()
    device, dtype, why = choose_device(config)
    os.makedirs(config.out, exist_ok=True)
    print(why)
    print("settings: " + ", ".join(f"{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(config)))
    report_path = os.path.join(config.out, "report.json")
    report = {"preset": config.preset, "seed": config.seed, "seconds": {}, "params": {}, "stages": {}, "ttc": []}
    if os.path.exists(report_path):
        with open(report_path) as file:
            report = {**json.load(file), "preset": config.preset, "seed": config.seed}
    wanted, model = [name for name in STAGES if name in config.stages.split(",")], None
    tasks = task_names(config.tasks)
    for name in wanted:
        folder, stage = os.path.join(config.out, name), stage_settings(config, name)
        found = load_checkpoint(folder, device)
        if found:
            model, tokenizer, state = found
            check_same_run(folder, name, state, model, config, changes)
        elif name == STAGES[0]:
            tokenizer = make_tokenizer(config, changes.get("vocab_size"))
            model, state = new_model(config, changes, tokenizer).to(device), None
            print(f"the first loss should be near ln({tokenizer.vocab_size}) = {math.log(tokenizer.vocab_size):.2f}, "
                  "or up to half a nat above it: random logits have a variance near 1")
        else:
            before = STAGES[STAGES.index(name) - 1]
            if not (found := load_checkpoint(os.path.join(config.out, before), device)):
                raise SystemExit(f"{name} goes on from {before}, but that is not in {config.out}: "
                                 f"run --stages {before} first")
            model, tokenizer, state = found
            if not (state and state.get("done")):
                raise SystemExit(f"{before} in {config.out} is not finished: run --stages {before} first")
            check_same_run(os.path.join(config.out, before), before, state, model, config, changes)
            state = None
        if name == wanted[0]:
            counts = model.parameter_counts()
            report["params"] = {"total": counts["total"], "active": counts["active"]}
            print(f"{counts['total'] / 1e6:.2f}M parameters, {counts['active'] / 1e6:.2f}M active per token (without "
                  f"the embedding), vocabulary {tokenizer.vocab_size}")
        if state is None:                                       # what an older run in this folder reported is gone
            for later in STAGES[STAGES.index(name):]:
                report["stages"].pop(later, None)
                report["seconds"].pop(later, None)
        if state and state.get("done") and name in report["stages"]:
            print(f"{name}: done before, {report['stages'][name]['pass@1']:.3f} pass@1")
            continue
        if not (state and state.get("done")):
            state = run_stage(name, config, stage, model, tokenizer, state, device, dtype)
        result = pass_at_1(model, tokenizer, tasks, config.eval_problems, config.eval_samples) \
            if tasks and config.eval_problems and config.eval_samples else \
            {"pass@1": 0.0, "ci95": [0.0, 0.0], "problems": 0, "tasks": {}, "chance": {}}
        result["loss"] = {source: {"before": state["before"][source]["loss"], "after": after["loss"],
                                   "late_before": state["before"][source]["late"], "late_after": after["late"]}
                          for source, after in state["after"].items()}
        report["seconds"][name], report["stages"][name] = state["seconds"], result
        write_report(config.out, report)
        losses = ", ".join(f"{source} {l['before']:.2f} -> {l['after']:.2f}" for source, l in result["loss"].items())
        print(f"{name}: {state['seconds']:.0f} s | held-out loss {losses} | "
              "pass@1 {pass@1:.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}] on {problems} held-out problems".format(**result))
    if not any(os.path.exists(os.path.join(config.out, later)) for later in STAGES[STAGES.index(name) + 1:]):
        save_checkpoint(os.path.join(config.out, "final"), model, tokenizer)
    with open(os.path.join(config.out, "report.md")) as file:
        print("\n" + file.read())
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes in all; {config.out} holds final/ (the checkpoint), "
          "report.md, report.png, loss.png, log.csv")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on from the last checkpoint") from None
