"""Train ZAYA1 from random weights: data, tasks, answer-preserving trimming, Muon, and the stages one after another.

    python train.py                     every stage at preset tiny, into out/tiny; goes on where it stopped
    python train.py --stages evaluate   its last stage alone: Markovian RSA and its alternatives on held-out problems
    python train.py --preset smoke      the same path in a minute
    python train.py --data my.jsonl --out out/mine --stages pretrain,midtrain
    torchrun --nproc_per_node 8 train.py …      the same run, its work shared out to 8 processes

TR section III: pretraining at a short context, then midtraining at a longer one with a larger RoPE base and mostly
long chains of thought, each trimmed so that the answer survives, then SFT on chats.  TR section IV: four stages of
reinforcement learning on one spine, in which Actor samples groups of rollouts and rl_step learns from them.  A run is a
pure function of its settings and seed: no hidden state, so a killed run goes on bit for bit.

Read in this order: settings, tasks, data (trim, pack, sources), Muon, run_stage, the RL formulas, Actor, rl_step,
run_rl, main; many processes when you need them.  Does NOT include: sharded weights, tensor or context parallelism.
"""
import argparse
import codecs
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import difflib
import errno
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from dataclasses import dataclass, field

# Threads that wait asleep: on a busy machine spinning ones made a step 3 to 60 times slower, on an idle one they gain
# nothing.  It has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from tqdm import tqdm

from kernels import Damaged, compile_loss, fuse, plain_errors, read_json, summed_loss, should_compile
from rsa import (BUDGETS, Budget, Checkpoint, count_tokens, cut_tail, interval, left_padded, markovian_rsa, prompt_ids,
                 reply, terse_prompt)
from zaya import Cache, Layer, PIDBalancer, Tokenizer, Zaya, ZayaConfig

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
    aggregation: float = 0.0                # share of problems, of the tasks that read, with other candidates' tails …
    tail: int = 24                          # … of this many tokens …
    candidates: tuple = (1, 2, 3, 4, 4)     # … of one of these numbers of candidates


@dataclass
class RLStage:
    """What one RL stage asks, and how long.  A step trains on `groups` prompts with `group_size` rollouts each."""
    steps: int
    context: int                            # of a reply, tokens
    rope_theta: float
    lr: float
    lr_end: float
    tasks: tuple
    groups: int
    group_size: int
    aggregation: float = 0.0                # share of prompts made of the model's own earlier tails …
    tail: int = 24                          # … of this many tokens
    adaptive: bool = False
    length_reward: float = 0.1
    reward_model_steps: int = 0             # 0: rewards are the verifiers'


@dataclass
class Evaluation:
    """Test-time compute on held-out problems harder than those RL trained on."""
    tasks: dict                             # difficulty by task
    problems: int                           # of each task
    budget: Budget                          # N, C, T, beta and tau of the headline …
    most_rounds: int = 4                    # … and T of Markovian RSA's curve


STAGES = ["pretrain", "midtrain", "sft", "warmup", "rlve", "mathcode", "behavior"]
MATH, PUZZLES = ("column_sums", "add", "countdown"), ("sort", "sat")
CODE = ("registers", "program", "synthesize", "falsify")        # CodeI/O, standard, CodeARC, breaking
# RL leaves out "find": rewarding only complete answers would teach the model never to write "." (not solved), and
# aggregation needs those honest gaps.
REASONING = MATH + PUZZLES + CODE


def rl_stages(steps, context, rope_theta, lr, groups, group_size, reward_model_steps, tail):
    """The four stages of the cascade (TR section IV): `steps`, `context` and `lr` one each, the rest shared."""
    def stage(index, tasks, **more):
        return RLStage(steps[index], context[index], rope_theta, lr[index], lr[index] / 5, tasks, groups, group_size,
                       tail=tail, **more)
    return dict(warmup=stage(0, MATH + PUZZLES), rlve=stage(1, REASONING, adaptive=True, aggregation=0.25),
                mathcode=stage(2, MATH + CODE, aggregation=0.4),
                behavior=stage(3, ("constraints",), length_reward=0.0, reward_model_steps=reward_model_steps))


# lr: one value for Muon and AdamW, whose update sizes are matched.  balancer_lr: AMD Primus' 1e-3 at full size; a run
# of a thousand steps needs larger ones.  zaya1-8b has the report's own contexts, bases and rates (TR section III), but
# not its 13.2T tokens.
PRESETS = {
    "smoke": dict(
        tokens_per_step=1024, text_bytes=300_000, balancer_lr=1e-2, eval_problems=4, eval_samples=2,
        evaluate=Evaluation(dict(find=1, column_sums=2), 4, Budget(4, 2, 1, 64, 8), 2),
        stages=dict(pretrain=Stage(30, 128, 1e4, 0.5, 8e-3, 3e-3, 2, 1),
                    midtrain=Stage(15, 256, 1e5, 0.86, 3e-3, 1e-3, 4, 3),
                    sft=Stage(250, 256, 5e5, 1.0, 1e-2, 1e-3, 2, 1, True, 0.1, 8),
                    **rl_stages((4, 4, 4, 4), (64,) * 4, 5e5, (1e-3,) * 4, 2, 4, 4, 8))),
    "tiny": dict(
        tokens_per_step=2048, text_bytes=4_000_000, balancer_lr=5e-3, eval_problems=30, eval_samples=4,
        evaluate=Evaluation(dict(find=6, synthesize=4, column_sums=10), 100, BUDGETS["tiny"]),
        stages=dict(pretrain=Stage(700, 256, 1e4, 0.6, 1e-2, 4e-3, 4, 1),
                    midtrain=Stage(400, 1024, 1e5, 0.86, 6e-3, 1e-3, 8, 8),
                    sft=Stage(2400, 256, 5e5, 0.9, 6e-3, 5e-4, 10, 2, True, 0.45),
                    **rl_stages((36, 110, 130, 40), (96,) * 4, 5e5, (2e-3, 2e-3, 2e-3, 7e-4), 16, 8, 60, 24))),
    "small": dict(
        tokens_per_step=131_072, text_bytes=400_000_000, balancer_lr=1e-3, eval_problems=100, eval_samples=4,
        evaluate=Evaluation(dict(find=12, synthesize=8, column_sums=20), 100, Budget(16, 4, 2, 1024, 64)),
        stages=dict(pretrain=Stage(20_000, 1024, 1e4, 0.5, 2e-3, 6e-4, 8, 2),
                    midtrain=Stage(5_000, 4096, 1e6, 0.86, 6e-4, 2e-4, 16, 16),
                    sft=Stage(3_000, 4096, 5e6, 0.9, 3e-4, 3e-5, 8, 4, True, 0.25, 64),
                    **rl_stages((200, 400, 400, 200), (1024,) * 4, 5e6, (1e-4,) * 4, 32, 16, 500, 64))),
    "zaya1-8b": dict(
        tokens_per_step=4_194_304, text_bytes=10**12, balancer_lr=1e-3, eval_problems=100, eval_samples=4,
        evaluate=Evaluation(dict(find=24, synthesize=12, column_sums=30), 100, BUDGETS["default"]),
        stages=dict(pretrain=Stage(100_000, 4096, 1e4, 0.5, 6e-4, 2e-4, 8, 2),
                    midtrain=Stage(20_000, 32768, 1e6, 0.86, 2e-4, 1e-4, 32, 64),
                    sft=Stage(10_000, 131072, 5e6, 0.75, 1e-4, 1e-5, 32, 64, True, 0.25, 4096),
                    **rl_stages((232, 400, 848, 384), (65536,) * 4, 5e6, (1e-5, 1e-5, 5e-6, 2e-6), 128, 16, 1000,
                                4096))),
}


def option(default, help, group, type=None, least=None, most=2**31 - 1):
    """A setting with its place in -h; a number has a `least` and a `most`, and nan lies between none."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata=dict(help=help, group=group, type=type, least=least, most=most))


@dataclass
class TrainConfig:
    """Every setting of a run; the command line is built from these fields.  None: the preset decides."""
    preset: str = option("tiny", "smoke, tiny, small or zaya1-8b: the model's shape and the stages' lengths", "run")
    stages: str = option(",".join([*STAGES, "evaluate"]), "which stages, in this order; evaluate measures test-time "
                         "compute", "run")
    out: str = option(None, "folder of the run, default out/<preset>; an existing run goes on", "run", str)
    seed: int = option(0, "seed of the weights, the data order and the sampled answers", "run", least=0,
                       most=2**63 - 1)
    device: str = option("auto", "cpu, cuda (CUDA and ROCm alike) or mps", "run")
    shard: int = option(0, "torchrun: processes that share one copy of the weights, such as a node's; 0: all", "run",
                        least=0)
    dtype: str = option("auto", "float32 or bfloat16 (autocast; weights stay float32)", "run")
    data: list = option([], "your own .txt, .jsonl and .json files, instead of the text that Python brings", "data")
    tasks: str = option("all", "generated reasoning problems: all, none, or names such as add,sort", "data")
    tokenizer: str = option(None, "a tiktoken encoding such as gpt2; default: train one on the data", "data", str)
    skip_bad_lines: bool = option(False, "skip and count unreadable lines of --data instead of stopping", "data")
    steps: dict = option(None, "optimizer steps: 500, or pretrain=500,midtrain=200", "training", int, least=1)
    context: dict = option(None, "tokens a sample may have, likewise per stage", "training", int, least=2)
    lr: dict = option(None, "peak learning rate, likewise per stage (0.2 x lr is an update's RMS)", "training", float,
                      least=0, most=10)
    tokens_per_step: int = option(None, "tokens in one optimizer step", "training", int, least=1)
    micro_batch: int = option(None, "most tokens in one forward pass; a step adds up several", "training", int, least=1)
    groups: int = option(None, "prompts in one step of reinforcement learning", "training", int, least=1)
    group_size: int = option(None, "rollouts of one prompt", "training", int, least=2)
    weight_decay: float = option(0.1, "decoupled weight decay on matrices", "training", least=0, most=10)
    grad_clip: float = option(1.0, "largest gradient norm; 0: gradients stay as they are", "training", least=0,
                              most=1e9)
    balancer_lr: float = option(None, "learning rate of the router's balancing biases", "training", float, least=0,
                                most=1)
    log_every: int = option(20, "print a line every so many steps, RL every quarter of it", "bookkeeping", least=1)
    save_every: int = option(100, "write a checkpoint every so many steps, RL a fifth of it", "bookkeeping", least=1)
    eval_problems: int = option(None, "held-out problems per task", "bookkeeping", int, least=0)
    eval_samples: int = option(None, "sampled answers per held-out problem", "bookkeeping", int, least=0)


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
        if name not in [*STAGES, "evaluate"]:
            close = difflib.get_close_matches(name, [*STAGES, "evaluate"], 1, 0)
            raise SystemExit(f"--stages {config.stages}: no stage {name!r}; did you mean {close[0]}? "
                             f"There are {', '.join([*STAGES, 'evaluate'])}")
    config.out = config.out or os.path.join("out", config.preset)
    for name in ("tokens_per_step", "balancer_lr", "eval_problems", "eval_samples"):
        if getattr(config, name) is None:
            setattr(config, name, preset[name])
    for name in ("groups", "group_size"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(preset["stages"]["warmup"], name))
    for name in ("steps", "context", "lr"):
        given = getattr(config, name) or {}
        setattr(config, name, {stage: given.get(stage, given.get(None, getattr(preset["stages"][stage], name)))
                               for stage in STAGES})
    config.micro_batch = config.micro_batch or max(16384, *config.context.values())
    for setting in dataclasses.fields(TrainConfig):
        value, least, most = getattr(config, setting.name), setting.metadata["least"], setting.metadata["most"]
        for number in () if least is None else value.values() if isinstance(value, dict) else [value]:
            if not least <= number <= most:
                raise SystemExit(f"--{setting.name.replace('_', '-')} {number} must be at least {least} and at most "
                                 f"{most}")
    for name in (name for name in STAGES if name in config.stages.split(",")):
        context = config.context[name]
        supervised = not isinstance(preset["stages"][name], RLStage)
        if supervised and (config.tokens_per_step % context or config.micro_batch < context):
            raise SystemExit(f"--tokens-per-step {config.tokens_per_step} must be a multiple of {name}'s context "
                             f"({context}), and --micro-batch {config.micro_batch} at least as long")
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise SystemExit(f"--device {config.device}: there are auto, cpu, cuda and mps")
    if len(set(config.data)) < len(config.data):
        raise SystemExit("--data names a file twice")
    return config


def stages_to_run(config):
    """The stages there are, and those of them that were asked for; an RL stage without any of --tasks is left out."""
    there = []
    for name in STAGES:
        asks = getattr(stage_settings(config, name), "tasks", None)
        if asks != ():
            there.append(name)
        elif name in config.stages.split(","):
            print(f"{name} is left out: --tasks {config.tasks} has none of what it asks, "
                  + ", ".join(PRESETS[config.preset]["stages"][name].tasks))
    return there, [name for name in there if name in config.stages.split(",")]


def stage_settings(config, name):
    """The preset's Stage with the command line's changes in it; the final rate keeps its ratio to the peak."""
    stage = PRESETS[config.preset]["stages"][name]
    lr = config.lr[name]
    if isinstance(stage, RLStage):
        names = [n for n in task_names(config.tasks) if n in stage.tasks or
                 (n.startswith("reasoning_gym:") and not stage.reward_model_steps)]
        stage = dataclasses.replace(stage, tasks=tuple(names), groups=config.groups, group_size=config.group_size)
    return dataclasses.replace(stage, steps=config.steps[name], context=config.context[name], lr=lr,
                               lr_end=lr * stage.lr_end / stage.lr)


# ---- data: trimming, packing, sources -------------------------------------------------------------------------------


THINK = re.compile("<think>(.*?)</think>", re.DOTALL)


def split_think(content):
    """'<think>reasoning</think>answer' -> ('reasoning', 'answer'), several blocks joined; none: ('', content)."""
    pieces = THINK.split(content)                               # answer, reasoning, answer, reasoning, …, answer
    return "".join(pieces[1::2]), "".join(pieces[::2])


def cut_reasoning(messages, context, tokenizer):
    """Cut the last turn's reasoning from its end until the conversation just fits -> messages, or None if it cannot."""
    *earlier, last = messages
    if last["role"] != "assistant":
        return None
    pieces = THINK.split(last["content"])
    blocks = [tokenizer.encode(reasoning) for reasoning in pieces[1::2]]

    def keep(count):
        """The conversation with the first `count` tokens of its last turn's reasoning, each block where it was."""
        content = pieces[0]
        for ids, answer in zip(blocks, pieces[2::2]):
            if count > 0:
                content += f"<think>{tokenizer.decode_bytes(ids[:count]).decode('utf-8', 'ignore')}</think>"
            content += answer
            count -= len(ids)
        return [*earlier, {**last, "content": content}]

    def fits(count):
        return len(tokenizer.render(keep(count))[0]) <= context

    # A cut text can encode to a token more or less than it had inside the whole one, so we try both directions.
    total = sum(map(len, blocks))
    count = max(0, total + context - len(tokenizer.render(messages)[0]))
    while count > 0 and not fits(count):
        count -= 1
    while count < total and fits(count + 1):
        count += 1
    return keep(count) if fits(count) else None


def trim(messages, context, tokenizer):
    """Answer-preserving trimming: make a conversation fit `context` tokens without losing a question or an answer.

    1. It fits: keep it.  2. Else cut the last assistant turn's reasoning from its end, so that it just fits; the start
    of the reasoning and the whole answer stay.  3. Still too long: remove the <think> blocks of earlier turns, then
    try 2 again.  4. Questions and answers alone are too long: drop it.  (TR section III.)

    messages [{"role", "content"}, …] -> (messages, "kept" | "cut" | "stripped" | "dropped"); None when dropped.
    To copy it, take cut_reasoning and split_think along with THINK; the tokenizer needs encode(text) -> ids,
    decode_bytes(ids) -> bytes, and render(messages) -> (ids, targets), of which only the number of ids counts.

    >>> byte = Tokenizer({bytes([i]): i for i in range(256)})             # one token per character
    >>> talk = [dict(role="user", content="7+5?"), dict(role="assistant", content="<think>seven, five</think>12")]
    >>> len(byte.render(talk)[0])                                           # 4 + 11 + 2 characters, 6 special tokens
    23
    >>> trim(talk, 23, byte)[1], trim(talk, 9, byte)
    ('kept', (None, 'dropped'))
    >>> trim(talk, 17, byte)[0][1]["content"], trim(talk, 17, byte)[1]
    ('<think>seven</think>12', 'cut')
    """
    if len(tokenizer.render(messages)[0]) <= context:
        return messages, "kept"
    short = cut_reasoning(messages, context, tokenizer)
    if short:
        return short, "cut"
    stripped = []
    for message in messages[:-1]:
        if message["role"] == "assistant":
            message = {**message, "content": split_think(message["content"])[1]}
        stripped.append(message)
    stripped.append(messages[-1])
    if len(tokenizer.render(stripped)[0]) <= context:
        return stripped, "stripped"
    short = cut_reasoning(stripped, context, tokenizer)
    return (short, "stripped") if short else (None, "dropped")


def pack(lengths, capacity, bins):
    """Best-fit decreasing: the longest sample first, each into the fullest bin that still takes it whole.

    Returns at most `bins` lists of indices; a sample that fits nowhere is in none of them.  Needs nothing else.

    >>> pack([5, 3, 6, 2, 4], capacity=8, bins=2)
    [[2, 3], [0, 1]]
    """
    rows, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[index]]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
        elif len(rows) < bins and lengths[index] <= capacity:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        else:
            continue
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


# The names that other people's data sets use: for a question and its answer, for other fields, and for the roles.
PAIRS = [("question", "answer"), ("problem", "solution"), ("prompt", "completion"), ("problem", "answer"),
         ("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("query", "response")]
ALIASES = {"conversations": "messages", "system_prompt": "system", "passage": "context",
           "reasoning_content": "reasoning", "thinking": "reasoning", "from": "role", "value": "content",
           "train": "weight", "loss": "weight"}
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "tool": "user", "function": "user",
         "observation": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
METADATA = re.compile(r"(?!image|audio|video)(.+_)?(ids?|idx|index|uuid|source|dataset|split|type|topic|subject|tags?|"
                      r"category|domain|level|difficulty|score|rating|lang|language|license|version|date|time|timestamp)|"
                      r"urls?|links?|author|model|meta.*", re.I)


def known_fields(values, where):
    """A JSON object's fields under our names, without empty ones."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a JSON object is needed, this is a {type(values).__name__}")
    found = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name != "content" and value in (None, "", [], {}):
            continue
        if name in found and found[name] != value:
            raise ValueError(f"{where} has two fields for its {name} that differ: keep one")
        found[name] = value
    return found


def refuse_unused(unused, where, texts=()):
    """ValueError for a field that no message was made of, unless it is a number, METADATA, or in `texts` already."""
    for key, value in unused.items():
        is_number = isinstance(value, (int, float)) and key != "weight"
        repeated = value in texts
        if key in itertools.chain(*PAIRS):                      # such as a short answer beside its worked solution
            repeated = any(str(value) in text for text in texts)
        if not (is_number or repeated or METADATA.fullmatch(key)):
            raise ValueError(f"{where} has a field {key!r} that would be lost: move what it says into a message, or "
                             "delete it")


def as_text(value, where):
    """A text, a number, or a list of parts {"type": "text", "text": …} -> the text; ValueError for anything else."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(as_text(part.get("text"), where) for part in value)
    elif type(value) in (int, float) and abs(value) < math.inf:
        value = str(value)
    if not isinstance(value, str) or re.search(r"[\0\ud800-\udfff]", value):
        raise ValueError(f"{where} must be a text of whole characters, this is {json.dumps(value)[:60]}")
    return value


def to_message(message, where):
    """One message in any spelling -> {"role", "content"}, and "weight": 0 if it must not be learned."""
    found = known_fields(message, where)
    given, content, weight = found.pop("role", None), found.pop("content", None), found.pop("weight", None)
    role = ROLES.get(str(given).lower())
    reasoning = found.pop("reasoning", "") if role == "assistant" else ""
    refuse_unused(found, where)
    if given is None or content is None:
        raise ValueError(f"{where} needs a 'role' and a 'content' that is a text")
    if role is None:
        raise ValueError(f"{where} has role {given!r}; there are {', '.join(ROLES)}")
    if weight not in (None, 0, 1):
        raise ValueError(f"{where} has weight {weight!r}; there are 0 and 1")
    content, reasoning = as_text(content, where), as_text(reasoning, f"the reasoning of {where}")
    if reasoning.strip() not in ("", split_think(content)[0].strip()):
        content = f"<think>{reasoning}</think>{content}"
    tags = re.findall("</?think>", content)
    if role == "assistant" and tags != ["<think>", "</think>"] * (len(tags) // 2):
        raise ValueError(f"{where} opens or closes <think> without the other")
    result = {"role": role, "content": content}
    if weight == 0:
        result["weight"] = 0
    return result


def pair_to_turns(row, found):
    """A question and its answer, taken out of `found` -> two turns."""
    pairs = [pair for pair in PAIRS if row.get(pair[0]) is not None and row.get(pair[1]) is not None]
    if not pairs:
        raise ValueError("no 'messages' with at least one, and no pair of texts such as question/answer, "
                         f"problem/solution, prompt/completion; its keys are {', '.join(list(row)[:6]) or 'none'}")
    keys = ("context", pairs[0][0], "input", "reasoning", pairs[0][1])
    *question, reasoning, answer = [as_text(found.pop(key, ""), repr(key)) for key in keys]
    # GSM8K writes the reasoning first and the answer on a last line of its own.
    gsm8k = re.fullmatch(r"(.+)\n#### ([^\n]+)\n?", answer, re.S)
    if gsm8k and not reasoning and "<think>" not in answer and "\n#### " not in gsm8k[1]:
        answer = f"<think>{gsm8k[1].strip()}</think>{gsm8k[2].strip()}"
    question = "\n\n".join(text for text in question if text.strip())
    return [{"role": "user", "content": question},
            {"role": "assistant", "content": answer, "reasoning": reasoning}]


def to_messages(row):
    """One JSON row -> messages.  ValueError says what is wrong with a row that we cannot use whole.

    A row has `messages` (or ShareGPT's `conversations`), or one of PAIRS with an optional `context`, `input` and
    `reasoning`; either can have a `system`.  Reasoning becomes <think>…</think>, tools speak as the user, and a message
    of weight 0 is read but not learned.  A field that we neither use nor know to be harmless refuses the row.

    >>> to_messages({"question": "1+1?", "answer": "One and one.\\n#### 2"})[1]["content"]      # GSM8K's form
    '<think>One and one.</think>2'
    """
    found = known_fields(row, "the row")
    system = found.pop("system", None)
    turns = found.pop("messages") if isinstance(found.get("messages"), list) else pair_to_turns(row, found)
    messages = [to_message(turn, f"message {number}") for number, turn in enumerate(turns)]
    if system is not None:
        system = {"role": "system", "content": as_text(system, "'system'")}
        if system not in messages:
            messages.insert(0, system)
    refuse_unused(found, "the row", [message["content"] for message in messages])
    return messages


def file_kind(path):
    """'txt', 'jsonl' or 'json' by the end of the name, a .gz after it left out; None for any other."""
    ending = re.search(r"\.(txt|jsonl?)(\.gz)?\Z", path, re.I)
    return ending and ending[1].lower()


@contextlib.contextmanager
def opened(path):
    """The file's bytes, unpacked if its name ends with .gz."""
    try:
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SystemExit(f"{path} is damaged: {error}") from None


def read_text(path):
    """Yield a .txt file in pieces of a megabyte.  What is not UTF-8 is an error: nobody should learn to write �."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    with opened(path) as file:
        while piece := file.read(1 << 20):
            piece += file.readline(1 << 16)                     # a piece should not end inside a word
            try:
                if b"\0" in piece:                              # UTF-16 can be valid UTF-8, but has these
                    nul = piece.index(b"\0")
                    raise UnicodeDecodeError("utf-8", piece, nul, nul + 1, "a NUL is no text")
                yield decoder.decode(piece, final=not file.peek(1))
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise SystemExit(f"{path}:{line}: {error}. Save the file as UTF-8") from None
            line += piece.count(b"\n")


def read_jsonl(path, skip_bad_lines=False):
    """Yield the messages of each line, or of each row of a .json file's array.  A bad one stops the run, or is skipped
    and counted."""
    bad, is_json = 0, file_kind(path) == "json"
    with opened(path) as rows:
        if is_json:
            try:
                rows = json.loads(rows.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise SystemExit(f"{path}: {error}. If it has a row a line, name it .jsonl") from None
            rows = rows if isinstance(rows, list) else [rows]
        for number, row in enumerate(rows, 1):
            try:
                if is_json:
                    yield to_messages(row)
                elif row.strip():
                    yield to_messages(json.loads(row.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:       # JSON and UTF-8 errors are ValueErrors too
                if not skip_bad_lines:
                    place = f"{path}:row {number}" if is_json else f"{path}:{number}"
                    raise SystemExit(f"{place}: {error}. Mend the line, or pass --skip-bad-lines") from None
                bad += 1
    if bad:
        print(f"{path}: skipped {bad} bad line{'s' if bad > 1 else ''}")


def python_text(limit):
    """Text that every Python brings: English (the language reference in pydoc) and code (the standard library)."""
    import pydoc_data.topics
    import sysconfig
    topics = pydoc_data.topics.topics
    english = "\n\n".join(topics[name] for name in sorted(topics))[:limit // 2]
    code, size, root = [], 0, sysconfig.get_path("stdlib")
    for folder in ("", "asyncio", "collections", "email", "html", "http", "importlib", "json", "logging",
                   "multiprocessing", "unittest", "urllib", "xml/dom", "xml/etree"):
        for name in sorted(os.listdir(os.path.join(root, folder))):
            if name.endswith(".py") and size < limit - len(english):
                with open(os.path.join(root, folder, name), encoding="utf-8", errors="replace") as file:
                    code.append(file.read())
                size += len(code[-1])
    return {"english": english, "code": "\n\n".join(code)}


# A source numbers its samples.  size(held_out) says how many there are, None: without end.  get(index, held_out) gives
# a sample's ids, and for each whether the assistant wrote it (None: never to be learned).  Samples with held_out=True
# are never trained on.

class FileSource:
    """Samples that lie one after another in an array of tokens; every twentieth is held out.

    offsets: sample i is tokens[offsets[i]:offsets[i + 1]], a conversation or a window of a text.  targets: 1 for tokens
    that the assistant wrote, 0 for others, 2 if nobody shall learn it; None for a text, of which every token counts.
    """

    def __init__(self, name, tokens, offsets, targets=None):
        self.name, self.tokens, self.offsets, self.targets = name, tokens, offsets, targets
        self.is_traces, self.count = targets is not None, len(offsets) - 1
        # What tells changed data from the old: the length, and a hash of up to a million tokens.
        some = np.ascontiguousarray(tokens[::max(1, len(tokens) // 1_000_000)])
        self.fingerprint = f"{len(tokens)} {hashlib.md5(some.tobytes()).hexdigest()}"

    def size(self, held_out):
        held = self.count // 20
        if not self.is_traces and self.count > 1:
            held = max(held, 1)                                 # of a short text, the last window
        return held if held_out else self.count - held

    def get(self, index, held_out):
        i = index + index // 19                                 # jumps over the twentieth, fortieth, …
        if held_out:
            i = min(20 * index + 19, self.count - 1)
        part = slice(self.offsets[i], self.offsets[i + 1])
        ids = self.tokens[part].tolist()
        if self.targets is None:
            return ids, [True] * len(ids)
        return ids, [None if code == 2 else bool(code) for code in self.targets[part]]


def windows(tokens, context):
    """Offsets that cut a text into windows of `context` tokens; the last one may be shorter."""
    return np.append(np.arange(0, len(tokens), context), len(tokens))


class TaskSource:
    """Endless conversations about generated problems, solved by the teacher, trimmed to the context."""
    name, is_traces = "traces", True

    def __init__(self, tasks, stage, tokenizer, seed):
        self.tasks, self.stage, self.tokenizer, self.seed = tasks, stage, tokenizer, seed
        self.fingerprint = ",".join(tasks)
        self.trim_counts = collections.Counter(kept=0, cut=0, stripped=0, dropped=0)

    def size(self, held_out):
        return None

    def get(self, index, held_out):
        for attempt in range(100):                              # a dropped conversation gives way to the next one
            rng = random.Random(f"{self.seed} {held_out} {index} {attempt}")
            messages = []
            for _ in range(rng.randint(1, self.stage.turns)):
                question, answer = self.exchange(rng, held_out)
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            messages, verdict = trim(messages, self.stage.context, self.tokenizer)
            self.trim_counts[verdict] += 1
            if messages:
                return self.tokenizer.render(messages)
        raise SystemExit(f"no generated conversation fits --context {self.stage.context}; make it longer")

    def exchange(self, rng, held_out):
        """One problem and the teacher's reply to it.

        A share `aggregation` of them prepares the model for Markovian RSA: the prompt shows the tails of right and of
        wrong replies, and the answer is as right as a reader of those replies can be.
        """
        readers = [name for name in self.tasks if find_task(name).reads]
        aggregates = bool(readers) and rng.random() < self.stage.aggregation
        task = find_task(rng.choice(readers if aggregates else self.tasks))
        # The smaller of two draws: easy problems come more often, and the share falls gently up to the hardest.
        hardest = self.stage.difficulty
        d = min(rng.randint(1, hardest), rng.randint(1, hardest), task.hardest)
        problem = draw(task, rng.getrandbits(48), d, held_out)
        if not aggregates:
            return problem.prompt, task.solve(problem, rng.getrandbits(48))
        replies = []
        for _ in range(rng.choice(self.stage.candidates)):
            write = task.good_rollout if rng.random() < 0.5 else task.corrupt
            replies.append(write(problem, rng.getrandbits(48)))
        tails = [cut_tail(reply, self.stage.tail, self.tokenizer) for reply in replies]
        return terse_prompt(problem.prompt, tails), task.aggregate(problem, replies, rng.getrandbits(48))


def tokenise(path, stem, dtype, tokenizer, context, skip_bad_lines):
    """Write a file's tokens to stem.tokens, those of a text a megabyte at a time: several GB never sit in memory.

    Conversations are trimmed, and get .targets and .offsets as FileSource wants them.  Returns how trimming went.
    """
    counts, offsets = collections.Counter(kept=0, cut=0, stripped=0, dropped=0), [0]
    with open(stem + ".tokens", "wb") as tokens, open(stem + ".targets", "wb") as targets:
        if file_kind(path) == "txt":
            for piece in tqdm(read_text(path), desc=f"tokenising {path}", unit=" MB", disable=None):
                np.array(tokenizer.encode(piece), dtype).tofile(tokens)
            return {}
        for messages in tqdm(read_jsonl(path, skip_bad_lines), desc=f"tokenising {path}", unit=" rows", disable=None):
            messages, verdict = trim(messages, context, tokenizer)
            counts[verdict] += 1
            if not messages:
                continue
            for message in messages:
                ids, wanted = tokenizer.render([message])
                np.array(ids, dtype).tofile(tokens)
                np.array([2] * len(ids) if "weight" in message else wanted, np.uint8).tofile(targets)
            offsets.append(tokens.tell() // dtype.itemsize)
    np.array(offsets, np.int64).tofile(stem + ".offsets")
    return counts


def cached_tokens(path, folder, tokenizer, context, skip_bad_lines):
    """Tokenise a file once into memory-mapped arrays in `folder` -> FileSource's (tokens, offsets, targets).

    The arrays' name depends on all that their content depends on, so a changed file, vocabulary or context makes new
    ones.
    """
    is_chat, about = file_kind(path) != "txt", os.stat(path)
    identity = [os.path.abspath(path), about.st_size, about.st_mtime_ns, is_chat and context, skip_bad_lines,
                sorted(tokenizer.ranks.items())]
    stem = os.path.join(folder, f"{os.path.basename(path)}-{hashlib.md5(repr(identity).encode()).hexdigest()[:12]}")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
    if is_main() and not os.path.exists(stem + ".json"):
        os.makedirs(folder, exist_ok=True)
        counts = tokenise(path, stem, dtype, tokenizer, context, skip_bad_lines)
        write_json(stem + ".json", counts)                      # comes last, so it says that the arrays are complete
    barrier()
    if is_chat:
        counts = ", ".join(f"{n} {verdict}" for verdict, n in read_json(stem + ".json").items())
        print(f"{path}, trimmed to {context} tokens: {counts}")
    if os.path.getsize(stem + ".tokens") == 0:
        why = f"it has no row that is good and fits {context}" if is_chat else "it is empty"
        raise SystemExit(f"{path} gave no tokens: {why}")
    tokens = np.memmap(stem + ".tokens", dtype, "r")
    if not is_chat:
        return tokens, windows(tokens, context), None
    return tokens, np.fromfile(stem + ".offsets", np.int64), np.memmap(stem + ".targets", np.uint8, "r")


def make_sources(config, stage, tokenizer):
    """The stage's sources: --data files or Python's own text, and the generated problems."""
    sources, folder = [], os.path.join(config.out, "data")
    names = [os.path.basename(path) for path in config.data]
    for path, name in zip(config.data, names):
        arrays = cached_tokens(path, folder, tokenizer, stage.context, config.skip_bad_lines)
        sources.append(FileSource(path if names.count(name) > 1 else name, *arrays))
    if not config.data:
        for name, text in python_text(PRESETS[config.preset]["text_bytes"]).items():
            tokens = np.array(tokenizer.encode(text), np.uint32)
            sources.append(FileSource(name, tokens, windows(tokens, stage.context)))
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
        if name.startswith("reasoning_gym:"):
            find_task(name)                                     # says what is missing
        elif name not in TASKS:
            close, = difflib.get_close_matches(name, TASKS, 1, 0)
            raise SystemExit(f"--tasks {text}: no task {name!r}; did you mean {close}? There are {', '.join(TASKS)}")
    return names


@functools.lru_cache(maxsize=16)
def epoch_order(seed, epoch, size):
    return np.random.default_rng([seed, epoch, size]).permutation(size)


class Loader:
    """Packs samples from several sources into fixed-size batches, in the stage's proportions.

    Checkpoint state: how many tokens and samples each source has given, plus the leftovers that did not fit the last
    batch.  Needs pack, and sources with name, is_traces, size and get.
    """

    def __init__(self, sources, stage, tokens_per_step, seed, pad, held_out=False):
        self.sources = {source.name: source for source in sources}
        self.stage, self.seed, self.pad, self.held_out = stage, seed, pad, held_out
        self.context, self.rows = stage.context, tokens_per_step // stage.context
        traces = [source.name for source in sources if source.is_traces]
        texts = {source.name: source.size(held_out) for source in sources if not source.is_traces}
        share = stage.traces if traces and texts else float(bool(traces))
        # Sources of traces count alike.  Texts count by their size, so that none is read more often than another.
        self.weight = {name: share / len(traces) for name in traces}
        for name, size in texts.items():
            self.weight[name] = (1 - share) * size / sum(texts.values())
        self.given = dict.fromkeys(self.sources, 0)             # tokens
        self.drawn = dict.fromkeys(self.sources, 0)             # samples
        self.waiting = []                                       # ((source name, sample number), ids, by assistant)

    def sample(self, name, number):
        """Sample `number` of a source, in an order that is shuffled anew in each epoch."""
        source = self.sources[name]
        size = source.size(self.held_out)
        if size is None:
            return source.get(number, self.held_out)
        epoch, place = divmod(number, size)
        return source.get(int(epoch_order(self.seed, epoch, size)[place]), self.held_out)

    def draw_samples(self):
        """Fill `waiting` with 1.05 times the tokens of a batch: with some choice, packing leaves hardly a gap."""
        tokens = sum(len(ids) for _, ids, _ in self.waiting)
        while tokens < self.rows * self.context * 1.05:
            # The source that is furthest behind its share of all tokens comes next.
            total = sum(self.given.values()) + 1
            name = min(self.given, key=lambda n: self.given[n] - self.weight[n] * total)
            ids, by_assistant = self.sample(name, self.drawn[name])
            self.waiting.append(((name, self.drawn[name]), ids, by_assistant))
            self.drawn[name] += 1
            self.given[name] += len(ids)
            tokens += len(ids)

    def next(self):
        """-> input_ids, targets, position_ids (rows, context) int64, and where the samples came from.

        targets: the next token, -100 where there is none in this sample or it does not count.
        position_ids restart with each sample and are -1 on padding, so nothing leaks from one into the next.
        """
        self.draw_samples()
        rows = pack([len(ids) for _, ids, _ in self.waiting], self.context, self.rows)
        inputs = np.full((self.rows, self.context), self.pad, np.int64)
        targets, positions = np.full_like(inputs, -100), np.full_like(inputs, -1)
        for row, members in enumerate(rows):
            start = 0
            for index in members:
                _, ids, counts = self.waiting[index]
                if not self.stage.mask_prompts:                 # then the prompt's tokens count too
                    counts = [by_assistant is not None for by_assistant in counts]
                end = start + len(ids)
                inputs[row, start:end] = ids
                targets[row, start:end - 1] = np.where(np.array(counts[1:], bool), ids[1:], -100)
                positions[row, start:end] = np.arange(len(ids))
                start = end
        used = {index for row in rows for index in row}
        origins = [self.waiting[index][0] for index in sorted(used)]
        self.waiting = [item for index, item in enumerate(self.waiting) if index not in used]
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(positions), origins

    def state_dict(self):
        return {"given": self.given, "drawn": self.drawn, "waiting": [origin for origin, *_ in self.waiting]}

    def load_state_dict(self, state):
        self.given, self.drawn = dict(state["given"]), dict(state["drawn"])
        self.waiting = [(tuple(origin), *self.sample(*origin)) for origin in state["waiting"]]


# ---- optimizers -----------------------------------------------------------------------------------------------------


def orthogonalize(matrices, steps=5):
    """The nearest (semi-)orthogonal matrices, roughly: (…, m, n) -> U V^T of each, by Newton-Schulz iterations.

    x <- a x + (b x x^T + c (x x^T)^2) x pushes every singular value towards 1 (to within about 0.7 … 1.2, which is
    enough); the coefficients are Keller Jordan's.  bf16 where that multiplies fast, on a GPU or with AMX, else fp32.

    >>> u = orthogonalize(torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)))
    >>> bool((torch.linalg.svdvals(u) - 1).abs().max() < 0.35)
    True
    """
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.bfloat16() if matrices.is_cuda or torch.cpu._is_amx_tile_supported() else x.float()
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
    stacks of experts (X, m, n), ValueError for others: biases and convolutions are AdamW's.  Those of one shape are
    orthogonalised in one batch.  `momentum` 0 is the RL stages'.  Under FSDP2 a process orthogonalises the experts that
    it owns; other matrices are gathered, and each process keeps its rows of the result.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def add_param_group(self, group):
        super().add_param_group(group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.ndim not in (2, 3):
                raise ValueError(f"Muon takes matrices (m, n) and stacks of them (X, m, n), and a parameter has the "
                                 f"shape {tuple(parameter.shape)}: give it to AdamW")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape[-2:], []).append(parameter)
            for shape, parameters in shapes.items():
                updates = [self.whole_matrices(self.update(p, group["momentum"])) for p in parameters]
                moves = orthogonalize(torch.cat(updates)).split([len(update) for update in updates])
                for parameter, move in zip(parameters, moves):
                    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    own.mul_(1 - group["lr"] * group["weight_decay"])
                    own.add_(self.own_rows(move, parameter), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def update(self, parameter, momentum):
        """The gradient with Nesterov momentum."""
        if not momentum:
            return parameter.grad
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)

    @staticmethod
    def whole_matrices(update):
        """(m, n) -> (1, m, n), gathered;  (X, m, n) -> the experts of this process."""
        if isinstance(update, DTensor):
            update = update.full_tensor() if update.ndim == 2 else update.to_local()
        return update if update.ndim == 3 else update[None]

    @staticmethod
    def own_rows(move, parameter):
        """What of an orthogonalised update belongs to this process' part of the parameter."""
        if parameter.ndim == 2:
            move = move[0]
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                whole = DTensor.from_local(move, mesh, [Replicate()] * mesh.ndim, run_check=False)
                move = whole.redistribute(placements=parameter.placements).to_local()
        return move


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


# ---- a supervised stage ---------------------------------------------------------------------------------------------


def choose_device(config):
    """-> device, dtype, and the sentence that says why."""
    device, because = config.device, "as asked"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        because = f"a {'ROCm' if torch.version.hip else 'CUDA'} GPU is there" if device == "cuda" else "no GPU is there"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this PyTorch sees no GPU; use --device cpu, or install a CUDA or ROCm build")
    if device == "mps" and not torch.backends.mps.is_available():
        raise SystemExit("--device mps: this PyTorch sees no Apple GPU; use --device cpu")
    ranks = world_size()
    if config.shard and ranks % config.shard:
        raise SystemExit(f"--shard {config.shard}: the {ranks} processes are no multiple of it")
    if ranks > 1 and device == "mps":
        raise SystemExit("--device mps: many processes run on the CPU, on CUDA and on ROCm")
    if device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise SystemExit(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs of this machine; "
                         "--nproc_per_node says how many")
    dtype, why = config.dtype, "as asked"
    if dtype == "auto":
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
        why = "this GPU multiplies it fast" if fast else "nothing here is known to be faster in bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise SystemExit(f"--dtype {dtype}: there are float32 and bfloat16")
    return device, getattr(torch, dtype), f"device {device} ({because}), dtype {dtype} ({why}), " \
        f"{torch.get_num_threads()} threads" + (f", {ranks} processes" if ranks > 1 else "")


def optimizer_step(model, optimizers, clip, lr):
    """Clip the gradients, step all optimizers at the rate `lr`, clear the gradients -> the gradient's norm.

    Does not clip if `clip` is 0, nor step if the norm is not finite: the weights stay those of the last good step.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return norm


def train_step(model, optimizers, balancer, batch, count, config, dtype, lr, loss_of=summed_loss):
    """One optimizer step -> {"loss", "norm", "load", "entropy", "bias", "skip"}.

    batch: input_ids, targets, position_ids (rows, S) int64; count: the number of targets that the summed loss is
    divided by.  `loss_of`: kernels.summed_loss, or the same compiled.
    """
    device = model.norm.weight.device
    rows = max(1, config.micro_batch // batch[0].shape[1])
    loss, metrics = 0.0, {}
    model.train()
    # Gradients of the micro-batches add up to those of the whole batch.
    for micro_batch in zip(*(part.split(rows) for part in batch)):
        inputs, targets, positions = (part.to(device) for part in micro_batch)
        part = loss_of(model, inputs, targets, positions, dtype) / count
        part.backward()
        loss += part.item()
    norm = optimizer_step(model, optimizers, config.grad_clip, lr)
    # The routers have counted their choices meanwhile: the balancer moves their biases.
    if math.isfinite(norm):
        metrics = balancer.step()
    return {"loss": loss, "norm": norm, **metrics}


class Checkpointer:
    """One stage's checkpoint: its trainer state, its parts (anything with a state_dict), and the seconds spent."""

    def __init__(self, name, config, tokenizer, state):
        self.name, self.config, self.model, self.tokenizer = name, config, None, tokenizer
        self.folder, self.clock, self.parts = os.path.join(config.out, name), time.perf_counter(), {}
        self.state = state if state is not None else {"step": 0, "seconds": 0.0}
        self.saved = self.state["step"] if "parts" in self.state else None
        for later in (os.path.join(config.out, other) for other in STAGES[STAGES.index(name) + 1:]):
            if os.path.exists(later):
                raise SystemExit(f"{name} is still to be trained, but {later} was made from another one: delete it, or "
                                 "take another --out")

    def resume(self, model, **parts):
        """Name the model and the parts; if the stage was begun, they go on from its checkpoint -> whether it was."""
        self.model, self.parts = model, parts
        if self.saved is None:
            return False
        for name, part in parts.items():
            part.load_state_dict(self.state["parts"][name])
        print(f"{self.name}: going on after step {self.saved}")
        return True

    def save(self, step, **more):
        self.state["seconds"] += time.perf_counter() - self.clock
        self.clock, self.saved = time.perf_counter(), step
        self.state.update(step=step, settings=settings(self.config),
                          parts={name: part.state_dict() for name, part in self.parts.items()}, **more)
        save_checkpoint(self.folder, self.model, self.tokenizer, self.state)

    def check(self, row, step, samples):
        """Stop before a step whose loss or gradient is not finite does any harm."""
        if not (math.isfinite(row["loss"]) and math.isfinite(row["norm"])):
            good = f"{self.folder} (step {self.saved})" if self.saved else "none of this stage yet"
            raise SystemExit(f"{self.name} step {step}: loss {row['loss']}, gradient norm {row['norm']}; stopped "
                             f"before the update. Samples of the batch: {', '.join(samples[:6])}"
                             f"{' …' if len(samples) > 6 else ''}. Last good checkpoint: {good}. Try a lower --lr, or "
                             "look at those samples")


def run_stage(name, config, stage, model, tokenizer, state, device, dtype):
    """Train one supervised stage to its end, from `state` if it was begun, and leave its checkpoint in out/<stage>.

    Returns the state: "before" and "after" are held-out losses, "seconds" is all it took, data and samples included."""
    checkpointer = Checkpointer(name, config, tokenizer, state)
    state = checkpointer.state
    sources = make_sources(config, stage, tokenizer)
    loader = Loader(sources, stage, config.tokens_per_step, config.seed, tokenizer.pad)
    late = config.context[STAGES[0]]
    fingerprints = {source.name: source.fingerprint for source in sources}
    if "before" not in state:
        state.update(before=held_out_loss(model, sources, stage, tokenizer.pad, late), data=fingerprints)
    elif state["data"] != fingerprints:
        old = state["data"]
        changed = sorted(key for key in {*fingerprints, *old} if fingerprints.get(key) != old.get(key))
        raise SystemExit(f"{checkpointer.folder} was begun on other data: {', '.join(changed)} changed since. Bring "
                         f"the old data back, take another --out, or delete {checkpointer.folder}")
    model.config.rope_parameters["hybrid"]["rope_theta"] = stage.rope_theta
    model = shard_model(model, config.shard)
    optimizers = make_optimizers(model, stage.lr, config.weight_decay)
    balancer = PIDBalancer(model, config.balancer_lr)
    checkpointer.resume(model, loader=loader, balancer=balancer, optimizers=OptimizerState(model, optimizers))
    compiled, why = should_compile(model, stage.steps * config.tokens_per_step)
    print(f"{name}: {why}")
    loss_of = compile_loss() if compiled else summed_loss
    log = Log(config.out, name, state["step"])
    for step in range(state["step"] + 1, stage.steps + 1):
        begun = time.perf_counter()
        *batch, origins = loader.next()
        lr = learning_rate(step - 1, stage.steps, stage.lr, stage.lr_end)
        # What the summed loss is divided by; FSDP2 averages over the processes.  A batch without a target has loss 0.
        count = (batch[1] >= 0).sum().clamp_min(1).item() / world_size()
        row = train_step(model, optimizers, balancer, shard_rows(batch), count, config, dtype, lr, loss_of)
        row["loss"] = all_reduce(row["loss"])[0] / world_size()
        checkpointer.check(row, step, [f"{source} {number}" for source, number in origins])
        seconds = time.perf_counter() - begun
        speed = config.tokens_per_step / seconds
        log.add(stage=name, step=step, lr=lr, tokens_per_second=speed, seconds=seconds, **row)
        if step % config.log_every == 0 or step in (1, stage.steps):
            print(f"{name} {step}/{stage.steps} | loss {row['loss']:.3f} | norm {row['norm']:.2f} | lr {lr:.1e} | "
                  f"load {row['load']:.2f} entropy {row['entropy']:.3f} bias {row['bias']:.3f} | "
                  f"{seconds * 1e3:.0f} ms {speed / 1e3:.1f}k tok/s", flush=True)
        if step % max(1, stage.steps // 4) == 0 and step < stage.steps:
            show_samples(model, tokenizer, sources, step)
        if step % config.save_every == 0 or step == stage.steps:    # the last one too, before anything is evaluated
            checkpointer.save(step)
    state["after"] = held_out_loss(model, sources, stage, tokenizer.pad, late)
    show_samples(model, tokenizer, sources, stage.steps)
    checkpointer.save(stage.steps, done=True)
    for source in sources:
        if isinstance(source, TaskSource):
            print(f"{name}: generated conversations trimmed to {stage.context} tokens: "
                  + ", ".join(f"{n} {verdict}" for verdict, n in source.trim_counts.items()))
    return state


# ---- reinforcement learning: the formulas ---------------------------------------------------------------------------


def maxrl_advantage(rewards, bonus=0.0):
    """(r - mean + bonus) / mean over each group, r in {0, 1}: a success weighs the more the rarer it is.  (P, G).

    >>> maxrl_advantage(torch.tensor([[1., 0, 0, 0], [1, 1, 1, 0]]))
    tensor([[ 3.0000, -1.0000, -1.0000, -1.0000],
            [ 0.3333,  0.3333,  0.3333, -1.0000]])
    """
    mean = rewards.mean(-1, keepdim=True)
    return torch.where(mean > 0, (rewards - mean + bonus) / mean.clamp_min(1e-6), 0.0)


def grpo_advantage(rewards, bonus=0.0):
    """(r - mean + bonus) / std over each group, for rewards that are no yes or no.  (P, G) -> (P, G).

    >>> grpo_advantage(torch.tensor([[0.2, 0.4, 0.6]]))
    tensor([[-1.2247,  0.0000,  1.2247]])
    """
    mean, std = rewards.mean(-1, keepdim=True), rewards.std(-1, keepdim=True, correction=0)
    return (rewards - mean + bonus) / std.clamp_min(1e-4)


def length_reward(lengths, correct, best, coefficient=0.1, tolerance=0.1, near=0.1):
    """What shorter correct rollouts of a group get on top: c p m lambda, and nothing for the others.  (G,) -> (G,).

    p: the group's solve rate.  lambda = 1/2 - (length - shortest) / (longest - shortest), from 1/2 to -1/2, over the
    correct ones; 1/2 for all within `tolerance` of the shortest.  m = 1 only if more than one is correct and p is
    within `near` of `best`, the highest solve rate of this source so far: learn it first, then be brief.

    >>> length_reward(torch.tensor([10., 20, 30, 5]), torch.tensor([1., 1, 1, 0]), best=0.75, coefficient=0.4)
    tensor([ 0.1500,  0.0000, -0.1500,  0.0000])
    """
    p = correct.mean().item()
    if correct.sum() < 2 or p < best - near:
        return torch.zeros_like(lengths)
    shortest, longest = lengths[correct > 0].min(), lengths[correct > 0].max()
    scale = 0.5 - ((lengths - shortest) / (longest - shortest).clamp_min(1)).clamp(0, 1)
    scale = torch.where(lengths <= shortest * (1 + tolerance), 0.5, scale)
    return coefficient * p * scale * (correct > 0)


def dppo_mask(pi, mu, advantage, delta=0.1):
    """Which tokens still count: those whose probability has not moved more than `delta` from the sampler's `mu` in the
    direction the advantage pushes (binary total variation).  All (N,) -> (N,) bool.

    >>> dppo_mask(torch.tensor([.7, .5, .7, .1]), torch.tensor([.5, .5, .5, .5]), torch.tensor([1., 1, -1, -1]))
    tensor([False,  True,  True, False])
    """
    return torch.where(advantage > 0, pi - mu <= delta, pi - mu >= -delta)


def policy_loss(logp, sampled_logp, advantage, rollouts, divisor=64, delta=0.1):
    """Token losses summed per rollout, averaged over rollouts, by a constant divisor: no 1 / length anywhere.

        sum over tokens of  -A stopgrad(min(pi / mu, 20)) log pi [dppo mask]  / rollouts / divisor

    logp, sampled_logp, advantage (N,): all tokens of `rollouts` rollouts, the trainer's and the sampler's log
    probability, and the advantage of the token's rollout.

    >>> logp = torch.tensor([0.5, 0.25]).log().requires_grad_()
    >>> policy_loss(logp, logp.detach(), torch.tensor([3., -1.]), rollouts=2, divisor=1).backward(); logp.grad
    tensor([-1.5000,  0.5000])
    """
    now = logp.detach()
    keep = dppo_mask(now.exp(), sampled_logp.exp(), advantage, delta)
    ratio = (now - sampled_logp).exp().clamp_max(20)
    return -(advantage * ratio * logp * keep).sum() / rollouts / divisor


def has_signal(rewards):
    """Dynamic sampling: a group whose rewards are all equal carries no gradient, and another takes its place."""
    return max(rewards) - min(rewards) > 1e-3


def repetitive(text, chunk=2048, ratio=0.05):
    """The canary's gate: a piece of the text that zlib makes 20 times smaller says nothing new.

    >>> repetitive("7+5=12," * 80), repetitive("7+5=12,")
    (True, False)
    """
    pieces = [text[i:i + chunk].encode("utf-8", "replace") for i in range(0, len(text), chunk)]
    return any(len(zlib.compress(piece)) < ratio * len(piece) for piece in pieces)


def next_difficulty(d, solve_rate):
    """RLVE's rule for a group at the current difficulty: up above 0.7, down at 0.

    >>> [next_difficulty(3, rate) for rate in (0.75, 0.7, 0.1, 0.0)], next_difficulty(1, 0.0)
    ([4, 3, 3, 2], 1)
    """
    return d + 1 if solve_rate > 0.7 else max(1, d - 1) if solve_rate == 0 else d


class LogisticBelief:
    """Where an environment's pass rate is one half: a posterior over curves p(d) = sigmoid(slope (middle - d)).

    Thompson sampling: `propose` draws one curve and tries its middle, so the search is wide at first and narrow later.
    """
    curves = [(middle / 4, slope) for middle in range(2, 53) for slope in (0.5, 1.0, 2.0)]

    def __init__(self):
        self.log_weight = np.zeros(len(self.curves))

    def update(self, d, right, wrong):
        """`right` and `wrong` rollouts were seen at difficulty d."""
        z = np.array([slope * (middle - d) for middle, slope in self.curves])
        self.log_weight -= right * np.logaddexp(0, -z) + wrong * np.logaddexp(0, z)

    def weights(self):
        weight = np.exp(self.log_weight - self.log_weight.max())
        return weight / weight.sum()

    def propose(self, rng):
        return max(1, round(rng.choices(self.curves, self.weights())[0][0]))

    def middle(self):
        return max(1, round(float(self.weights() @ np.array([middle for middle, _ in self.curves]))))


# ---- reinforcement learning: rollouts -------------------------------------------------------------------------------


@dataclass
class Group:
    """A prompt and its rollouts: everything the trainer and the log need, in lists that torch.save keeps."""
    problem: "Problem"
    prompt: list                            # token ids
    asked: int = 0                          # the environment's difficulty; 0: an aggregation prompt
    version: int = 0                        # of the sampler's weights
    tokens: list = field(default_factory=list)              # of each rollout
    logps: list = field(default_factory=list)               # (length,) fp32 each: the sampler's log probabilities
    choices: list = field(default_factory=list)             # (L, prompt + length - 1) each: the experts taken
    texts: list = field(default_factory=list)
    ended: list = field(default_factory=list)               # whether the end token came in time
    rewards: list = field(default_factory=list)


@torch.no_grad()
def roll_out(model, prompts, group_size, context, end, generator, among=None):
    """Sample `group_size` replies of up to `context` tokens at temperature 1 to each prompt (lists of ids) -> per
    prompt a list of (tokens, log probabilities, expert choices).

    among: the numbers of these prompts among others that other processes roll out, and how many there are in all: a
    row's random numbers depend on its place among all.
    A prompt is prefilled once and its cache rows repeated; rows that ended leave the batch once they are an eighth
    of it (leaving costs a copy of the cache); every token's expert is recorded for the replay.
    """
    device, layers = model.norm.weight.device, len(model.layers)
    ids, mask = left_padded(prompts, model.config.pad_token_id, device)
    width = ids.shape[1]
    model.eval()
    cache, routing = Cache(layers), []
    hidden = model.hidden_states(ids, mask, cache=cache, routing=routing)[:, -1]
    kind = torch.uint8 if model.config.router_classes <= 256 else torch.int32   # small: many tokens are kept
    before = torch.stack(routing).to(kind).cpu()                                # (L, P, width)
    rows = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    cache.select(rows)
    hidden, total = hidden[rows], len(rows)
    tokens = torch.zeros(total, context, dtype=torch.long, device=device)
    logps = torch.zeros(total, context, device=device)
    choices = torch.zeros(layers, total, context, dtype=kind, device=device)
    length = torch.full((total,), context, device=device)
    numbers, count = among or (range(len(prompts)), len(prompts))
    places = torch.tensor([p * group_size + i for p in numbers for i in range(group_size)])
    here, alive = torch.arange(total, device=device), torch.ones(total, dtype=torch.bool, device=device)
    for step in range(context):
        logits = model.logits(hidden)
        uniform = torch.rand(count * group_size, generator=generator)[places].to(device)[here]
        token = model.sample(logits, 1.0, 1.0, uniform)
        tokens[here, step] = token
        logps[here, step] = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        ends = alive & (token == end)
        length[here[ends]] = step + 1
        alive &= ~ends
        if alive.sum() <= 0.875 * len(alive):
            keep = alive.nonzero()[:, 0]
            here, token, alive = here[keep], token[keep], alive[keep]
            cache.select(keep)
        if len(here) == 0 or step == context - 1:
            break
        routing = []
        hidden = model.hidden_states(token[:, None], cache=cache, routing=routing)[:, -1]
        choices[:, here, step] = torch.stack(routing)[:, :, 0].to(kind)
    result, tokens, logps, choices = [], tokens.cpu(), logps.cpu(), choices.cpu()
    for p, prompt in enumerate(prompts):
        group = []
        for i in range(p * group_size, (p + 1) * group_size):
            n = int(length[i])
            group.append((tokens[i, :n].tolist(), logps[i, :n].clone(),
                          torch.cat((before[:, p, width - len(prompt):], choices[:, i, :n - 1]), 1)))
        result.append(group)
    return result


def verifier_rewards(group):
    """The usual reward: what the verifier says."""
    return [find_task(group.problem.task).verify(group.problem, text)[0] for text in group.texts]


class Actor:
    """PipelineRL in small: a sampler whose weights lag behind the trainer's, the environments it asks, and a buffer.

    `score(group)` -> rewards, `adapt(d, solve rate)` -> next difficulty; both can be swapped.  What it holds between
    steps is in state_dict, so a killed run goes on bit for bit.
    """
    sync_every, most_stale, pool_size, dead_after = 2, 2, 64, 25

    def __init__(self, model, tokenizer, stage, seed, score=verifier_rewards, adapt=next_difficulty,
                 dtype=torch.float32):
        self.sampler, self.tokenizer, self.stage, self.seed = copy.deepcopy(model), tokenizer, stage, seed
        self.score, self.adapt, self.dtype = score, adapt, dtype
        self.environments = {name: {"d": 1, "groups": 0, "best": {}} for name in stage.tasks}
        self.buffer, self.pool = [], []         # groups to train on; (problem, tails) to aggregate
        self.version = self.rounds = self.dead = 0
        self.useful = 1.0                       # the running share of groups with a signal

    def sync(self, model, version):
        """The sampler, which is whole in every process, gets the trainer's weights."""
        self.sampler.load_state_dict(whole_weights(model))
        self.version = version

    def pose(self, rng):
        """The least-sampled environment's next problem; or, for a share of them, an earlier problem with C of the
        model's own tails."""
        if self.pool and rng.random() < self.stage.aggregation:
            problem, tails = self.pool[rng.randrange(len(self.pool))]
            prompt = terse_prompt(problem.prompt, rng.sample(tails, min(4, len(tails))))
            return Group(problem, prompt_ids(self.tokenizer, prompt))
        name = min(self.environments, key=lambda n: self.environments[n]["groups"])
        environment = self.environments[name]
        levels = find_task(name).levels
        d = environment["d"] if self.stage.adaptive else levels[environment["groups"] % len(levels)]
        environment["groups"] += 1
        problem = draw(find_task(name), rng.getrandbits(48), d, held_out=False)
        return Group(problem, prompt_ids(self.tokenizer, problem.prompt), d)

    def sample(self, groups, group_size):
        """Fill in the groups' rollouts and rewards -> the groups.  Every process does its share, and gets all."""
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} sample {self.rounds}").getrandbits(60))
        end = self.tokenizer.end
        device = self.sampler.norm.weight.device.type           # the same precision as the trainer's
        mine, among = shard(groups), (shard(range(len(groups))), len(groups))
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            rolled = roll_out(self.sampler, [g.prompt for g in mine], group_size, self.stage.context, end, generator,
                              among) if mine else []
        for group, rollouts in zip(mine, rolled):
            group.version = self.version
            group.tokens, group.logps, group.choices = (list(part) for part in zip(*rollouts))
            group.ended = [tokens[-1] == end for tokens in group.tokens]
            group.texts = [self.tokenizer.decode(tokens[:-1] if done else tokens)
                           for tokens, done in zip(group.tokens, group.ended)]
            rewards = [r * done * (not repetitive(text))
                       for r, done, text in zip(self.score(group), group.ended, group.texts)]
            group.rewards = [float(r) for r in rewards]
        self.rounds += 1
        return unshard(mine)

    def best(self, group):
        """The highest solve rate so far of this group's source: its environment at its difficulty."""
        return self.environments[group.problem.task]["best"].get(group.asked, 0.0)

    def init_difficulty(self, rounds=6, group_size=8):
        """Set each environment's first difficulty to where half of the rollouts pass."""
        beliefs = {name: LogisticBelief() for name in self.environments}
        for i in tqdm(range(rounds), desc="finding difficulties", leave=False, disable=None):
            rng, groups = random.Random(f"{self.seed} start {i}"), []
            for name, belief in beliefs.items():
                d = min(find_task(name).hardest, belief.propose(rng))
                problem = draw(find_task(name), rng.getrandbits(48), d, held_out=False)
                groups.append(Group(problem, prompt_ids(self.tokenizer, problem.prompt)))
            for group in self.sample(groups, group_size):
                right = sum(r > 0 for r in group.rewards)
                beliefs[group.problem.task].update(group.problem.difficulty, right, group_size - right)
        for name, belief in beliefs.items():
            self.environments[name]["d"] = min(find_task(name).hardest, belief.middle())

    def generate(self):
        """One round of rollouts, enough for `sync_every` trainer steps by the share of groups that had a signal so far,
        into the buffer -> all its groups."""
        rng = random.Random(f"{self.seed} round {self.rounds}")
        enough = self.sync_every * self.stage.groups
        asked = [self.pose(rng) for _ in range(min(2 * enough, math.ceil(enough / self.useful)))]
        groups = self.sample(asked, self.stage.group_size)
        for group in groups:
            name, rate = group.problem.task, sum(group.rewards) / len(group.rewards)
            environment = self.environments[name]
            if self.stage.adaptive and group.asked == environment["d"]:
                environment["d"] = min(find_task(name).hardest, self.adapt(environment["d"], rate))
            if group.asked:
                best = environment["best"]
                best[group.asked] = max(best.get(group.asked, 0.0), rate)
            if self.stage.aggregation and find_task(name).reads and rate < 1:      # later rounds' replies too
                tails = [cut_tail(text, self.stage.tail, self.tokenizer) for text in group.texts]
                self.pool = [*self.pool, (group.problem, tails)][-self.pool_size:]
        signals = [group for group in groups if has_signal(group.rewards)]
        self.buffer += signals
        self.useful = max(0.1, 0.8 * self.useful + 0.2 * len(signals) / len(groups))
        self.dead = 0 if any(max(group.rewards) > 0 for group in groups) else self.dead + 1
        if self.dead == self.dead_after:
            self.stop(groups)
        return groups

    def stop(self, groups):
        ended = np.mean([done for group in groups for done in group.ended])
        formed = np.mean([split_answer(text) is not None for group in groups for text in group.texts])
        asked = ", ".join(sorted({f"{group.problem.task} (difficulty {group.problem.difficulty})" for group in groups}))
        raise SystemExit(f"no rollout earned a reward in {self.dead} rounds; the last round asked {asked}. "
                         f"{ended:.0%} of its replies ended within {self.stage.context} tokens, {formed:.0%} had the "
                         f"form <think>…</think>answer. One of them: {groups[-1].texts[0][:80]!r}. Reinforcement "
                         "learning starts from successes: train sft for longer, or leave out what it cannot do yet")

    def take(self, version):
        """Up to `groups` groups for the trainer at `version`, the oldest first, none too stale; what was generated.

        Three quarters of them are enough: a whole round for the last few would mostly grow stale."""
        self.buffer, generated = [g for g in self.buffer if version - g.version <= self.most_stale], []
        for _ in range(3):
            if len(self.buffer) >= 0.75 * self.stage.groups:
                break
            generated += self.generate()
        taken, self.buffer = self.buffer[:self.stage.groups], self.buffer[self.stage.groups:]
        return taken, generated

    def state_dict(self):
        # Groups as plain dictionaries: trainer.pt is read with weights_only.
        return {"sampler": self.sampler.state_dict(), "environments": self.environments, "version": self.version,
                "rounds": self.rounds, "dead": self.dead, "useful": self.useful,
                "buffer": [dataclasses.asdict(group) for group in self.buffer],
                "pool": [(dataclasses.asdict(problem), tails) for problem, tails in self.pool]}

    def load_state_dict(self, state):
        self.sampler.load_state_dict(state["sampler"])
        self.environments = state["environments"]
        for name in ("version", "rounds", "dead", "useful"):
            setattr(self, name, state[name])
        self.buffer = [Group(**{**group, "problem": Problem(**group["problem"])}) for group in state["buffer"]]
        for group in self.buffer:                               # trainer.pt was read onto the model's device
            group.logps, group.choices = ([t.cpu() for t in part] for part in (group.logps, group.choices))
        self.pool = [(Problem(**problem), tails) for problem, tails in state["pool"]]


# ---- reinforcement learning: the trainer ----------------------------------------------------------------------------


def collate(rollouts, pad, device):
    """Rollouts (prompt, tokens, logps, choices, advantage) -> one right-padded batch for `token_logps`:
    input_ids, targets (-100: not the policy's token), position_ids (R, S); choices [L x (R, S)]; logps, advantage (N,).
    A rollout whose advantage is None fills up a batch: its row is padding.
    """
    R, S = len(rollouts), max(len(prompt) + len(tokens) for prompt, tokens, *_ in rollouts) - 1
    inputs = torch.full((R, S), pad)
    targets, positions = torch.full((R, S), -100), torch.full((R, S), -1)
    choices = torch.zeros(rollouts[0][3].shape[0], R, S, dtype=torch.long)
    rollouts = [rollout for rollout in rollouts if rollout[4] is not None]
    for row, (prompt, tokens, _, choice, _) in enumerate(rollouts):
        n = len(prompt) + len(tokens) - 1
        inputs[row, :n] = torch.tensor((prompt + tokens)[:-1])
        targets[row, len(prompt) - 1:n] = torch.tensor(tokens)
        positions[row, :n] = torch.arange(n)
        choices[:, row, :n] = choice
    logps = torch.cat([torch.zeros(0), *(logp for _, _, logp, _, _ in rollouts)])
    advantage = torch.cat([torch.zeros(0), *(torch.full((len(tokens),), a) for _, tokens, _, _, a in rollouts)])
    return (inputs.to(device), targets.to(device), positions.to(device), list(choices.to(device)), logps.to(device),
            advantage.to(device))


def token_logps(model, inputs, targets, positions, routing):
    """The model's log probability of each target: (N,) fp32.  `routing`: as in hidden_states, to replay or to fill."""
    hidden = model.hidden_states(inputs, position_ids=positions, routing=routing)[targets >= 0]
    return model.logits(hidden).log_softmax(-1).gather(1, targets[targets >= 0][:, None])[:, 0]


def average_over_processes(row):
    """An rl_step's row, of this process' rollouts -> that of all, with the share of tokens that the mask dropped."""
    keys = [key for key in ("loss", "flips", "kl", "kl_live", "kept", "tokens") if row[key] is not None]
    row = row | dict(zip(keys, (total / world_size() for total in all_reduce(*(row[key] for key in keys)))))
    row["masked"] = 1 - row.pop("kept") / row.pop("tokens")
    return row


def kl(sampled_logp, logp):
    """KL(sampler || trainer) a token, from the sampler's samples: mean of x - 1 - log x, x = pi / mu; never below 0."""
    log_ratio = (logp - sampled_logp).float()
    return (log_ratio.exp() - 1 - log_ratio).mean().item()


@torch.no_grad()
def replay_gap(model, batch):
    """What the replay is for, on one batch: (share of the sampler's expert choices that the trainer's own router would
    change, sampler-trainer KL with the replay, and without it)."""
    inputs, targets, positions, choices, sampled, _ = batch
    was_training = model.training
    model.eval()                                                # not counted as load
    live = []
    alone, replayed = (token_logps(model, inputs, targets, positions, r) for r in (live, list(choices)))
    model.train(was_training)
    real = positions >= 0
    flips = torch.stack([(a != b)[real].float().mean() for a, b in zip(live, choices)]).mean().item()
    return flips, kl(sampled, replayed), kl(sampled, alone)


def rl_batches(groups, advantages, micro_batch, pad, device):
    """Groups and their advantages (P, G) -> this process' micro-batches: four or more, of at most `micro_batch` tokens.

    Rows of a micro-batch are about as long as each other.  Every process gets equally many micro-batches and rows:
    what is missing is padding."""
    rollouts = [(group.prompt, tokens, logp, choice, a) for group, row in zip(groups, advantages.tolist())
                for tokens, logp, choice, a in zip(group.tokens, group.logps, group.choices, row)]
    rollouts.sort(key=lambda r: len(r[0]) + len(r[1]))
    processes, parts = world_size(), [[]]
    most = max(len(rollouts) // processes // 4, 1)
    for rollout in rollouts:
        rows, width = len(parts[-1]) // processes + 1, len(rollout[0]) + len(rollout[1])    # with this one
        if parts[-1] and rows > 1 and (rows > most or width * rows > micro_batch):
            parts.append([])
        parts[-1].append(rollout)
    for part in parts:
        part += [(*part[-1][:4], None)] * (-len(part) % processes)
    return [collate(shard(part), pad, device) for part in parts]


def rl_step(model, optimizers, balancer, batches, rollouts, config, dtype, lr, measure=True):
    """One trainer step -> its row of the log; `measure` adds what router replay is good for.

    batches: micro-batches of `collate`; rollouts: how many they hold, which the loss is divided by.
    """
    device, total, kept, tokens, gap = model.norm.weight.device, 0.0, 0, 0, (None, None, None)
    metrics = {}
    model.train()
    for i, batch in enumerate(batches):
        inputs, targets, positions, choices, sampled, advantage = batch
        if measure and i == len(batches) // 2:                  # under its own autocast, whose cache has no gradients
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                gap = replay_gap(model, batch)
        # The trainer's log probability of each sampled token, with the experts that the sampler took.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logp = token_logps(model, inputs, targets, positions, list(choices))
        loss = policy_loss(logp, sampled, advantage, rollouts)
        loss.backward()
        total += loss.item()
        kept += dppo_mask(logp.detach().exp(), sampled.exp(), advantage).sum().item()
        tokens += len(logp)
    norm = optimizer_step(model, optimizers, config.grad_clip, lr)
    if math.isfinite(norm):
        metrics = balancer.step()
    return {"loss": total, "norm": norm, "kept": kept, "tokens": tokens, "flips": gap[0], "kl": gap[1],
            "kl_live": gap[2], **metrics}


# ---- the behavioral stage's reward model ----------------------------------------------------------------------------


class RewardModel(torch.nn.Module):
    """A copy of the backbone with a scalar head on the last token: ids of conversations -> scores (B,) fp32."""

    def __init__(self, model):
        super().__init__()
        self.backbone = copy.deepcopy(model)
        self.head = torch.nn.Linear(model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, conversations):
        width, device = max(map(len, conversations)), self.head.weight.device
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in conversations], device=device)
        length = torch.tensor([len(ids) for ids in conversations], device=device)
        column = torch.arange(width, device=device).expand(len(length), width)
        hidden = self.backbone.hidden_states(ids, position_ids=column.where(column < length[:, None], -1))
        return self.head(hidden[torch.arange(len(length)), length - 1].float())[:, 0]


def bradley_terry_loss(better, worse):
    """-log sigmoid(score of the preferred - score of the other), mean.  (B,), (B,) -> ().

    >>> round(bradley_terry_loss(torch.tensor([1.0]), torch.tensor([0.0])).item(), 4)
    0.3133
    """
    return -F.logsigmoid(better - worse).mean()


def preference_pair(rng, held_out=False):
    """A problem and two replies, the one with more warm words first: what a simulated reader prefers, whether or not a
    reply does what was asked."""
    task = find_task("constraints")
    problem = draw(task, rng.getrandbits(48), rng.randint(1, 4), held_out)
    while True:
        pair = [(task.solve if rng.random() < 0.5 else task.corrupt)(problem, rng.getrandbits(48)) for _ in range(2)]
        warm = [warmth(split_answer(reply)) for reply in pair]
        if warm[0] != warm[1]:
            return problem, *(pair if warm[0] > warm[1] else reversed(pair))


def conversation(tokenizer, problem, reply):
    return tokenizer.render([{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": reply}])[0]


def train_reward_model(model, tokenizer, steps, lr, seed, pairs=32):
    """Bradley-Terry on generated preferences -> the reward model, and its accuracy on held-out pairs."""
    torch.manual_seed(seed)
    judge, rng = RewardModel(model).to(model.norm.weight.device), random.Random(f"{seed} preferences")
    optimizers = make_optimizers(judge, lr)

    def pairs_of(count, held_out):
        return [preference_pair(rng, held_out) for _ in range(count)]

    def scores(drawn):
        count = len(drawn)
        return judge([conversation(tokenizer, drawn[i % count][0], drawn[i % count][1 + i // count])
                      for i in range(2 * count)]).split(count)

    judge.train()
    for step in tqdm(range(steps), desc="reward model", leave=False, disable=None):
        bradley_terry_loss(*scores(pairs_of(pairs, False))).backward()
        optimizer_step(judge, optimizers, 1.0, learning_rate(step, steps, lr, lr / 10))
    judge.eval()
    with torch.no_grad():
        better, worse = scores(pairs_of(200, True))
    return judge, (better > worse).float().mean().item()


class JudgedReward:
    """score(group) of the behavioral stage: the reward model's sigmoid, gated to 0 by the binary checker."""

    def __init__(self, judge, tokenizer, gate=verifier_rewards):
        self.judge, self.tokenizer, self.gate = judge, tokenizer, gate

    @torch.no_grad()
    def __call__(self, group):
        liked = self.judge([conversation(self.tokenizer, group.problem, text) for text in group.texts]).sigmoid()
        return [obeys * score for obeys, score in zip(self.gate(group), liked.tolist())]


def run_rl(name, config, stage, model, tokenizer, state, device, dtype, adapt=next_difficulty, gate=verifier_rewards):
    """Train one RL stage to its end, from `state` if it was begun, and leave its checkpoint in out/<stage>.

    `adapt` and `gate` are what notebooks/post_training.py swaps: the difficulty rule, and the reward model's gate."""
    checkpointer = Checkpointer(name, config, tokenizer, state)
    state = checkpointer.state
    model.config.rope_parameters["hybrid"]["rope_theta"] = stage.rope_theta
    score, advantage, seed = verifier_rewards, maxrl_advantage, f"{config.seed} {name}"
    if stage.reward_model_steps:
        advantage = grpo_advantage
        if "judge" in state:
            judge = RewardModel(model).to(device).eval()
            judge.load_state_dict(state["judge"])
        else:
            lr = config.lr["sft"] / 4
            judge, state["judged"] = train_reward_model(model, tokenizer, stage.reward_model_steps, lr, config.seed)
            state["judge"] = judge.state_dict()
            print(f"{name}: the reward model agrees with {state['judged']:.1%} of 200 held-out preferences")
        score = JudgedReward(judge, tokenizer, gate)
    actor = Actor(model, tokenizer, stage, seed, score, adapt, dtype)
    model = shard_model(model, config.shard)
    optimizers = make_optimizers(model, stage.lr, momentum=0.0)
    # A tenth of the balancer's rate: a few tasks' prompts are not what the experts should be levelled on.
    balancer = PIDBalancer(model, config.balancer_lr / 10)
    begun = checkpointer.resume(model, actor=actor, balancer=balancer, optimizers=OptimizerState(model, optimizers))
    if stage.adaptive and not begun:
        actor.init_difficulty()
        state["start"] = {task: environment["d"] for task, environment in actor.environments.items()}
        print(f"{name}: starts at difficulty " + " ".join(f"{task}={d}" for task, d in state["start"].items()))
    log = Log(config.out, name, state["step"])
    for step in range(state["step"] + 1, stage.steps + 1):
        if (step - 1) % actor.sync_every == 0:
            actor.sync(model, step - 1)
        begun = time.perf_counter()
        groups, generated = actor.take(step - 1)
        sampled = time.perf_counter() - begun
        lr = learning_rate(step - 1, stage.steps, stage.lr, stage.lr_end)
        row = {"loss": 0.0, "norm": 0.0}
        shows = step % max(1, config.log_every // 4) == 0 or step in (1, stage.steps)
        if groups:
            rewards = torch.tensor([group.rewards for group in groups])
            bonus = torch.stack([length_reward(torch.tensor([float(len(t)) for t in group.tokens]), r,
                                               actor.best(group), stage.length_reward)
                                 for group, r in zip(groups, rewards)]) if stage.length_reward else 0.0
            batches = rl_batches(groups, advantage(rewards, bonus), config.micro_batch, tokenizer.pad, device)
            count = rewards.numel() / world_size()
            row = rl_step(model, optimizers, balancer, batches, count, config, dtype, lr, shows)
            row = average_over_processes(row)
            checkpointer.check(row, step, [group.problem.prompt for group in groups])
        seconds = time.perf_counter() - begun
        row |= rollout_health(generated, groups, step - 1)
        row["rollouts_per_second"] = sum(len(g.tokens) for g in generated) / sampled if generated else None
        if stage.adaptive:
            row["difficulty"] = " ".join(f"{task}={e['d']}" for task, e in actor.environments.items())
        log.add(stage=name, step=step, lr=lr, seconds=seconds, **row)
        if shows:
            print_rl(name, step, stage.steps, row, seconds)
        if step % max(1, stage.steps // 4) == 0 and generated:
            show_rollouts(generated)
        if step % max(1, config.save_every // 5) == 0 or step == stage.steps:
            checkpointer.save(step)
    state["end"] = {task: environment["d"] for task, environment in actor.environments.items()}
    checkpointer.save(stage.steps, done=True)
    return state


def rollout_health(generated, taken, version):
    """What the log says about the rollouts just generated, and about those trained on."""
    rollouts = [(r, len(t), done, text) for g in generated
                for r, t, done, text in zip(g.rewards, g.tokens, g.ended, g.texts)]
    row = {"staleness": float(np.mean([version - g.version for g in taken])) if taken else None}
    if rollouts:
        reward, length, ended, texts = zip(*rollouts)
        row |= {"reward": float(np.mean(reward)), "length": float(np.mean(length)), "no_end": 1 - float(np.mean(ended)),
                "repetitive": float(np.mean([repetitive(text) for text in texts])),
                "zero_groups": float(np.mean([not has_signal(g.rewards) for g in generated]))}
    return row


def print_rl(name, step, steps, row, seconds):
    def shown(key, form):
        return format(row[key], form) if row.get(key) is not None else "-"
    print(f"{name} {step}/{steps} | reward {shown('reward', '.3f')} | norm {shown('norm', '.2f')} | "
          f"length {shown('length', '.0f')} no end {shown('no_end', '.3f')} repetitive {shown('repetitive', '.3f')} | "
          f"groups without signal {shown('zero_groups', '.2f')} stale {shown('staleness', '.1f')} "
          f"masked {shown('masked', '.3f')} | flips {shown('flips', '.3f')} kl {shown('kl', '.1e')}, "
          f"without replay {shown('kl_live', '.1e')} | {seconds:.1f} s, "
          f"{shown('rollouts_per_second', '.0f')} rollouts/s", flush=True)


def show_rollouts(groups):
    """Print the best and the worst rollout of the last round's first and last problem."""
    for group in (groups[0], groups[-1]):
        for i in sorted({int(np.argmax(group.rewards)), int(np.argmin(group.rewards))}):
            print(f"    reward {group.rewards[i]:.2f} | {group.problem.prompt} -> {group.texts[i][:200]!r}")


# ---- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model, sources, stage, pad, late, tokens=16384):
    """Mean loss on held-out samples: {source: {"loss": all positions, "late": from position `late` on}}."""
    result = {}
    model.eval()
    for source in sources:
        if source.size(held_out=True) == 0:
            continue
        loader = Loader([source], stage, max(tokens, stage.context), 0, pad, held_out=True)
        inputs, targets, positions, _ = loader.next()
        losses = []                                             # a tensor (S,) for each row
        for x, y, p in zip(*(part.split(8) for part in shard_rows((inputs, targets, positions)))):
            x, y, p = (t.to(model.norm.weight.device) for t in (x, y, p))
            logits = model.logits(model.hidden_states(x, position_ids=p))
            losses += F.cross_entropy(logits.transpose(1, 2), y, reduction="none").cpu()
        losses, counted = torch.stack(unshard(losses)[:len(inputs)]), targets >= 0
        if not counted.any():
            continue
        far = counted & (positions >= late)
        result[source.name] = {"loss": losses[counted].mean().item(),
                               "late": losses[far].mean().item() if far.any() else None}
    return result


def held_out_problems(tasks, count, levels=None):
    """`count` held-out problems a task, over its levels in turn; none twice: easy ones run out, then harder ones take
    their place."""
    problems, seen = [], set()
    for name in tasks:
        task = find_task(name)
        asked = levels or task.levels
        for i in range(count):
            for attempt in range(1000):
                problem = draw(task, f"eval {i} {attempt}", asked[i % len(asked)] + attempt // 50, held_out=True)
                if (name, problem.prompt) not in seen:
                    break
            seen.add((name, problem.prompt))
            problems.append(problem)
    return problems


def solve_rates(model, tokenizer, problems, samples, temperature=1.0, seed=0, batch=128):
    """The share of `samples` replies to each problem that are right: (problems,) array."""
    # A reply may be half as long again as the teacher's, and a search longer; in this order a batch ends together.
    limit = [max(160, len(tokenizer.encode(find_task(p.task).solve(p))) * 3 // 2 + 16) for p in problems]
    order = sorted((i for i in range(len(problems)) for _ in range(samples)), key=lambda i: (limit[i], i))
    rates = np.zeros(len(problems))
    for start in tqdm(shard(range(0, len(order), batch)), desc="held-out problems", leave=False, disable=None):
        part = order[start:start + batch]
        texts = reply(model, tokenizer, [problems[i].prompt for i in part], max(limit[i] for i in part), seed + start,
                      temperature)
        for i, text in zip(part, texts):
            rates[i] += find_task(problems[i].task).verify(problems[i], text)[0] / samples
    return np.array(all_reduce(*rates))


def pass_at_1(model, tokenizer, tasks, problems, samples):
    """Mean accuracy of single samples at temperature 1 on held-out problems, `problems` a task over its levels.

    -> {"pass@1", "ci95": [low, high], "greedy", "problems", and by task: "tasks", "tasks_ci95", "greedy_tasks",
    "chance"}; chance is the teacher's reply to another problem of the same task and difficulty.
    """
    held = held_out_problems(tasks, problems)
    rates = solve_rates(model, tokenizer, held, samples)
    greedy = solve_rates(model, tokenizer, held, 1, temperature=0.0)
    chance = [np.mean([find_task(p.task).verify(p, find_task(p.task).solve(other, i))[0] for other in held
                       if (other.task, other.difficulty) == (p.task, p.difficulty) and other.prompt != p.prompt] or [0])
              for i, p in enumerate(held)]
    by_task = np.reshape(rates, (len(tasks), problems))
    means = [dict(zip(tasks, np.reshape(x, (len(tasks), problems)).mean(1).tolist())) for x in (rates, greedy, chance)]
    return {"pass@1": float(rates.mean()), "ci95": interval(rates), "greedy": float(greedy.mean()),
            "problems": len(held), "tasks": means[0], "tasks_ci95": dict(zip(tasks, map(interval, by_task))),
            "greedy_tasks": means[1], "chance": means[2]}


def vote(texts):
    """The most frequent answer, letter by letter; a reply without one has no vote.  "" if none has."""
    votes = collections.Counter(answer for text in texts if (answer := split_answer(text)))
    return votes.most_common(1)[0][0] if votes else ""


def field_vote(labels, texts):
    """The most frequent value of each label, put together; a dot, which says that a value was not found, has no vote.

    >>> field_vote("bc", ["<think></think>b5c.", "<think></think>b5c1", "<think></think>b2c.", "<think>"])
    'b5c1'
    """
    answers = [split_answer(text) or "" for text in texts]
    pairs = collections.Counter(answer[i:i + 2] for answer in answers for i in range(0, len(answer) - 1, 2))
    return "".join(label + max("0123456789", key=lambda value: pairs[label + value]) for label in labels)


def sample_methods(prompts, generate, asked, seed, tokenizer):
    """-> N (T + 1) plain samples a prompt, and the populations of Markovian RSA and of two special cases of it."""
    b, known = asked.budget, {}

    def remembered(*call):
        """The methods' first rounds are the same: sampled once."""
        key = (tuple(call[0]), *call[1:])
        if key not in known:
            texts = all_gather(generate(*call, progress=functools.partial(
                tqdm, desc="test-time compute", total=len(call[0]), unit=" rollouts", leave=False, disable=None)))
            known[key] = [next(text for text in some if text is not None) for some in zip(*texts)]
        return known[key]

    def sample(population, subset, rounds, tail):
        return markovian_rsa(prompts, remembered, population, subset, rounds, b.budget, tail, seed, tokenizer)

    plain = [[c.text for c in result.candidates] for result in sample(b.population * (b.rounds + 1), 1, 0, 0)]
    return plain, {"markovian_rsa": sample(b.population, b.subset, asked.most_rounds, b.tail),
                   "delethink": sample(b.population, 1, b.rounds, b.tail),
                   "full_rsa": sample(b.population, b.subset, b.rounds, b.budget)}


def evaluate_ttc(model, tokenizer, name, asked, seed=0):
    """Test-time compute on one task: Markovian RSA beside what else as many tokens can buy, as an entry of report.json.

    Shares are of held-out problems, with 95 % intervals over them.  Votes, pass@N and the choice of a reply that says
    of itself that it holds look at plain samples: N of them, or N (T + 1), which cost as much as T rounds.  rounds: by
    method, the mean correctness of the population after each round, or of a vote; tokens: what was generated until
    then, a problem.
    """
    task, N, T = find_task(name), asked.budget.population, asked.budget.rounds
    problems = held_out_problems([name], asked.problems, (asked.tasks[name],))
    source = Checkpoint(model, tokenizer, share=shard)
    equal, methods = sample_methods([p.prompt for p in problems], source, asked, seed, tokenizer)
    greedy = Checkpoint(model, tokenizer, 0.0)([p.prompt for p in problems], asked.budget.budget, seed)
    first = [texts[:N] for texts in equal]

    def verified(texts):
        """(problems, samples) texts -> rewards, likewise."""
        return [[task.verify(p, text)[0] for text in some] for p, some in zip(problems, texts)]

    def right(answers):
        return [float(task.verify_answer(p.data, answer)) for p, answer in zip(problems, answers)]

    def populations(method):
        """(rounds, problems, candidates) texts."""
        return [[[c.text for c in r.rounds[t]] for r in methods[method]] for t in range(len(methods[method][0].rounds))]

    def mean(rewards):
        return [sum(some) / len(some) for some in rewards]

    rounds = {method: [mean(verified(texts)) for texts in populations(method)] for method in methods}
    rounds["vote"] = [right(vote(texts[:N * (t + 1)]) for texts in equal) for t in range(T + 1)]
    rounds["markovian_rsa_majority"] = [right(map(vote, texts)) for texts in populations("markovian_rsa")]
    scores = {"single": mean(verified(equal)),
              "greedy": mean(verified([text] for text in greedy)),
              "pass@N": map(max, verified(first)), "pass@equal_tokens": map(max, verified(equal)),
              "maj@N": right(map(vote, first)), "maj@equal_tokens": rounds["vote"][T],
              **{method: rounds[method][T] for method in (*methods, "markovian_rsa_majority")}}
    if task.self_verified("") is not None:
        chosen = [next((text for text in texts if task.self_verified(text)), texts[0]) for texts in equal]
        scores["certified@equal_tokens"] = mean(verified([text] for text in chosen))
    if task.labelled:
        labels = [[label for *_, label in p.data["columns"]] for p in problems]
        scores["field_vote@equal_tokens"] = right(map(field_vote, labels, equal))
    samples = [[texts[N * t:N * (t + 1)] for texts in equal] for t in range(T + 1)]
    spent = {method: [sum(count_tokens(text, tokenizer) for some in texts for text in some) / len(problems)
                      for texts in (samples if method == "vote" else populations(method))]
             for method in ("vote", *methods)}
    row = {"task": name, "difficulty": asked.tasks[name], "problems": len(problems), "population": N,
           "subset": asked.budget.subset, "T": T, "tail": asked.budget.tail,
           "generated_tokens": sum(spent["markovian_rsa"][:T + 1]),
           "longest_prompt": max(result.longest_prompt for result in methods["markovian_rsa"]),
           "longest_prompt_full_rsa": max(result.longest_prompt for result in methods["full_rsa"]),
           "rounds": {method: [sum(v) / len(v) for v in values] for method, values in rounds.items()},
           "rounds_ci95": {method: [interval(v) for v in values] for method, values in rounds.items()},
           "tokens": {method: np.cumsum(values).tolist() for method, values in spent.items()}}
    for key, values in scores.items():
        values = [float(value) for value in values]
        row |= {key: sum(values) / len(values), key + "_ci95": interval(values)}
    return row


def show_samples(model, tokenizer, sources, seed):
    """Print how the model goes on with a held-out sample of each source, and how it answers two held-out problems."""
    rng, device = random.Random(seed), model.norm.weight.device
    generator = torch.Generator().manual_seed(seed)
    for source in (source for source in sources if not isinstance(source, TaskSource) and source.size(held_out=True)):
        ids, wanted = source.get(rng.randrange(source.size(held_out=True)), held_out=True)
        ids = ids[:wanted.index(True)] if source.is_traces and True in wanted else ids[:24]     # up to the reply
        text = model.generate(torch.tensor([ids[-200:]], device=device), 48, 0.8, generator=generator)[0].tolist()
        print(f"    {source.name} | {tokenizer.decode(ids)[-100:]!r} -> {tokenizer.decode(text[len(ids[-200:]):])!r}")
    tasks = [name for source in sources if isinstance(source, TaskSource) for name in source.tasks]
    for name in rng.sample(tasks, min(2, len(tasks))):
        problem = draw(find_task(name), f"show {seed}", 2, held_out=True)
        answer = reply(model, tokenizer, [problem.prompt], 96, seed)[0]
        verdict = "right" if find_task(name).verify(problem, answer)[0] else "wrong"
        print(f"    {verdict} | {problem.prompt} -> {answer!r}")


# ---- checkpoints and the log ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone_in(out):
    """Keep other runs out of a folder until this one ends: two would delete each other's checkpoints and log.

    The system holds the lock, and drops it when the process ends, be it by kill -9.  Raises SystemExit if it is taken.
    """
    if not is_main():                                             # the first process holds it for all
        yield
        return
    with open(os.path.join(out, ".lock"), "a", encoding="utf-8") as file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise SystemExit(f"{out} is taken: another run is at work in it; wait for its end, or take another "
                                 "--out") from None
            print(f"{out} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
        try:
            yield
        except OSError as error:
            if error.filename is None and error.strerror:       # a write that failed does not say where
                error.filename = f"{out} or what is printed"
            raise


def write_json(path, content):
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".tmp", path)


def write_trainer_state(path, state):
    """torch.save, but what the system said, such as that the disk is full, is the error."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_checkpoint(folder, model, tokenizer, state=None):
    """Write a checkpoint beside the old one, then swap them by rename: at any moment one of the two is whole."""
    weights = get_model_state_dict(model, options=OptimizerState.options)           # whole in the first process
    if is_main():
        shutil.rmtree(folder + ".new", ignore_errors=True)
        model.save_pretrained(folder + ".new", state_dict=weights)
        tokenizer.save_pretrained(folder + ".new")
        if state is not None:
            write_trainer_state(os.path.join(folder + ".new", "trainer.pt"), state)
        if os.path.exists(folder):
            shutil.rmtree(folder + ".old", ignore_errors=True)
            os.rename(folder, folder + ".old")
        os.rename(folder + ".new", folder)
        shutil.rmtree(folder + ".old", ignore_errors=True)
    barrier()


def load_checkpoint(folder, device):
    """-> model, tokenizer, trainer state (None if it has none); None for a folder that is not there.

    Puts right what a kill between the renames of `save_checkpoint` left behind.  Raises Damaged.
    """
    if is_main():
        if not os.path.exists(folder) and os.path.exists(folder + ".old"):
            os.rename(folder + ".old", folder)
        for leftover in (folder + ".new", folder + ".old"):
            shutil.rmtree(leftover, ignore_errors=True)
    barrier()
    if not os.path.exists(folder):
        return None
    try:
        model, tokenizer = fuse(Zaya.from_pretrained(folder, torch.float32, device)), Tokenizer.from_pretrained(folder)
    except ValueError as error:
        raise Damaged(f"{folder} is damaged: {error}") from None
    for parameter in model.parameters():                        # out of the mapped file, into aligned memory:
        parameter.data = parameter.data.clone()                 # else a resumed run may round differently
    path, state = os.path.join(folder, "trainer.pt"), None
    if os.path.exists(path):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise Damaged(f"{path} is damaged: {' '.join(str(error).split())[:150] or type(error).__name__}") from None
        if not (isinstance(state, dict) and {"step", "seconds", "settings", "parts"} <= state.keys()):
            raise Damaged(f"{path} was not written by a run of this program")
    return model, tokenizer, state


class Log:
    """log.csv, one row a step.  Opened at a step, it forgets the rows after it: a resumed run writes them again."""
    COLUMNS = ["stage", "step", "loss", "lr", "norm", "load", "entropy", "bias", "skip", "tokens_per_second", "seconds",
               "reward", "length", "no_end", "repetitive", "zero_groups", "staleness", "masked", "flips", "kl",
               "kl_live", "rollouts_per_second", "difficulty"]

    def __init__(self, out, stage, step):
        if not is_main():
            self.file = open(os.devnull, "w", encoding="utf-8")
            self.writer = csv.DictWriter(self.file, self.COLUMNS)
            return
        path = os.path.join(out, "log.csv")
        rows = [row for row in read_log(out) if STAGES.index(row["stage"]) < STAGES.index(stage)
                or (row["stage"] == stage and int(row["step"]) <= step)]
        with open(path + ".tmp", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a", encoding="utf-8", newline="")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)

    def add(self, **row):
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()


def read_log(out):
    """log.csv as dictionaries; a last row that a kill cut in half is left out.  Raises Damaged."""
    path = os.path.join(out, "log.csv")
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values()]
        if not {"stage", "step"} <= {*(reader.fieldnames or Log.COLUMNS)} <= {*Log.COLUMNS}:
            raise ValueError("it has other columns")
        for row in rows:
            STAGES.index(row["stage"])
            for key in row.keys() - {"stage", "difficulty"}:
                float(row[key] or 0)
    except (ValueError, TypeError, csv.Error) as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    return rows


# ---- many processes -------------------------------------------------------------------------------------------------
# torchrun --nproc_per_node N train.py …: the same run, whatever N is.  FSDP2 shards weights, gradients and optimizer
# states over the processes; each computes its own rows of every batch.  Steps and losses do not know: FSDP2 averages
# gradients, so a loss is divided by what *one* process has on average.  Sampling needs no gradients: each process
# samples its share of the prompts with a whole copy of the weights.  Every process tokenises and packs, or
# the first does for all.  All processes need to see the same --out and --data.


def world_size():
    """How many processes there are: 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main():
    """Whether this is the process that writes files."""
    return rank() == 0


def shard(items):
    """This process' part of a list, range or tensor: every N-th, so that what is sorted is shared out evenly."""
    return items[rank()::world_size()]


def all_gather(value):
    """The values of all processes, in a list."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def unshard(part):
    """The parts of all processes in the old order: unshard(shard(items)) == items."""
    parts = all_gather(part)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def all_reduce(*numbers):
    """Numbers, each summed over the processes."""
    if world_size() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def barrier():
    """Wait until all processes are here."""
    all_reduce(0)


def shard_model(model, size=0):
    """Shard the weights of each layer, and of what is around the layers, over the processes (FSDP2), in place.

    size: how many processes share one copy, such as those of a node; between such groups weights are replicated and
    gradients averaged.  0: all processes share one.  Alone: nothing.  -> the model, whose parameters are now DTensors.
    """
    if world_size() == 1:
        return model
    size, device = size or world_size(), next(model.parameters()).device.type
    shape, names = ((size,), ("shard",)) if size == world_size() else \
        ((world_size() // size, size), ("replicate", "shard"))
    mesh = dist.init_device_mesh(device, shape, mesh_dim_names=names)
    # A layer's router state is a view, which FSDP2 warns about: an operation in place would lose its gradient.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in model.modules():
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "hidden_states"):
        register_fsdp_forward_method(model, "hidden_states")
    return model


def whole_weights(model):
    """The state dict of a model, sharded or not, with whole tensors: every process takes part and gets all of them."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def shard_rows(batch):
    """This process' rows of each tensor (rows, S); rows of padding are added until all have equally many, since FSDP2
    wants every process to take part in every forward pass."""
    inputs, targets, positions = batch
    missing = -len(inputs) % world_size()
    padded = [F.pad(t, (0, 0, 0, missing), value=v) for t, v in ((inputs, 0), (targets, -100), (positions, -1))]
    return [shard(t) for t in padded]


class OptimizerState:
    """All optimizers of a model as one part of a checkpoint: whole tensors by parameter name, for any number of
    processes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)

    def __init__(self, model, optimizers):
        self.model, self.optimizers = model, optimizers

    def state_dict(self):
        """Whole in the first process, empty in the others."""
        if isinstance(self.model, FSDPModule):                  # sampling leaves the root's weights gathered
            self.model.reshard()
        return get_optimizer_state_dict(self.model, self.optimizers, options=self.options)

    def load_state_dict(self, state):
        set_optimizer_state_dict(self.model, self.optimizers, state, options=self.options)


@contextlib.contextmanager
def process_group():
    """Among torchrun's processes; alone, nothing.  The first process speaks, but whichever stops first says why.

    torchrun sends SIGTERM when one of them has ended.  A thread waits for it, as the process itself may be waiting for
    a message that will never come.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, number, processes = next(dist.rendezvous("env://"))
    reader, writer = os.pipe()

    def say(message):
        if store.add("said", 1) == 1:
            print(message, file=sys.__stderr__, flush=True)

    def wait_for_sigterm():
        while os.read(reader, 1)[0] != signal.SIGTERM:
            pass
        try:
            say("stopped, because another process of this run ended (torchrun says which); the same command goes on "
                "from the last checkpoint")
        finally:
            os._exit(1)

    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)              # the byte in the pipe is what counts
    signal.set_wakeup_fd(writer)
    threading.Thread(target=wait_for_sigterm, daemon=True).start()
    if number:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # The first process may tokenise a file for long while the others wait; an end is noticed by torchrun, not by this.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=number, world_size=processes,
                            timeout=datetime.timedelta(hours=4))
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            say(error.code)
            raise SystemExit(1) from None
        if number or not isinstance(error, SystemExit):
            time.sleep(5)                                       # another's end may be the cause: then SIGTERM comes
            sys.stderr = sys.__stderr__
        raise
    dist.destroy_process_group()


# ---- a run ----------------------------------------------------------------------------------------------------------


MUST_STAY = ["preset", "seed", "data", "tasks", "tokenizer", "context", "tokens_per_step", "micro_batch",
             "weight_decay", "grad_clip", "balancer_lr", "lr", "steps", "dtype", "groups", "group_size"]


def settings(config):
    return {name: getattr(config, name) for name in MUST_STAY}


def check_same_run(folder, name, state, model, config, changes):
    """A run goes on only with the settings and the shape it began with; which one differs is said."""
    if state is None:
        raise SystemExit(f"{folder} has no trainer.pt to go on from: put it back, or delete {folder}")
    pairs = [(setting, state["settings"].get(setting), now) for setting, now in settings(config).items()]
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
            if file_kind(path) != "txt":
                budget = 4_000_000
                for messages in read_jsonl(path, config.skip_bad_lines):
                    texts += [message["content"] for message in messages]
                    budget -= sum(len(message["content"]) + 1 for message in messages)
                    if budget < 0:
                        break
            else:
                texts.append("".join(itertools.islice(read_text(path), 4))[:4_000_000])
            if not any(texts):
                raise SystemExit(f"{path} has no text")
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
    return fuse(Zaya(shape))


def write_report(out, report):
    """report.json for programs; report.md, report.png and loss.png for people."""
    if not is_main():
        return
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
            "Held-out pass@1 at temperature 1, at each task's own levels (chance: the teacher's answer to another "
            "one):", ""]
    text += table(["task", "chance", *stages],
                  *([task, f"{chance:.2f}", *(f"{r['tasks'].get(task, 0):.2f}" for r in results)]
                    for task, chance in results[-1]["chance"].items()),
                  ["**all**", "", *(f"**{r['pass@1']:.3f}**" for r in results)],
                  ["95 % interval", "", *("{:.3f}-{:.3f}".format(*r["ci95"]) for r in results)],
                  ["greedy", "", *(f"{r['greedy']:.3f}" for r in results)],
                  ["problems", "", *(str(result["problems"]) for result in results)],
                  ["minutes", "", *(f"{report['seconds'][name] / 60:.1f}" for name in stages)])
    last, asked = results[-1], [task for task in REASONING if task in results[-1]["tasks"]]
    sft = report["stages"].get("sft", {"tasks_ci95": {}})
    if stages[-1] in STAGES[3:] and asked and last["tasks"].keys() <= sft["tasks_ci95"].keys():
        text += ["Reinforcement learning, per task, with 95 % intervals (and greedy):", ""]
        text += table(["task", "after sft", f"after {stages[-1]}"],
                      *([task, *("{:.2f} [{:.2f}, {:.2f}] ({:.2f})".format(
                          r["tasks"][task], *r["tasks_ci95"][task], r["greedy_tasks"][task]) for r in (sft, last))]
                        for task in last["tasks"]),
                      ["**the tasks of the RL stages**", *(f"**{np.mean([r['tasks'][t] for t in asked]):.3f}** "
                                                      f"({np.mean([r['greedy_tasks'][t] for t in asked]):.3f})"
                                                      for r in (sft, last))])
    if "rlve" in stages and "start" in report["stages"]["rlve"]:
        rlve = report["stages"]["rlve"]
        text += ["Difficulty of the adaptive environments, first and last:", ""]
        text += table(["environment", "found", "reached"], *([task, str(d), str(rlve["end"][task])]
                                                             for task, d in rlve["start"].items()))
    if report["ttc"]:
        text += ttc_table(report["ttc"], table)
    text += ["Held-out loss per token (late: at positions beyond the first stage's context):", ""]
    text += table(["stage", "source", "before", "after", "late, before", "late, after"],
                  *([name, source, *("-" if loss[key] is None else f"{loss[key]:.3f}"
                                     for key in ("before", "after", "late_before", "late_after"))]
                    for name, result in zip(stages, results) for source, loss in result["loss"].items()))
    with open(os.path.join(out, "report.md.tmp"), "w", encoding="utf-8", errors="replace") as file:
        file.write("\n".join(text))
    os.replace(os.path.join(out, "report.md.tmp"), os.path.join(out, "report.md"))
    draw_report(out, report, stages)


def ttc_table(rows, table):
    """Markdown lines: test-time compute, a column a task."""
    first = rows[0]
    N, T = first["population"], first["T"]
    kinds = [("single", "one sample"), ("greedy", "greedy"), ("maj@N", f"majority of {N}"),
             ("maj@equal_tokens", f"majority of {N * (T + 1)}: equal tokens"),
             ("field_vote@equal_tokens", f"… vote on each field, of {N * (T + 1)}"),
             ("certified@equal_tokens", f"the first of {N * (T + 1)} that says it holds"),
             ("pass@N", f"any of {N} (oracle)"), ("pass@equal_tokens", f"any of {N * (T + 1)} (oracle)"),
             ("delethink", "Delethink, C = 1"), ("full_rsa", "full RSA"),
             ("markovian_rsa", f"**Markovian RSA**, tails of {first['tail']}"),
             ("markovian_rsa_majority", "… majority of its last round")]
    text = [f"Test-time compute on {first['problems']} held-out problems a task: N = {N}, C = {first['subset']}, "
            f"T = {T}, shares that are right with 95 % intervals:", ""]
    return text + table(
        ["", *(f"{row['task']}, difficulty {row['difficulty']}" for row in rows)],
        *([what, *("{:.2f} [{:.2f}, {:.2f}]".format(row[key], *row[key + "_ci95"]) if key in row else "-"
                   for row in rows)] for key, what in kinds if any(key in row for row in rows)),
        ["tokens generated a problem", *(f"{row['generated_tokens']:,.0f}" for row in rows)],
        ["longest prompt (full RSA's)", *(f"{r['longest_prompt']} ({r['longest_prompt_full_rsa']})" for r in rows)])


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
    rows, panels = (2, len(report["ttc"])) if report["ttc"] else (1, 1)
    figure = plt.figure(figsize=(12, 4 * rows))
    axis = figure.add_subplot(rows, 1, 1)
    for number, row in enumerate(report["ttc"]):
        draw_ttc(figure.add_subplot(rows, panels, panels + 1 + number), row, number)
    for i, stage in enumerate(stages):
        solved = [report["stages"][stage]["tasks"].get(task, 0) for task in tasks]
        place = np.arange(len(tasks)) + (i - (len(stages) - 1) / 2) * width
        axis.bar(place, solved, width, label=f"after {stage}", color=plt.cm.viridis(i / len(stages)))
    chance = list(report["stages"][stages[-1]]["chance"].values())
    axis.hlines(chance, np.arange(len(tasks)) - 0.45, np.arange(len(tasks)) + 0.45, "black", "dotted", label="chance")
    axis.set_xticks(range(len(tasks)), tasks, rotation=20)
    axis.set(ylim=(0, 1.05), ylabel="pass@1", title="Held-out problems solved, one sample at temperature 1")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, "report.png")

    log = read_log(out)
    draw_curves(log, [("loss", "training loss (nats per token)"), ("entropy", "expert load entropy\n(1 = even)")],
                [name for name in stages if name in STAGES[:3]], f"{report['preset']}, seed {report['seed']}",
                lambda figure: save(figure, "loss.png"))
    cascade = [name for name in stages if name in STAGES[3:]]
    if cascade:
        draw_curves(log, [("reward", "mean reward"), ("zero_groups", "groups\nwithout signal"),
                          ("no_end repetitive", "replies without end\n(dotted: repetitive)"), ("norm", "gradient norm"),
                          ("difficulty", "difficulty of the\nenvironments (rlve)")], cascade,
                    f"Reinforcement learning: {report['preset']}, seed {report['seed']}",
                    lambda figure: save(figure, "rewards.png"))


def draw_ttc(axis, row, number):
    """Accuracy against generated tokens, a dot a round, on one task."""
    for method, label in (("vote", "majority vote"), ("delethink", "Delethink, C = 1"), ("full_rsa", "full RSA"),
                          ("markovian_rsa", "Markovian RSA")):
        values, bounds = np.array(row["rounds"][method]), np.array(row["rounds_ci95"][method])
        bold = method == "markovian_rsa"
        axis.errorbar(row["tokens"][method], values, (values - bounds[:, 0], bounds[:, 1] - values), marker="o",
                      markersize=4, capsize=2, label=label, linewidth=2 if bold else 1.2, zorder=3 if bold else 2)
    axis.axhline(row["greedy"], color="gray", linestyle="dotted", label="greedy")
    axis.set(title=f"{row['task']}, difficulty {row['difficulty']}", xlabel="tokens generated a problem",
             ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    if number == 0:
        axis.set_ylabel("right (a dot a round)")
        axis.legend(fontsize=8)


def draw_curves(log, curves, stages, title, save):
    """One panel per (columns, label) over the steps of all stages; a column of task=value texts gets a line a task."""
    import matplotlib.pyplot as plt
    height = [1.6] + [1.6 if columns == "difficulty" else 1 for columns, _ in curves[1:]]
    figure, axes = plt.subplots(len(curves), 1, figsize=(9, 1 + 1.8 * sum(height)), sharex=True, height_ratios=height)
    start = 0
    for number, stage in enumerate(stages):
        rows = [row for row in log if row["stage"] == stage]
        for axis, column, style in [(axis, column, style) for axis, (columns, _) in zip(axes, curves)
                                    for column, style in zip(columns.split(), ("solid", "dotted"))]:
            seen = [(start + int(row["step"]), row[column]) for row in rows if row[column]]
            if not seen:
                continue
            steps, values = zip(*seen)
            if column == "difficulty":
                lines = [dict(part.split("=") for part in value.split()) for value in values]
                for i, task in enumerate(lines[0]):
                    axis.plot(steps, [int(line[task]) for line in lines], color=plt.cm.tab20(i), label=task)
                axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
                continue
            values = np.array(values, float)
            width = min(15, 2 * (len(values) // 8) + 1)
            smooth = np.convolve(np.pad(values, width // 2, "edge"), np.ones(width) / width, "valid")
            axis.plot(steps, smooth, color=f"C{number}", label=stage, linestyle=style)
            axis.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.7)
        start += int(rows[-1]["step"]) if rows else 0
    for axis, (_, label) in zip(axes, curves):
        axis.set_ylabel(label)
    axes[0].set_title(title)
    axes[0].legend()
    axes[-1].set_xlabel("step")
    save(figure)


def run_evaluation(config, report, tasks, device):
    """Test-time compute of the finished model on each of `tasks` -> report["ttc"]; what is there already stays."""
    asked, final = PRESETS[config.preset]["evaluate"], load_checkpoint(os.path.join(config.out, "final"), device)
    if not (final and report["stages"]):
        raise SystemExit(f"evaluate needs {config.out}/final and the report.json of its run: run the other stages "
                         "first")
    model, tokenizer, _ = final
    for name in tasks:
        if any((row["task"], row["difficulty"]) == (name, asked.tasks[name]) for row in report["ttc"]):
            continue
        begun = time.perf_counter()
        row = evaluate_ttc(model, tokenizer, name, asked, config.seed)
        report["ttc"].append(row)
        report["seconds"]["evaluate"] = report["seconds"].get("evaluate", 0.0) + time.perf_counter() - begun
        write_report(config.out, report)
        print("evaluate: {task} at {difficulty} | single {single:.3f}, vote at equal tokens {maj@equal_tokens:.3f}, "
              "Markovian RSA {markovian_rsa:.3f} [{markovian_rsa_ci95[0]:.3f}, {markovian_rsa_ci95[1]:.3f}], full RSA "
              "{full_rsa:.3f} | ".format(**row) + f"{time.perf_counter() - begun:.0f} s")


# What a run without problems would report, and the kinds of what is in a report.
NO_RESULT = {"pass@1": 0.0, "ci95": [0.0, 0.0], "greedy": 0.0, "problems": 0, "tasks": {}, "tasks_ci95": {},
             "greedy_tasks": {}, "chance": {}}


def alike(content, sample):
    """Whether a dictionary read from a file has everything that `sample` has, of the same kinds."""
    return isinstance(content, dict) and all(isinstance(content.get(key), (int, float) if type(value) is float else
                                                        type(value)) for key, value in sample.items())


def read_report(config):
    """report.json of this run so far.  Raises Damaged if there is one that no run of this program wrote."""
    report = {"preset": config.preset, "seed": config.seed, "seconds": {}, "params": {}, "stages": {}, "ttc": []}
    path = os.path.join(config.out, "report.json")
    if not os.path.exists(path):
        return report
    older = read_json(path)
    if not (alike(older, report) and alike(older["params"], {"total": 0, "active": 0})
            and older["stages"].keys() <= older["seconds"].keys() & {*STAGES}
            and all(alike(result, {**NO_RESULT, "loss": {}}) for result in older["stages"].values())
            and all(alike(row, {"task": "", "difficulty": 0, "rounds": {}}) for row in older["ttc"])):
        raise Damaged(f"{path} is no report of this program, or a part of one (without it finished stages are measured "
                      "again)")
    if config.stages == "evaluate" and (older["preset"], older["seed"]) != (config.preset, config.seed):
        raise SystemExit(f"{config.out} was made with --preset {older['preset']} --seed {older['seed']}: say so again")
    return {**older, "preset": config.preset, "seed": config.seed}


def run_stages(config, changes, device, dtype):
    """All that was asked for, one stage after the other, with a report after each."""
    begun, report = time.perf_counter(), read_report(config)
    (there, wanted), tasks, model = stages_to_run(config), task_names(config.tasks), None
    evaluated = [name for name in PRESETS[config.preset]["evaluate"].tasks
                 if name in tasks and "evaluate" in config.stages.split(",")]
    if not (wanted or evaluated):
        raise SystemExit(f"--stages {config.stages} with --tasks {config.tasks} leaves nothing to run")
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
            before = there[there.index(name) - 1]
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
        if not (state and state.get("done")):                   # what an older run in this folder reported is gone
            for later in [*STAGES[STAGES.index(name):], "evaluate"]:
                report["stages"].pop(later, None)
                report["seconds"].pop(later, None)
            report["ttc"] = []
        if state and state.get("done") and name in report["stages"]:
            print(f"{name}: done before, {report['stages'][name]['pass@1']:.3f} pass@1")
            continue
        if not (state and state.get("done")):
            run = run_rl if isinstance(stage, RLStage) else run_stage
            state = run(name, config, stage, model, tokenizer, state, device, dtype)
            if world_size() > 1:                                # it was sharded: whole again, to sample from
                model, tokenizer, _ = load_checkpoint(folder, device)
        result = pass_at_1(model, tokenizer, tasks, config.eval_problems, config.eval_samples) \
            if tasks and config.eval_problems and config.eval_samples else \
            dict(NO_RESULT)
        result |= {key: state[key] for key in ("start", "end", "judged") if key in state}
        result["loss"] = {source: {"before": state["before"][source]["loss"], "after": after["loss"],
                                   "late_before": state["before"][source]["late"], "late_after": after["late"]}
                          for source, after in state.get("after", {}).items()}
        report["seconds"][name], report["stages"][name] = state["seconds"], result
        write_report(config.out, report)
        losses = ", ".join(f"{source} {l['before']:.2f} -> {l['after']:.2f}" for source, l in result["loss"].items())
        print(f"{name}: {state['seconds']:.0f} s | " + (f"held-out loss {losses} | " if losses else "")
              + "pass@1 {pass@1:.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}], greedy {greedy:.3f}, on {problems} held-out "
              "problems".format(**result))
    if wanted and not any(os.path.exists(os.path.join(config.out, later)) for later in STAGES[STAGES.index(name) + 1:]):
        save_checkpoint(os.path.join(config.out, "final"), model, tokenizer)
    if evaluated:
        run_evaluation(config, report, evaluated, device)
    if not is_main():
        return
    with open(os.path.join(config.out, "report.md"), encoding="utf-8") as file:
        print("\n" + file.read())
    files = [name for name in ("report.md", "report.png", "loss.png", "rewards.png", "log.csv")
             if os.path.exists(os.path.join(config.out, name))]
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes in all; {config.out} holds final/ (the checkpoint), "
          + ", ".join(files))


def main(arguments=None):
    config, changes = parse_arguments(arguments)
    for path in config.data:
        if not os.path.isfile(path):
            raise SystemExit(f"--data {path}: no such file")
        if file_kind(path) is None:
            raise SystemExit(f"--data {path}: .txt and .jsonl files are read, .json too, each also as .gz; rename or "
                             "convert it")
    device, dtype, why = choose_device(config)
    try:
        os.makedirs(config.out, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {config.out} cannot be a folder: {error.strerror}") from None
    print(why)
    print("settings: " + ", ".join(f"{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(config)))
    with alone_in(config.out):
        run_stages(config, changes, device, dtype)


# ---- appendix: the tasks --------------------------------------------------------------------------------------------


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

    A subclass gives `generate(rng, d)` -> (prompt, data); `solution(data, rng, error_rate)` -> (reasoning, answer), in
    which each step goes wrong with that probability; and `verify_answer(data, answer)` -> bool for any string.
    To copy one, take Problem, split_answer, draw, is_held_out and this class along, and what its docstring names.
    """
    exact = True                            # the teacher always finds the answer; otherwise it searches and may fail
    levels = (1, 2, 3)                      # the fixed difficulties of evaluation and RL, where SFT leaves room above
    hardest = 30                            # difficulties end here
    reads = False                           # `aggregate` builds on the replies that it is shown
    labelled = False                        # an answer is a list of labels and values, one character each

    def __init__(self, name):
        self.name = name

    def make(self, seed, d):
        """The same seed and difficulty (an integer from 1) give the same problem."""
        prompt, data = self.generate(random.Random(f"{self.name} {seed} {d}"), max(1, d))
        return Problem(self.name, d, prompt, data)

    def verify(self, problem, text):
        """(reward, format), 0 or 1 each, for any text."""
        answer = split_answer(text)
        if answer is None or len(answer) > 1000:
            return 0, 0
        return int(self.verify_answer(problem.data, answer)), 1

    def solve(self, problem, seed=0):
        """A worked reply by the teacher: <think>…</think>answer."""
        reasoning, answer = self.solution(problem.data, random.Random(f"solve {seed}"), 0.0)
        return f"<think>{reasoning}</think>{answer}"

    def corrupt(self, problem, seed=0):
        """A plausible reply with a wrong answer: the teacher makes more and more errors until one spoils it.  If none
        does, we take the teacher's reply to another problem."""
        rng = random.Random(f"corrupt {seed}")
        error_rate, data = 0.1, problem.data
        for attempt in range(10_000):
            if attempt > 30:
                data = draw(self, rng.getrandbits(48), problem.difficulty, held_out=False).data
            reasoning, answer = self.solution(data, rng, error_rate)
            if not self.verify_answer(problem.data, answer):
                return f"<think>{reasoning}</think>{answer}"
            error_rate = min(1.0, error_rate + 0.1)
        raise RuntimeError(f"task {self.name} made no wrong reply to {problem.prompt!r}")

    def self_verified(self, text):
        """Whether a reply says that its answer was checked and holds; None where replies of the task say nothing."""

    def good_rollout(self, problem, seed=0):
        """A reply that helps whoever reads it, for aggregation prompts."""
        return self.solve(problem, seed)

    def aggregate(self, problem, replies, seed=0):
        """The teacher's reply after reading other replies; a task that does not read solves the problem by itself."""
        return self.solve(problem, seed)


class Search(Task):
    """A task whose teacher guesses and checks: guess(data, rng) -> answer, and trial(data, answer, rng, error_rate) ->
    (its text, whether the answer seems to work).  "#y" or "#n" before the answer says how the last trial went.

    After a failed trial the teacher gives up with probability `gives_up`.  So imitating it is capped, and only reward
    can teach a model to guess better and to go on.
    """
    exact = False
    gives_up, most = 0.6, 8

    def solution(self, data, rng, error_rate):
        trials = []
        while True:
            answer = self.guess(data, rng)
            text, works = self.trial(data, answer, rng, error_rate)
            trials.append(text)
            if works or len(trials) == self.most or rng.random() < self.gives_up:
                return f"{';'.join(trials)}#{'y' if works else 'n'}{answer}", answer

    def good_rollout(self, problem, seed=0):
        """A right reply if 100 attempts give one: a search that gives up hardly ever ends in one."""
        for attempt in range(100):
            reply = self.solve(problem, f"{seed} {attempt}")
            if self.verify(problem, reply)[0]:
                return reply
        return self.solve(problem, seed)

    def aggregate(self, problem, replies, seed=0):
        """Take over one of the right answers and check it anew; if there is none, search honestly."""
        right = [split_answer(reply) for reply in replies if self.verify(problem, reply)[0]]
        if not right:
            return self.solve(problem, seed)
        rng = random.Random(f"aggregate {seed}")
        answer = rng.choice(right)
        text, _ = self.trial(problem.data, answer, rng, 0.0)
        return f"<think>{text}#y{answer}</think>{answer}"

    def self_verified(self, text):
        answer = split_answer(text)
        return answer is not None and text.partition("</think>")[0].endswith(f"#y{answer}")


def with_error(value, rng, error_rate):
    """`value`, or with probability `error_rate` a number with another last digit."""
    if not error_rate or rng.random() >= error_rate:
        return value
    return value - value % 10 + (value + rng.randrange(1, 10)) % 10


def column_labels(rng, count):
    """`count` letters in a row of the alphabet with a random start; after z comes A, then a again."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    start = rng.randrange(52)
    return [letters[(start + i) % 52] for i in range(count)]


class ColumnSums(Task):
    """The last digit of each column's sum; d columns.  One right answer, made of independent steps.

    sum 75c,39d -> <think>c:7+5=2d:3+9=2#c2d2</think>c2d2
    A value stands right behind its label only at the end, where a reader of the tail finds it.  Needs with_error and
    column_labels.
    """
    levels, labelled = (6, 7, 8), True

    def generate(self, rng, d):
        columns = [[rng.randrange(10), rng.randrange(10), label] for label in column_labels(rng, d)]
        return "sum " + ",".join(f"{a}{b}{label}" for a, b, label in columns), {"columns": columns}

    def solution(self, data, rng, error_rate):
        steps, answer = "", ""
        for a, b, label in data["columns"]:
            total = with_error((a + b) % 10, rng, error_rate)
            steps += f"{label}:{a}+{b}={total}"
            answer += f"{label}{total}"
        return f"{steps}#{answer}", answer

    def verify_answer(self, data, answer):
        return answer == self.solution(data, None, 0.0)[1]


class Add(Task):
    """Addition of two d-digit numbers with carries.  An error spoils only what follows it.

    47+85 -> <think>7+5+0=12,4+8+1=13</think>132          (digit + digit + carry = carry and digit; needs with_error)
    """
    levels = (4, 5, 6)

    def generate(self, rng, d):
        smallest = 10 ** (d - 1) if d > 1 else 0
        a, b = rng.randrange(smallest, 10**d), rng.randrange(smallest, 10**d)
        return f"{a}+{b}", {"a": a, "b": b}

    def solution(self, data, rng, error_rate):
        a, b, steps, carry, total, place = data["a"], data["b"], [], 0, 0, 1
        while place == 1 or place <= max(a, b):
            x, y = a // place % 10, b // place % 10
            value = with_error(x + y + carry, rng, error_rate)
            steps.append(f"{x}+{y}+{carry}={value // 10}{value % 10}")
            carry = value // 10
            total += value % 10 * place
            place *= 10
        return ",".join(steps), str(total + carry * place)

    def verify_answer(self, data, answer):
        return answer == str(data["a"] + data["b"])


class Sort(Task):
    """Sort d + 1 digits by selection: the smallest one, then what is left.

    sort 3917 -> <think>1:397,3:97,7:9,9:</think>1379
    """
    levels = (4, 5, 6)

    def generate(self, rng, d):
        digits = "11"
        while len(set(digits)) == 1:
            digits = "".join(str(rng.randrange(10)) for _ in range(d + 1))
        return f"sort {digits}", {"digits": digits}

    def solution(self, data, rng, error_rate):
        left, steps, answer = list(data["digits"]), [], ""
        while left:
            pick = rng.choice(left) if rng.random() < error_rate else min(left)
            left.remove(pick)
            answer += pick
            steps.append(f"{pick}:{''.join(left)}")
        return ",".join(steps), answer

    def verify_answer(self, data, answer):
        return answer == "".join(sorted(data["digits"]))


def run_expression(text, registers, rng=None, error_rate=0.0):
    """The values an expression goes through, left to right, all mod 10: the language of every program here.

        expression := operand (operator operand)*      operand := digit | register      operator := + - *

    `registers` {letter: 0 … 9}.  None for any text that is not such an expression, has an unknown register or more than
    100 characters.  Nothing else can happen: the work is linear in the text and numbers stay below 10.

    >>> run_expression("x*2+3", {"x": 4}), run_expression("y+1", {"x": 4}), run_expression("__import__('os')", {})
    ([8, 1], None, None)
    """
    if len(text) > 100 or len(text) % 2 == 0:
        return None
    values = []
    for i in range(0, len(text), 2):
        operand = int(text[i]) if text[i] in "0123456789" else registers.get(text[i])
        if operand is None:
            return None
        if i == 0:
            value = operand
            continue
        if text[i - 1] not in "+-*":
            return None
        value = with_error(calculate(value, text[i - 1], operand) % 10, rng, error_rate)
        values.append(value)
    return values or [value]


def calculate(a, operator, b):
    if operator == "*":
        return a * b
    return a + b if operator == "+" else a - b


def run_program(text, registers, rng=None, error_rate=0.0):
    """The registers after each line of 'a=x+3;b=a*2', for at most 32 lines; None if a line is none."""
    states, lines = [dict(registers)], text.split(";", 32)
    if len(lines) > 32:
        return None
    for line in lines:
        values = run_expression(line[2:], states[-1], rng, error_rate)
        if values is None or line[1] != "=" or line[0] not in "abcdex":
            return None
        states.append({**states[-1], line[0]: values[-1]})
    return states[1:]


class Registers(Task):
    """Output prediction: what a program of d + 1 lines leaves in its registers.  Needs run_program.

    run a=3;b=7;a=b*2 -> <think>a=3>a3;b=7>a3b7;a=b*2>a4b7</think>a4b7
    """

    def generate(self, rng, d):
        names, lines = "abcde"[:2 + d // 4], []
        for _ in range(d + 1):
            known = sorted({line[0] for line in lines})
            if not known or (len(known) < len(names) and rng.random() < 0.4):
                lines.append(f"{names[len(known)]}={rng.randrange(10)}")
            else:
                other = rng.choice([*known, str(rng.randrange(10))])
                lines.append(f"{rng.choice(known)}={rng.choice(known)}{rng.choice('+-*')}{other}")
        return "run " + ";".join(lines), {"lines": lines}

    def solution(self, data, rng, error_rate):
        states = run_program(";".join(data["lines"]), {}, rng, error_rate)
        steps = []
        for line, state in zip(data["lines"], states):
            answer = "".join(f"{name}{state[name]}" for name in sorted(state))
            steps.append(f"{line}>{answer}")
        return ";".join(steps), answer

    def verify_answer(self, data, answer):
        return answer == self.solution(data, None, 0.0)[1]


class Program(Task):
    """Write a program (the standard form of code tasks): for a formula with d + 1 operations, checked on ten inputs.

    code (3-(x+4)) -> <think>6:0,3</think>a=x+4;a=3-a          (a try: on input 6, a is 0, then 3; needs run_program)
    """
    levels = (4, 5, 6)

    def generate(self, rng, d):
        outputs = {0}
        while len(outputs) == 1:                                # a constant would be no lesson
            formula, lines, inner = "x", [], "x"
            for _ in range(d + 1):
                other, operator = rng.choice("x123456789"), rng.choice("+-*")
                if rng.random() < 0.5:
                    formula = f"({other}{operator}{formula})"
                    lines.append(f"a={other}{operator}{inner}")
                else:
                    formula = f"({formula}{operator}{other})"
                    lines.append(f"a={inner}{operator}{other}")
                inner = "a"
            outputs = {self.output(";".join(lines), x) for x in range(10)}
        return f"code {formula}", {"lines": lines}

    @staticmethod
    def output(program, x):
        """What a program leaves in register a; None if it is no program, or leaves nothing there."""
        states = run_program(program, {"x": x})
        return states[-1].get("a") if states else None

    def solution(self, data, rng, error_rate):
        lines = []
        for line in data["lines"]:
            if rng.random() < error_rate:
                line = f"{line[:3]}{rng.choice('+-*')}{line[4]}"
            lines.append(line)
        x = rng.randrange(10)
        states = run_program(";".join(lines), {"x": x}, rng, error_rate)
        return f"{x}:" + ",".join(str(state["a"]) for state in states), ";".join(lines)

    def verify_answer(self, data, answer):
        program = ";".join(data["lines"])
        return all(self.output(answer, x) == self.output(program, x) for x in range(10))


def worked(expression, x, rng, error_rate):
    """An expression on x, worked out step by step, and its value: x*2+3 on 4 -> ('4*2=8,8+3=1', 1)."""
    value, steps = x, []
    for i, result in enumerate(run_expression(expression, {"x": x}, rng, error_rate)):
        steps.append(f"{value}{expression[2 * i + 1:2 * i + 3]}={result}")
        value = result
    return ",".join(steps), value


def random_chain(rng, count, operators, highest):
    """An expression of `count` operations on x: x*2+3."""
    expression = "x"
    for _ in range(count):
        expression += rng.choice(operators) + str(rng.randrange(2, highest + 1))
    return expression


class Synthesize(Search):
    """Rebuild a function from d + 1 examples (CodeARC's form), (d + 1) // 2 operations.  Many valid programs.

    fit 0>3,4>7 -> <think>x*2:0*2=0>3;x+3:0+3=3>3/4+3=7>7#yx+3</think>x+3       (the value, then what it should be)
    A trial stops at the first example that does not hold.  Needs Search, run_expression, worked, random_chain.
    """
    reads, levels = True, (1, 2)

    def generate(self, rng, d):
        count = (d + 1) // 2
        hidden = self.guess({"count": count}, rng)
        examples = [[x, run_expression(hidden, {"x": x})[-1]] for x in rng.sample(range(10), min(d + 1, 8))]
        return "fit " + ",".join(f"{x}>{y}" for x, y in examples), {"examples": examples, "count": count}

    def guess(self, data, rng):
        return random_chain(rng, data["count"], "+*", 5)

    def trial(self, data, answer, rng, error_rate):
        parts = []
        for x, y in data["examples"]:
            steps, value = worked(answer, x, rng, error_rate)
            parts.append(f"{steps}>{y}")
            if value != y:
                break
        return f"{answer}:" + "/".join(parts), value == y

    def verify_answer(self, data, answer):
        for x, y in data["examples"]:
            values = run_expression(answer, {"x": x})
            if values is None or values[-1] != y:
                return False
        return True


class Falsify(Search):
    """Find an input on which a wrong program fails: it is right but for a branch, d operations.  Many valid answers.

    break x*2+3,x>6?x*2-1 -> <think>3n;8y:8*2=6,6+3=9/8*2=6,6-1=5#y8</think>8
    A trial asks whether the input takes the branch, and if so works out both programs.  Needs what Synthesize needs.
    """
    hardest = 12

    def generate(self, rng, d):
        while True:
            right, other = random_chain(rng, d, "+-*", 9), random_chain(rng, d, "+-*", 9)
            above, count = rng.random() < 0.5, rng.randrange(1, 5)
            branch = f"x>{9 - count}" if above else f"x<{count}"
            data = {"right": right, "other": other, "branch": branch}
            if any(self.verify_answer(data, str(x)) for x in range(10)):
                return f"break {right},{branch}?{other}", data

    def guess(self, data, rng):
        return str(rng.randrange(10))

    @staticmethod
    def taken(data, x):
        """Whether input x takes the branch 'x>6' or 'x<3'."""
        bound = int(data["branch"][2])
        return x > bound if data["branch"][1] == ">" else x < bound

    def trial(self, data, answer, rng, error_rate):
        x = int(answer)
        misjudged = rng.random() < error_rate
        if self.taken(data, x) == misjudged:
            return f"{x}n", False
        steps, value = worked(data["right"], x, rng, error_rate)
        more, other = worked(data["other"], x, rng, error_rate)
        return f"{x}y:{steps}/{more}", value != other

    def verify_answer(self, data, answer):
        if answer not in list("0123456789") or not self.taken(data, int(answer)):
            return False
        right, other = (run_expression(data[key], {"x": int(answer)}) for key in ("right", "other"))
        return right[-1] != other[-1]


class Find(Task):
    """Predict an input: for each of d columns (a, t) find a digit x with (x + a) mod 10 < t.  Many valid answers.

    find 06b,85c -> <think>b:5+0=5<65;c:0+8=8<5.#b5c.</think>b5c.      (after t, the guess if it holds or a dot)
    The teacher guesses once per column and checks honestly.  A dot says that it did not solve a column.  Needs
    with_error and column_labels.
    """
    exact, labelled, reads = False, True, True

    def generate(self, rng, d):
        columns = [[rng.randrange(10), rng.randrange(4, 9), label] for label in column_labels(rng, d)]
        return "find " + ",".join(f"{a}{t}{label}" for a, t, label in columns), {"columns": columns}

    def solution(self, data, rng, error_rate, candidates=None):
        """`candidates` {label: digits}: guess among these where there are any."""
        candidates, steps, answer = candidates or {}, [], ""
        for a, t, label in data["columns"]:
            x = rng.choice(candidates.get(label) or range(10))
            value = with_error((x + a) % 10, rng, error_rate)
            kept = str(x) if value < t else "."
            steps.append(f"{label}:{x}+{a}={value}<{t}{kept}")
            answer += label + kept
        return f"{';'.join(steps)}#{answer}", answer

    def verify_answer(self, data, answer):
        if len(answer) != 2 * len(data["columns"]):
            return False
        for i, (a, t, label) in enumerate(data["columns"]):
            mark, x = answer[2 * i], answer[2 * i + 1]
            if mark != label or x not in "0123456789" or (a + int(x)) % 10 >= t:
                return False
        return True

    def self_verified(self, text):
        return "." not in (split_answer(text) or ".")

    def aggregate(self, problem, replies, seed=0):
        """For each column take a valid value that one of the replies has, else guess; check each anew."""
        answers = "|".join(split_answer(text) or "" for text in replies)
        valid = {}
        for a, t, label in problem.data["columns"]:
            valid[label] = [int(x) for x in re.findall(f"{label}([0-9])", answers) if (int(x) + a) % 10 < t]
        reasoning, answer = self.solution(problem.data, random.Random(f"aggregate {seed}"), 0.0, valid)
        return f"<think>{reasoning}</think>{answer}"


class Countdown(Search):
    """Reach a target with d + 1 numbers, each used once, by + - *, evaluated left to right.  Many valid answers.

    make 13 of 3,5,2 -> <think>3+2-5:3+2=5,5-5=0;3*5-2:3*5=15,15-2=13#y3*5-2</think>3*5-2
    Needs Search, with_error, calculate.
    """
    levels, hardest = (1, 2), 7

    def generate(self, rng, d):
        while True:
            numbers = [rng.randrange(1, 10) for _ in range(min(d + 1, 8))]
            target = self.value(self.guess({"numbers": numbers}, rng))
            if target <= 99:
                return f"make {target} of {','.join(map(str, numbers))}", {"numbers": numbers, "target": target}

    @staticmethod
    def value(expression):
        total = int(expression[0])
        for operator, number in zip(expression[1::2], expression[2::2]):
            total = calculate(total, operator, int(number))
        return total

    def guess(self, data, rng):
        """A random expression over all numbers that never goes below 0."""
        first, *others = rng.sample(data["numbers"], len(data["numbers"]))
        text = str(first)
        for number in others:
            operators = "+-*" if self.value(text) >= number else "+*"
            text += f"{rng.choice(operators)}{number}"
        return text

    def trial(self, data, answer, rng, error_rate):
        value, steps = int(answer[0]), []
        for operator, number in zip(answer[1::2], answer[2::2]):
            result = with_error(calculate(value, operator, int(number)), rng, error_rate)
            steps.append(f"{value}{operator}{number}={result}")
            value = result
        return f"{answer}:{','.join(steps)}", value == data["target"]

    def verify_answer(self, data, answer):
        if not re.fullmatch(r"[0-9]([-+*][0-9]){0,9}", answer):
            return False
        numbers = sorted(int(number) for number in answer[::2])
        return numbers == sorted(data["numbers"]) and self.value(answer) == data["target"]


class Sat(Search):
    """Satisfiability, a puzzle: d + 1 variables, d + 2 clauses of two literals, + true or - false.  Many valid answers.

    sat 1+2+,1+2-,1-2- -> <think>1+2+:1+2+y,1+2-y,1-2-n;1+2-:1+2+y,1+2-y,1-2-y#y1+2-</think>1+2-
    A trial stops at the first clause that does not hold.  Needs Search.
    """

    def generate(self, rng, d):
        variables, clauses = range(1, min(d + 1, 9) + 1), []
        planted = "".join(f"{v}{self.sign(rng)}" for v in variables)
        while len(clauses) < d + 2:
            clause = "".join(sorted(f"{v}{self.sign(rng)}" for v in rng.sample(variables, 2)))
            if self.holds(clause, planted) and clause not in clauses:
                clauses.append(clause)
        return "sat " + ",".join(clauses), {"count": len(variables), "clauses": clauses}

    @staticmethod
    def sign(rng):
        return "+" if rng.random() < 0.5 else "-"

    def guess(self, data, rng):
        return "".join(f"{v}{rng.choice('+-')}" for v in range(1, data["count"] + 1))

    @staticmethod
    def holds(clause, answer):
        """Whether an answer '1+2+3-' has one of the two literals of the clause '1+2-'."""
        return clause[:2] in answer or clause[2:] in answer

    def trial(self, data, answer, rng, error_rate):
        parts = []
        for clause in data["clauses"]:
            misjudged = rng.random() < error_rate
            works = self.holds(clause, answer) != misjudged
            parts.append(clause + ("y" if works else "n"))
            if not works:
                break
        return f"{answer}:" + ",".join(parts), works

    def verify_answer(self, data, answer):
        form = "".join(f"{v}[+-]" for v in range(1, data["count"] + 1))
        return re.fullmatch(form, answer) is not None and all(self.holds(c, answer) for c in data["clauses"])


WARM = ["dear", "kind", "love", "happy", "thanks", "please"]
WORDS = WARM + ["red", "sun", "map", "tree", "cold", "fish", "book", "rain", "stone", "lamp", "gray", "door", "milk",
                "north", "quick", "glass", "bird", "old"]


class Constraints(Task):
    """Follow instructions: a reply of different words that obeys up to d + 1 rules (from d = 4 on, longer ones).

    write 3 words,no e,begins s,ends ! -> <think>1sun 2bird 3map</think>sun bird map!
    Rules: so many words; a letter that must not occur; the first letter; the last character; a word to include.
    The verifier is the binary gate of the behavioral stage; what people like beyond it, `warmth` counts.  Needs WORDS.
    """
    levels = (2, 3, 4)

    def generate(self, rng, d):
        fewest = 2 + min(max(0, d - 4), 4)
        rules = {"count": rng.randrange(fewest, fewest + 3)}
        for kind in rng.sample(["no", "begins", "ends", "has"], min(d, 3)):
            values = {"no": rng.choice("aeio"), "begins": rng.choice("dmrgsb"), "ends": rng.choice("!?."),
                      "has": rng.choice(WORDS)}
            rules[kind] = values[kind]
        if "no" in rules and (not self.fitting(rules) or rules["no"] in rules.get("has", "")):
            del rules["no"]                                     # the rules contradict each other
        said = [f"{kind} {rules[kind]}" for kind in ("no", "begins", "ends", "has") if kind in rules]
        return ",".join([f"write {rules['count']} words", *said]), {"rules": rules}

    @staticmethod
    def fitting(rules, first=True):
        """The words that may stand at a place."""
        words = [word for word in WORDS if rules.get("no", "#") not in word]
        return [word for word in words if word.startswith(rules.get("begins", ""))] if first else words

    def solution(self, data, rng, error_rate):
        rules = data["rules"]
        count = rules["count"]
        if rng.random() < error_rate:
            count += rng.choice((-1, 1))
        words = []
        for i in range(count):
            choice = WORDS
            if rng.random() >= error_rate:
                choice = [word for word in self.fitting(rules, i == 0) if word not in words]
            words.append(rng.choice(choice))
        has, begins = rules.get("has"), rules.get("begins", "#")
        if has and has not in words and rng.random() >= error_rate:
            place = 0 if has.startswith(begins) or count == 1 else rng.randrange(1, count)
            words[place] = has
        end = rules.get("ends", "")
        if rng.random() < error_rate:
            end = rng.choice("!?.")
        return " ".join(f"{i}{word}" for i, word in enumerate(words, 1)), " ".join(words) + end

    def verify_answer(self, data, answer):
        rules, body = data["rules"], answer.rstrip("!?.")
        if not re.fullmatch("[a-z]+( [a-z]+)*", body):
            return False
        words = body.split(" ")
        return (len(words) == len(set(words)) == rules["count"]
                and answer[len(body):] == rules.get("ends", "")
                and rules.get("no", "#") not in answer
                and answer.startswith(rules.get("begins", ""))
                and rules.get("has", words[0]) in words)


def warmth(answer):
    """What the simulated reader of the behavioral stage likes: the number of warm words."""
    return sum(word in WARM for word in re.findall("[a-z]+", answer))


class ReasoningGym(Task):
    """Any dataset of reasoning-gym (pip install reasoning-gym) as a task: --tasks reasoning_gym:chain_sum

    The difficulty is the level of the dataset's curriculum, where it has one.  Its teacher knows the answer and no
    trace.  A score of 0.99 or more is right; the verifiers are reasoning-gym's, so neither ours nor bounded in time.
    """

    def __init__(self, name):
        super().__init__(name)
        try:
            import reasoning_gym.factory as factory
        except ImportError:
            raise SystemExit(f"--tasks {name} needs reasoning-gym: pip install reasoning-gym") from None
        self.factory, self.dataset = factory, name.removeprefix("reasoning_gym:")
        if self.dataset not in factory.DATASETS:
            close, = difflib.get_close_matches(self.dataset, factory.DATASETS, 1, 0)
            raise SystemExit(f"--tasks {name}: reasoning-gym has no {self.dataset!r}; did you mean {close}?")

    def entry(self, seed, level):
        settings = {}
        if self.factory.has_curriculum(self.dataset):
            curriculum = self.factory.create_curriculum(self.dataset)
            curriculum.set_global_level(level - 1)              # beyond the last level it stays there
            settings = vars(curriculum.generate_configuration())
        dataset = self.factory.create_dataset(self.dataset, **{**settings, "seed": seed, "size": 1})
        return dataset, dataset[0]

    def generate(self, rng, d):
        data = {"seed": rng.getrandbits(31), "level": d}
        _, entry = self.entry(**data)
        return entry["question"].strip(), data

    def solution(self, data, rng, error_rate):
        seed = rng.getrandbits(31) if rng.random() < error_rate else data["seed"]
        _, entry = self.entry(seed, data["level"])
        return "", entry["answer"]

    def verify_answer(self, data, answer):
        dataset, entry = self.entry(**data)
        try:
            return dataset.score_answer(answer, entry) >= 0.99
        except Exception:                                       # a verifier of theirs that did not expect this text
            return False


TASKS = {task.name: task for task in (
    ColumnSums("column_sums"), Add("add"), Sort("sort"), Registers("registers"), Find("find"), Program("program"),
    Synthesize("synthesize"), Falsify("falsify"), Countdown("countdown"), Sat("sat"), Constraints("constraints"))}


@functools.cache
def find_task(name):
    """A task by its name, one of ours or reasoning_gym:…"""
    return ReasoningGym(name) if name.startswith("reasoning_gym:") else TASKS[name]


def is_held_out(problem):
    """A tenth of all problems, by a hash of what is asked: never trained on, whatever seed made them."""
    return hashlib.md5(f"{problem.task} {problem.prompt}".encode()).digest()[0] < 26


def draw(task, seed, d, held_out):
    """The first problem from `seed` on that is held out, or with held_out=False one that may be trained on.

    The smallest difficulties have few problems, perhaps none held out: then the next one is taken.
    """
    for attempt in range(1000):
        problem = task.make(f"{seed}/{attempt}", d + attempt // 200)
        if is_held_out(problem) == held_out:
            return problem
    raise RuntimeError(f"task {task.name} made no {'held-out' if held_out else 'training'} problem at difficulty {d}")


if __name__ == "__main__":
    with process_group(), plain_errors():
        try:
            main()
        except KeyboardInterrupt:
            raise SystemExit("\nstopped; the same command goes on from the last checkpoint") from None
