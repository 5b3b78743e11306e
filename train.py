"""Train ZAYA1 from random weights: data, tasks, answer-preserving trimming, Muon, and the stages one after another.

    python train.py                     every stage at preset tiny, into out/tiny; goes on where it stopped
    python train.py --stages evaluate   its last stage alone: Markovian RSA and its alternatives on held-out problems
    python train.py --preset smoke      the same path in a minute
    python train.py --data my.jsonl --out out/mine --stages pretrain,midtrain
    torchrun --nproc_per_node 8 train.py …      the same run, its work shared out to 8 processes

TR section III: pretraining at a short context, then midtraining at a longer one with a larger RoPE base and mostly
long chains of thought, each trimmed so that the answer survives, then SFT on chats.  TR section IV: four stages of
reinforcement learning on one spine, in which Actor samples groups of rollouts and rl_step learns from them.  A run is a
pure function of its settings and seed: no hidden state, so a killed run goes on bit for bit.  The tasks are an
appendix.  Does NOT include: tensor or context parallelism.
"""
import argparse
import ast
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
import zlib
from dataclasses import dataclass, field

# Threads wait asleep: spinning ones make a step 3 to 60 times slower where another program is at work, and on an idle
# machine there is Twin.  It has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from kernels import compile_loss, fuse, should_compile, summed_loss
from rsa import (BUDGETS, Budget, Checkpoint, count_tokens, cut_tail, end_tokens, explained, interval, left_padded,
                 majority, markovian_rsa, open_tokenizer, opening, prompt_ids, terse_prompt)
from zaya import PIDBalancer, Tokenizer, Zaya, ZayaConfig, read_json, write_json

# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What one supervised stage trains on, and how long.  Lengths are in tokens."""
    steps: int
    context: int
    rope_theta: float
    traces: float                           # share of reasoning traces among the tokens
    lr: float
    lr_end: float
    difficulty: int                         # generated problems go up to this difficulty …
    turns: int                              # … and conversations up to this many problems
    mask_prompts: bool = False              # only what the assistant says counts in the loss
    aggregation: float = 0.0                # share of problems, of the tasks that read, with other candidates' tails …
    tail: int = 24                          # … mostly of this many tokens …
    candidates: tuple = (1, 2, 3, 4, 4)     # … of one of these numbers of candidates


@dataclass
class RLStage:
    """What one RL stage asks, and how long.  A step has `groups` prompts with `group_size` rollouts each, and
    learns from `learned` of these."""
    steps: int
    context: int                            # of a reply, tokens
    rope_theta: float
    lr: float
    lr_end: float
    tasks: tuple
    groups: int
    group_size: int
    learned: int
    aggregation: float = 0.0                # share of prompts made of the model's own earlier tails …
    tail: int = 24                          # … of this many tokens
    rehearsal: int = 2                      # rows of SFT that a step learns besides
    adaptive: bool = False
    length_reward: float = 0.1
    reward_model_steps: int = 0             # 0: rewards are the verifiers'


@dataclass
class Evaluation:
    """Test-time compute on held-out problems harder than those RL trained on."""
    tasks: dict                             # difficulty by task
    problems: int                           # of each task
    budget: Budget                          # N, C, T, beta and tau of the headline …
    few: int = 16                           # of the problems for Delethink and full RSA


STAGES = ["pretrain", "midtrain", "sft", "warmup", "rlve", "mathcode", "behavior"]
MATH, PUZZLES = ("add",), ("sort",)
CODE = ("registers", "program", "falsify")                      # CodeI/O, standard, breaking
# RL wears off what it does not reward, and Markovian RSA lives on what a reply hands on.  So every stage asks the tasks
# that read tails, alone and to aggregate, and pays them for what the next round lives on: see Task.reward.  Of these
# column_sums is left out: one answer is right, so voting wins, and RL may wear off how its tails are read.
READERS = ("find", "pass", "synthesize")


def rl_stages(steps, lr, reward_model_steps, **shared):
    """The four stages of the cascade (TR section IV): `steps` and `lr` one each, the rest of RLStage shared."""
    own = dict(warmup=dict(tasks=READERS + MATH + PUZZLES, aggregation=0.25),
               rlve=dict(tasks=READERS + MATH + PUZZLES + CODE, aggregation=0.25, adaptive=True),
               mathcode=dict(tasks=READERS + MATH + CODE, aggregation=0.4),
               behavior=dict(tasks=READERS + ("constraints",), aggregation=0.25, length_reward=0.0,
                             reward_model_steps=reward_model_steps))
    return {name: RLStage(steps=steps[i], lr=lr[i], lr_end=lr[i] / 5, **shared, **own[name])
            for i, name in enumerate(own)}


# One learning rate serves Muon and AdamW, whose update sizes are matched.  The balancer's rate is AMD Primus' 1e-3 at
# full size; a run of a thousand steps needs larger ones.  zaya1-8b has the report's own contexts, bases and rates (TR
# section III), but not its 13.2T tokens.
# The columns of a Stage: steps, context, rope_theta, traces, lr, lr_end, difficulty, turns, mask_prompts.
PRESETS = {
    "smoke": dict(
        tokens_per_step=1024, text_bytes=300_000, balancer_lr=1e-2, eval_problems=4, eval_samples=2,
        evaluate=Evaluation({"find": 1, "pass": 1}, 4, Budget(4, 2, 1, 64, 8)),
        stages=dict(
            pretrain=Stage(30, 128, 1e4, 0.5, 8e-3, 3e-3, 2, 1),
            midtrain=Stage(15, 256, 1e5, 0.86, 3e-3, 1e-3, 4, 3),
            sft=Stage(250, 256, 5e5, 0.9, 1e-2, 1e-3, 2, 1, True, aggregation=0.1, tail=8),
            **rl_stages(steps=(4, 4, 4, 4), lr=(1e-3, 1e-3, 1e-3, 1e-3), context=64, rope_theta=5e5, groups=2,
                        group_size=4, learned=4, reward_model_steps=4, tail=8))),
    "tiny": dict(
        tokens_per_step=2048, text_bytes=2_000_000, balancer_lr=5e-3, eval_problems=30, eval_samples=2,
        evaluate=Evaluation({"find": 8, "pass": 6, "column_sums": 10}, 50, BUDGETS["tiny"]),
        stages=dict(
            pretrain=Stage(200, 256, 1e4, 0.6, 1e-2, 4e-3, 4, 1),
            midtrain=Stage(150, 1024, 1e5, 0.86, 6e-3, 3e-3, 8, 8, aggregation=0.3),
            sft=Stage(1250, 512, 5e5, 0.9, 6e-3, 5e-4, 10, 2, True, aggregation=0.45),
            **rl_stages(steps=(15, 80, 35, 15), lr=(3e-3, 3e-3, 3e-3, 1e-3), context=96, rope_theta=5e5, groups=16,
                        group_size=8, learned=4, reward_model_steps=20, tail=24))),
    "small": dict(
        tokens_per_step=131_072, text_bytes=400_000_000, balancer_lr=1e-3, eval_problems=100, eval_samples=4,
        evaluate=Evaluation({"find": 16, "pass": 12, "column_sums": 20}, 100, Budget(16, 4, 2, 1024, 64)),
        stages=dict(
            pretrain=Stage(20_000, 1024, 1e4, 0.5, 2e-3, 6e-4, 8, 2),
            midtrain=Stage(5_000, 4096, 1e6, 0.86, 6e-4, 2e-4, 16, 16),
            sft=Stage(3_000, 4096, 5e6, 0.9, 3e-4, 3e-5, 8, 4, True, aggregation=0.25, tail=64),
            **rl_stages(steps=(200, 400, 400, 200), lr=(1e-4, 1e-4, 1e-4, 1e-4), context=1024, rope_theta=5e6,
                        groups=32, group_size=16, learned=16, reward_model_steps=500, tail=64))),
    "zaya1-8b": dict(
        tokens_per_step=4_194_304, text_bytes=10**12, balancer_lr=1e-3, eval_problems=100, eval_samples=4,
        evaluate=Evaluation({"find": 24, "pass": 20, "column_sums": 30}, 100, BUDGETS["default"]),
        stages=dict(
            pretrain=Stage(100_000, 4096, 1e4, 0.5, 6e-4, 2e-4, 8, 2),
            midtrain=Stage(20_000, 32768, 1e6, 0.86, 2e-4, 1e-4, 32, 64),
            sft=Stage(10_000, 131072, 5e6, 0.75, 1e-4, 1e-5, 32, 64, True, aggregation=0.25, tail=4096),
            **rl_stages(steps=(232, 400, 848, 384), lr=(1e-5, 1e-5, 5e-6, 2e-6), context=65536, rope_theta=5e6,
                        groups=128, group_size=16, learned=16, reward_model_steps=1000, tail=4096))),
}


# A run that goes on may change these; it must keep all other settings.
CHANGEABLE = ("stages", "out", "device", "shard", "no_compile", "skip_bad_lines", "log_every", "save_every",
              "eval_problems", "eval_samples")


def option(default, help, least=None, most=2**31 - 1):
    return field(default=default, metadata=dict(help=help, least=least, most=most))


@dataclass
class TrainConfig:
    """Every setting of a run: the command line is built from these fields.  Raises SystemExit for what cannot be.

    A None becomes what the preset says.  steps, context and lr are given as texts and become {stage: number}.
    """
    preset: str = option("tiny", "smoke, tiny, small or zaya1-8b: the model's shape, the stages' lengths")
    seed: int = option(0, "of the weights, the data order and the sampled answers", 0, 2**63 - 1)
    dtype: str = option("auto", "float32 or bfloat16 (autocast; weights stay float32)")
    init: str = option(None, "a checkpoint to begin from instead of random weights: ours, ZAYA1-8B, or a base model")
    data: list = option(None, "your own .txt, .jsonl and .json files, instead of the text that Python brings")
    tasks: str = option("all", "generated reasoning problems: all, none, or names such as add,sort")
    steps: dict = option(None, "optimizer steps: 500, or pretrain=500,midtrain=200", 1)
    context: dict = option(None, "tokens a sample may have, likewise per stage", 2)
    lr: dict = option(None, "peak rate, likewise per stage (0.2 x lr is an update's RMS)", 0, 10)
    tokens_per_step: int = option(None, "tokens in one optimizer step", 1)
    micro_batch: int = option(None, "most tokens in one forward pass; a step adds up several", 1)
    groups: int = option(None, "prompts in one step of reinforcement learning", 1)
    group_size: int = option(None, "rollouts of one prompt", 2)
    grad_clip: float = option(1.0, "largest gradient norm; 0: gradients stay as they are", 0, 1e9)
    balancer_lr: float = option(None, "learning rate of the router's balancing biases", 0, 1)
    stages: str = option(",".join([*STAGES, "evaluate"]), "which stages; evaluate measures test-time compute")
    out: str = option(None, "folder of the run, default out/<preset>; an existing run goes on")
    device: str = option("auto", "cpu, cuda (CUDA and ROCm alike) or mps")
    shard: int = option(0, "torchrun: processes that share one copy of the weights, such as a node's; 0: all", 0)
    no_compile: bool = option(False, "do not compile the training step")
    skip_bad_lines: bool = option(False, "skip and count unreadable lines of --data instead of stopping")
    log_every: int = option(20, "print a line every so many steps, RL every quarter of it", 1)
    save_every: int = option(100, "write a checkpoint every so many steps, RL a fifth of it", 1)
    eval_problems: int = option(None, "held-out problems per task", 0)
    eval_samples: int = option(None, "sampled answers per held-out problem", 0)

    def __post_init__(self):
        check_choice("--preset", self.preset, PRESETS)
        check_choice("--device", self.device, ["auto", "cpu", "cuda", "mps"])
        stages = self.stages.split(",")
        for name in stages:
            check_choice("--stages", name, [*STAGES, "evaluate"])

        # What was not given is the preset's, and groups and group_size are an RL stage's.
        preset = PRESETS[self.preset]
        for name in ("steps", "context", "lr"):
            usual = {stage: getattr(preset["stages"][stage], name) for stage in STAGES}
            setattr(self, name, stage_values(flag(name), getattr(self, name), usual))
        usual = {**vars(preset["stages"]["warmup"]), **preset, "init": None, "data": [],
                 "out": os.path.join("out", self.preset), "micro_batch": max(16384, *self.context.values())}
        for setting in dataclasses.fields(self):
            name, least, most = setting.name, setting.metadata["least"], setting.metadata["most"]
            if getattr(self, name) is None:
                setattr(self, name, usual[name])
            value = getattr(self, name)
            for number in value.values() if isinstance(value, dict) else [value]:
                if least is not None and not least <= number <= most:       # nan lies between none
                    raise SystemExit(f"{flag(name)} {number} must be at least {least} and at most {most}")
        # A supervised stage packs the tokens of a step into rows as long as its context.
        for name in STAGES[:3]:
            context = self.context[name]
            if name in stages and (self.tokens_per_step % context or self.micro_batch < context):
                raise SystemExit(f"--tokens-per-step {self.tokens_per_step} must be a multiple of {name}'s context "
                                 f"({context}), and --micro-batch {self.micro_batch} at least as long")


def flag(name):
    return "--" + name.replace("_", "-")


def check_choice(option, given, choices):
    """Raise SystemExit, which names the closest choice, if `given` is none of them."""
    if given not in choices:
        closest = difflib.get_close_matches(given, choices, 1, 0)[0]
        raise SystemExit(f"{option} {given}: did you mean {closest}? There are {', '.join(choices)}")


def stage_values(option, text, values):
    """What `text` says of a setting that has one value a stage; where it says nothing, `values`.

    >>> stage_values("--steps", "pretrain=5", {"pretrain": 30, "sft": 250})
    {'pretrain': 5, 'sft': 250}
    """
    number = type(values["pretrain"])
    values = dict(values)
    for part in text.split(",") if text else []:
        stage, _, value = part.rpartition("=")
        if stage:
            check_choice(option, stage, values)
        try:
            values.update(dict.fromkeys([stage] if stage else values, number(value)))
        except ValueError:
            raise SystemExit(f"{option} {text}: {value!r} is not {'a whole' if number is int else 'a'} number; write "
                             "one for all stages, or pretrain=…,midtrain=…") from None
    return values


def settings(config):
    """What a run must keep to go on: {setting: value}."""
    return {name: value for name, value in vars(config).items() if name not in CHANGEABLE}


def stage_settings(config, name):
    """The preset's stage with the run's changes in it; the final rate keeps its ratio to the peak."""
    stage, lr = PRESETS[config.preset]["stages"][name], config.lr[name]
    stage = dataclasses.replace(stage, steps=config.steps[name], context=config.context[name], lr=lr,
                                lr_end=lr * stage.lr_end / stage.lr)
    if isinstance(stage, RLStage):
        # Other people's tasks, which bring a verifier, join every stage that has no reward model.
        tasks = [task for task in task_names(config.tasks) if task in stage.tasks
                 or (task.startswith("reasoning_gym:") and not stage.reward_model_steps)]
        stage = dataclasses.replace(stage, tasks=tuple(tasks), groups=config.groups, group_size=config.group_size)
    return stage


def parse_arguments(arguments):
    """Command line -> (TrainConfig, {ZayaConfig field: value}).  An unknown option is an error with the closest one."""
    parser = argparse.ArgumentParser(prog="python train.py", allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {bool: dict(action="store_true"), int: dict(type=int, metavar="N"), float: dict(type=float, metavar="N"),
             str: dict(metavar="NAME"), list: dict(nargs="+", metavar="FILE"), dict: dict(metavar="N")}
    for setting in dataclasses.fields(TrainConfig):
        text = setting.metadata["help"] + (f" (default {setting.default})" if setting.default else "")
        parser.add_argument(flag(setting.name), help=text, default=setting.default, **kinds[setting.type])
    # The model's shape: every integer of ZayaConfig but the token ids, which are the tokenizer's.
    for setting in dataclasses.fields(ZayaConfig):
        if setting.type is int and not setting.name.endswith("token_id"):
            usual = setting.name in ("hidden_size", "num_hidden_layers", "num_experts", "vocab_size")
            parser.add_argument(flag(setting.name), type=int, metavar="N", default=argparse.SUPPRESS,
                                help="of the model, like every integer of ZayaConfig" if usual else argparse.SUPPRESS)

    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown option {unknown[0]}; " + (f"did you mean {close[0]}?" if close else "see -h"))
    shape = vars(given)
    config = TrainConfig(**{setting.name: shape.pop(setting.name) for setting in dataclasses.fields(TrainConfig)})
    return config, shape


# ---- data: trimming, packing, sources -------------------------------------------------------------------------------


THINK = re.compile("<think>(.*?)</think>", re.DOTALL)


def split_think(content):
    """'<think>reasoning</think>answer' -> ('reasoning', 'answer'), several blocks joined; none: ('', content)."""
    pieces = THINK.split(content)                               # answer, reasoning, answer, reasoning, …, answer
    return "".join(pieces[1::2]), "".join(pieces[::2])


def cut_reasoning(messages, context, tokenizer):
    """Cut the last turn's reasoning from its end until the conversation just fits -> messages, or None if it cannot."""
    *earlier, last = messages
    pieces = THINK.split(last["content"]) if last["role"] == "assistant" else [last["content"]]
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

    >>> byte = Tokenizer()                                                # one token per character
    >>> talk = [dict(role="user", content="7+5?"), dict(role="assistant", content="<think>seven, five</think>12")]
    >>> trim(talk, 23, byte)[1], trim(talk, 9, byte)                        # 4 + 11 + 2 characters, 6 special tokens
    ('kept', (None, 'dropped'))
    >>> trim(talk, 17, byte)[0][1]["content"], trim(talk, 17, byte)[1]
    ('<think>seven</think>12', 'cut')
    """
    if len(tokenizer.render(messages)[0]) <= context:
        return messages, "kept"
    stripped = []
    for message in messages[:-1]:
        if message["role"] == "assistant":
            message = {**message, "content": split_think(message["content"])[1]}
        stripped.append(message)
    stripped.append(messages[-1])
    for candidate, verdict in ((messages, "cut"), (stripped, "stripped")):
        short = cut_reasoning(candidate, context, tokenizer)
        if short:
            return short, verdict
    return None, "dropped"


def pack(lengths, capacity, bins):
    """Best-fit decreasing: the longest sample first, each into the fullest bin that still takes it whole.

    Returns at most `bins` lists of indices; a sample that fits nowhere is in none of them.  Needs nothing else.

    >>> pack([5, 3, 6, 2, 4], capacity=8, bins=2)
    [[2, 3], [0, 1]]
    """
    rows, room = [[] for _ in range(bins)], [capacity] * bins
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row in range(bins) if room[row] >= lengths[index]]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
            rows[row].append(index)
            room[row] -= lengths[index]
    return rows


# The names that other people's data sets use: for a question and its answer, for other fields, for the roles, and, as
# the last word of a name, for what is about a row and not in it.
PAIRS = [("question", "answer"), ("problem", "solution"), ("prompt", "completion"), ("problem", "answer"),
         ("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("query", "response")]
ALIASES = {"conversations": "messages", "system_prompt": "system", "passage": "context",
           "reasoning_content": "reasoning", "thinking": "reasoning", "from": "role", "value": "content",
           "train": "weight", "loss": "weight"}
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "tool": "user", "function": "user",
         "observation": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
METADATA = set("""id ids idx index uuid source dataset split type topic subject tag tags category domain level score
    difficulty rating lang language license version date time timestamp url urls link author model meta metadata
    """.split())


def known_fields(values, where):
    """A JSON object's fields under our names, without empty ones."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a JSON object is needed, this is a {type(values).__name__}")
    found = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if value in (None, "", [], {}) and name != "content":
            continue
        if name in found and found[name] != value:
            raise ValueError(f"{where} has two fields for its {name} that differ: keep one")
        found[name] = value
    return found


def refuse_unused(unused, where, texts=()):
    """ValueError for a field that is in no message, unless it is a number, METADATA, or what one of `texts` says."""
    for key, value in unused.items():
        is_number = isinstance(value, (int, float)) and key != "weight"
        is_metadata = key.lower().split("_")[-1] in METADATA and not re.match("image|audio|video", key, re.I)
        repeated = value in texts
        if any(key in pair for pair in PAIRS):                  # such as a short answer beside its worked solution
            repeated = any(str(value) in text for text in texts)
        if not (is_number or is_metadata or repeated):
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
    given, content = found.pop("role", None), found.pop("content", None)
    weight = found.pop("weight", None)
    role = ROLES.get(str(given).lower())
    reasoning = found.pop("reasoning", "") if role == "assistant" else ""
    refuse_unused(found, where)
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


def pair_to_turns(found):
    """A question and its answer, taken out of a row's fields -> two turns."""
    pair = next((pair for pair in PAIRS if pair[0] in found and pair[1] in found), None)
    if pair is None:
        raise ValueError("no 'messages' with at least one, and no pair of texts such as question/answer, "
                         f"problem/solution, prompt/completion; its keys are {', '.join(list(found)[:6]) or 'none'}")
    asked = []
    for key in ("context", pair[0], "input"):
        asked.append(as_text(found.pop(key, ""), repr(key)))
    answer, reasoning = as_text(found.pop(pair[1]), repr(pair[1])), found.pop("reasoning", "")
    # GSM8K writes the reasoning first and the answer on a last line of its own.
    gsm8k = re.fullmatch(r"(.+)\n#### ([^\n]+)\n?", answer, re.S)
    if gsm8k and not reasoning and "<think>" not in answer and "\n#### " not in gsm8k[1]:
        reasoning, answer = gsm8k[1].strip(), gsm8k[2].strip()
    return [{"role": "user", "content": "\n\n".join(filter(str.strip, asked))},
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
    turns = found.pop("messages") if isinstance(found.get("messages"), list) else pair_to_turns(found)
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
                    place = f"row {number}" if is_json else number
                    raise SystemExit(f"{path}:{place}: {error}. Mend it, or pass --skip-bad-lines") from None
                bad += 1
    if bad:
        print(f"{path}: skipped {bad} bad line{'s' if bad > 1 else ''}")


@functools.cache
def own_texts(limit):
    """Text that needs no download, {name: [text, …]} of about `limit` characters: simple stories, and the docstrings of
    Python's standard library."""
    import sysconfig
    rng = random.Random("stories")
    texts = {"stories": [tell_story(rng) for _ in range(min(limit // 1000, 100_000))], "docstrings": []}
    kinds, size = (ast.Module, ast.ClassDef, ast.FunctionDef), 0
    for path in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "*.py"))):
        if size >= limit // 2:
            break
        with open(path, encoding="utf-8", errors="replace") as file:
            nodes = ast.walk(ast.parse(file.read()))
        for node in nodes:
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and size < limit // 2:
                texts["docstrings"].append(text)
                size += len(text)
    return texts


# A source numbers its samples.  size(held_out) says how many there are, None: without end.  get(index, held_out) gives
# a sample's ids, and for each 1 if the assistant wrote it, 0 if not, -1 if it must never be learned.  What is held out
# is never trained on.

class FileSource:
    """Samples that lie one after another in an array of tokens; every twentieth is held out.

    offsets: sample i is tokens[offsets[i]:offsets[i + 1]], a conversation or a window of a text.  targets: what `get`
    gives beside each token; None for a text, of which every token counts.
    """

    def __init__(self, name, tokens, offsets, targets=None):
        self.name, self.tokens, self.offsets, self.targets = name, tokens, offsets, targets
        self.is_traces, self.count = targets is not None, len(offsets) - 1
        # What tells changed data from the old: the length, and a hash of up to a million tokens.
        some = tokens[::max(1, len(tokens) // 1_000_000)].tobytes()
        self.fingerprint = f"{len(tokens)} {hashlib.md5(some).hexdigest()}"

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
            return ids, [1] * len(ids)
        return ids, self.targets[part].tolist()


def windows(tokens, context):
    """Offsets that cut a text into windows of `context` tokens; the last one may be shorter."""
    return np.append(np.arange(0, len(tokens), context), len(tokens))


def text_source(name, texts, tokenizer, context):
    """Texts as samples of at most `context` tokens; where one ends, the model learns to end."""
    pieces = []
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.end_of_text]
        pieces += [ids[start:start + context] for start in range(0, len(ids), context)]
    offsets = np.cumsum([0, *map(len, pieces)])
    return FileSource(name, np.fromiter(itertools.chain.from_iterable(pieces), np.uint32, offsets[-1]), offsets)


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
        """A problem and the teacher's reply.  A share `aggregation` of the prompts show, as Markovian RSA does, tails
        of right and of wrong replies, and the answer is as right as a reader of those can be."""
        readers = [name for name in self.tasks if find_task(name).reads]
        aggregates = bool(readers) and rng.random() < self.stage.aggregation
        task = find_task(rng.choice(readers if aggregates else self.tasks))
        # The smaller of two draws: easy problems come more often, and the share falls gently up to the hardest.
        hardest = self.stage.difficulty
        d = min(rng.randint(1, hardest), rng.randint(1, hardest), task.hardest)
        problem = draw(task, rng.getrandbits(48), d, held_out)
        if not aggregates:
            return problem.prompt, task.solve(problem, rng.getrandbits(48))
        # Some tails are longer or shorter, up to whole traces, as long as half of the context holds them.
        tail = self.stage.tail
        if rng.random() < 0.3:
            tail = round(tail * 2 ** rng.uniform(-1, 3))
        most = max(1, self.stage.context // 2 // tail)
        replies = []
        for _ in range(min(most, rng.choice(self.stage.candidates))):
            write = task.good_rollout if rng.random() < 0.5 else task.corrupt
            replies.append(write(problem, rng.getrandbits(48)))
        tails = [cut_tail(reply, tail, self.tokenizer) for reply in replies]
        return terse_prompt(problem.prompt, tails), task.aggregate(problem, replies, rng.getrandbits(48))


def tokenise(path, stem, tokenizer, context, skip_bad_lines):
    """Write a file's tokens to stem.tokens, those of a text a megabyte at a time: several GB never sit in memory.

    Conversations are trimmed, and get .targets and .offsets as FileSource wants them.
    """
    counts, offsets = collections.Counter(kept=0, cut=0, stripped=0, dropped=0), [0]
    with open(stem + ".tokens", "wb") as tokens, open(stem + ".targets", "wb") as targets:
        if file_kind(path) == "txt":
            for piece in tqdm(read_text(path), desc=f"tokenising {path}", unit=" MB", disable=None):
                np.array(tokenizer.encode(piece), np.uint32).tofile(tokens)
        else:
            for messages in tqdm(read_jsonl(path, skip_bad_lines), desc=f"tokenising {path}", disable=None):
                messages, verdict = trim(messages, context, tokenizer)
                counts[verdict] += 1
                ids, wanted = tokenizer.render(messages or [])
                wanted = np.array(wanted, np.int8)
                for i, message in enumerate(messages or []):
                    if "weight" in message:
                        before, after = [tokenizer.render(messages[:end])[0] for end in (i, i + 1)]
                        if ids[:len(after)] == after:
                            wanted[len(before):len(after)] = -1
                        else:                                   # the template changes earlier turns: learn none
                            wanted[:] = -1
                np.array(ids, np.uint32).tofile(tokens)
                wanted.tofile(targets)
                if messages:
                    offsets.append(targets.tell())              # a byte a token
            said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
            print(f"{path}, trimmed to {context} tokens: {said}")
        if tokens.tell() == 0:
            raise SystemExit(f"{path} gave no tokens: it is empty, or has no good row that fits {context} tokens")
    np.array(offsets, np.int64).tofile(stem + ".offsets")       # comes last, so it says that the arrays are complete


def cached_tokens(path, folder, tokenizer, context, skip_bad_lines):
    """Tokenise a file once into memory-mapped arrays in `folder` -> FileSource's (tokens, offsets, targets).

    A changed file, vocabulary or context (of chats, which are trimmed to it) has another name, so new arrays are made.
    """
    is_chat, about = file_kind(path) != "txt", os.stat(path)
    identity = repr([about.st_size, about.st_mtime_ns, is_chat and context, sorted(tokenizer.ranks.items())])
    digest = hashlib.md5(identity.encode()).hexdigest()
    stem = os.path.join(folder, f"{os.path.basename(path)}-{digest[:12]}")
    if is_main() and not os.path.exists(stem + ".offsets"):
        os.makedirs(folder, exist_ok=True)
        tokenise(path, stem, tokenizer, context, skip_bad_lines)
    barrier()
    tokens = np.memmap(stem + ".tokens", np.uint32, "r")
    if not is_chat:
        return tokens, windows(tokens, context), None
    return tokens, np.fromfile(stem + ".offsets", np.int64), np.memmap(stem + ".targets", np.int8, "r")


def make_sources(config, stage, tokenizer, seed):
    """The stage's sources: --data files or our own texts, and the problems generated from `seed`."""
    sources, names = [], [os.path.basename(path) for path in config.data]
    for path, name in zip(config.data, names):
        arrays = cached_tokens(path, os.path.join(config.out, "data"), tokenizer, stage.context, config.skip_bad_lines)
        sources.append(FileSource(path if names.count(name) > 1 else name, *arrays))
    if not config.data:
        for name, texts in own_texts(PRESETS[config.preset]["text_bytes"]).items():
            sources.append(text_source(name, texts, tokenizer, stage.context))
    tasks = task_names(config.tasks)
    if tasks:
        sources.append(TaskSource(tasks, stage, tokenizer, seed))
    if not sources:
        raise SystemExit("--tasks none without --data leaves nothing to train on")
    return sources


def task_names(text):
    """--tasks -> names; unknown ones are an error with the closest match."""
    names = {"all": list(TASKS), "none": []}.get(text, text.split(","))
    for name in names:
        if name.startswith("reasoning_gym:"):
            find_task(name)                                     # says what is missing
        else:
            check_choice("--tasks", name, TASKS)
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
        traces, texts = [], {}
        for source in sources:
            if source.is_traces:
                traces.append(source.name)
            else:
                texts[source.name] = source.size(held_out)
        share = stage.traces if traces and texts else float(bool(traces))
        # Sources of traces count alike.  Texts count by their size, so that none is read more often than another.
        self.weight = dict.fromkeys(traces, share / max(1, len(traces)))
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

    def next(self):
        """-> input_ids, targets, position_ids (rows, context) int64, and where the samples came from.

        targets: the next token, -100 where there is none in this sample or it does not count.
        position_ids restart with each sample and are -1 on padding, so nothing leaks from one into the next.
        """
        # With 1.05 times the tokens of a batch to choose from, packing leaves hardly a gap.
        lengths = [len(ids) for _, ids, _ in self.waiting]
        while sum(lengths) < self.rows * self.context * 1.05:
            # The source that is furthest behind its share of all tokens comes next.
            total = sum(self.given.values()) + 1
            name = min(self.given, key=lambda n: self.given[n] - self.weight[n] * total)
            origin = (name, self.drawn[name])
            self.waiting.append((origin, *self.sample(*origin)))
            lengths.append(len(self.waiting[-1][1]))
            self.drawn[name] += 1
            self.given[name] += lengths[-1]

        inputs = np.full((self.rows, self.context), self.pad, np.int64)
        targets, positions = np.full_like(inputs, -100), np.full_like(inputs, -1)
        origins = []
        for row, members in enumerate(pack(lengths, self.context, self.rows)):
            start = 0
            for index in members:
                origin, ids, marks = self.waiting[index]        # 1: the assistant's, 0: another's, -1: never learned
                counts = np.array(marks) > (0 if self.stage.mask_prompts else -1)
                end = start + len(ids)
                inputs[row, start:end] = ids
                targets[row, start:end - 1] = np.where(counts[1:], ids[1:], -100)
                positions[row, start:end] = np.arange(len(ids))
                start = end
                origins.append(origin)
                self.waiting[index] = None
        self.waiting = [sample for sample in self.waiting if sample]
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
    enough); the coefficients are Keller Jordan's.  bf16 on a GPU, and on a CPU that multiplies it; else fp32.

    >>> u = orthogonalize(torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)))
    >>> bool((torch.linalg.svdvals(u) - 1).abs().max() < 0.35)
    True
    """
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.bfloat16() if matrices.is_cuda or torch.cpu._is_avx512_bf16_supported() else x.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                                     # the small side's Gram matrix is the cheap one
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    x = x.mT if tall else x
    return x.to(matrices.dtype).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by 0.2 sqrt(max(m, n)) lr U V^T, an AdamW update's usual size.

    TR section III ("AdamW-RMS matching": one learning rate serves both optimizers).  Parameters are matrices (m, n) or
    stacks of experts (X, m, n), ValueError for others: biases and convolutions are AdamW's.  RL's `momentum` is 0.
    Under FSDP2 a process orthogonalises the experts that it owns; other matrices are gathered, and each process keeps
    its rows of the result.
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
            by_shape = collections.defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[-2:]].append(parameter)
            # Many small products are slow: all matrices of one shape are orthogonalised in one batch.
            for shape, parameters in by_shape.items():
                updates = [self.whole_update(parameter, group["momentum"]) for parameter in parameters]
                moves = orthogonalize(torch.cat(updates)).split([len(update) for update in updates])
                for parameter, move in zip(parameters, moves):
                    own, move = self.own_part(parameter, move)
                    own.mul_(1 - group["lr"] * group["weight_decay"])
                    own.add_(move, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def whole_update(self, parameter, momentum):
        """Gradient with Nesterov momentum: a gathered matrix (1, m, n), or this process' experts (X, m, n)."""
        update = parameter.grad
        if momentum:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - momentum)
            update = parameter.grad.lerp(state["momentum"], momentum)
        if isinstance(update, DTensor):
            update = update.full_tensor() if update.ndim == 2 else update.to_local()
        return update if update.ndim == 3 else update[None]

    @staticmethod
    def own_part(parameter, move):
        """-> what this process holds of a parameter, and of the move of its whole matrices."""
        move = move[0] if parameter.ndim == 2 else move
        if not isinstance(parameter, DTensor):
            return parameter, move
        if parameter.ndim == 2:                                 # every process has made the same move: none is sent
            move = distribute_tensor(move, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        return parameter.to_local(), move


def make_optimizers(model, lr, weight_decay=0.0, momentum=0.95):
    """Muon for the weights of linear layers and experts, AdamW for all else: embeddings, convolutions, norms, scales,
    biases, temperatures."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not re.search("conv_qk|embed_tokens|lm_head", name)
        (matrices if is_matrix else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr, momentum, weight_decay), adamw]


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


class Twin:
    """A model's second copy on the same weights, for a CPU: two threads learn from half of a batch each.

    A small model's operations are too short to be shared out, each to two threads that then wait for one another; two
    halves of a batch meet once a step.
    """

    def __init__(self, model):
        self.model, self.copy = model, copy.deepcopy(model)
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        for mine, its in zip(model.parameters(), self.copy.parameters()):
            its.data = mine.data
        for mine, its in zip(model.layers, self.copy.layers):
            its.gate.balancing_biases = mine.gate.balancing_biases

    def learn(self, step, parts):
        """step(model, part), which goes backward and returns something, for each part -> what it returned."""
        threads = torch.get_num_threads()
        self.copy.train(self.model.training)
        torch.set_num_threads(threads // 2)
        try:
            its = self.thread.submit(lambda: [step(self.copy, part) for part in parts[1::2]])
            results = [None] * len(parts)
            results[::2] = [step(self.model, part) for part in parts[::2]]
            results[1::2] = its.result()
        finally:
            torch.set_num_threads(threads)
        # What the copy found out, gradients and its routers' choices, is the model's.
        for mine, its in zip(self.model.parameters(), self.copy.parameters()):
            if its.grad is not None:
                mine.grad = its.grad if mine.grad is None else mine.grad.add_(its.grad)
                its.grad = None
        for mine, its in zip(self.model.layers, self.copy.layers):
            mine.gate.load += its.gate.load
            its.gate.load.zero_()
        return results


def learn(model, step, parts, twin=None):
    """step(model, part) for each part, by two threads if there is a twin -> what it returned."""
    return twin.learn(step, parts) if twin else [step(model, part) for part in parts]


def make_twin(model, most=2**25):
    """A Twin where it helps: one process on a CPU with two threads or more, and a model of at most so many numbers."""
    small = model.norm.weight.device.type == "cpu" and model.parameter_counts()["total"] <= most
    return Twin(model) if small and world_size() == 1 and torch.get_num_threads() > 1 else None


def train_step(model, optimizers, balancer, batch, config, dtype, lr, loss_of=summed_loss, count=None, twin=None):
    """One optimizer step -> its row of the log: {"loss", "norm", "load", "entropy", "bias", "skip"}.

    batch: input_ids, targets, position_ids (rows, S) int64.  `loss_of`: kernels.summed_loss, or the same compiled.
    count: what the summed loss is divided by; None: the batch's targets, or 1 if it has none.
    """
    inputs, targets, positions = batch
    count = count or max(1, (targets >= 0).sum().item())
    device = model.norm.weight.device
    rows = max(1, config.micro_batch // inputs.shape[1])
    if twin:
        rows = min(rows, -(-len(inputs) // 2))

    def backward(model, start):
        part = slice(start, start + rows)
        x, y, position = inputs[part].to(device), targets[part].to(device), positions[part].to(device)
        loss = loss_of(model, x, y, position, dtype) / count
        loss.backward()
        return loss.item()

    # Gradients of the micro-batches add up to those of the whole batch.
    model.train()
    row = {"loss": sum(learn(model, backward, range(0, len(inputs), rows), twin))}
    # Muon moves the matrices and AdamW the rest.
    row["norm"] = optimizer_step(model, optimizers, config.grad_clip, lr)
    # The routers have counted their choices meanwhile: the balancer moves their biases.
    if math.isfinite(row["norm"]):
        row |= balancer.step()
    return row


class Checkpointer:
    """Writes out/<stage>: the model, the tokenizer, and `state`, a dictionary with all else that training goes on from.

    step, seconds   steps done, and what they took, sampling and data included
    settings        of the run: one with other settings does not go on from here
    optimizers      whole tensors by parameter name, whatever the number of processes
    parts           state_dicts of the balancer, the loader or actor, and the reward model
    data            fingerprints of a supervised stage's sources
    measured        for report.json: held-out losses; or difficulties at start and end, and the reward model's agreement
    done            True once the stage is finished
    """

    def __init__(self, name, config, tokenizer, state=None):
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.folder, self.steps = os.path.join(config.out, name), config.steps[name]
        self.clock = time.perf_counter()
        self.state = state or {"step": 0, "seconds": 0.0, "data": {}, "measured": {}}
        self.saved = self.state["step"] if state else None      # the step of the last checkpoint
        # A step of reinforcement learning takes longer.
        self.log_every, self.save_every = config.log_every, config.save_every
        if name in STAGES[3:]:
            self.log_every = max(1, config.log_every // 4)
            self.save_every = max(1, config.save_every // 5)

    def resume(self, model, optimizers, **parts):
        """Say what `save` writes; if the stage was begun, all of it goes on from its checkpoint -> whether it was."""
        self.model, self.parts = model, parts
        # Muon without momentum, as in RL, has no state, and torch's functions ask for one.
        self.optimizers = [optimizer for optimizer in optimizers if optimizer.defaults.get("momentum") != 0]
        self.log = Log(self.config.out, self.name, self.state["step"])
        if self.saved is None:
            return False
        for name, part in parts.items():
            part.load_state_dict(self.state["parts"][name])
        if self.state["optimizers"]:
            set_optimizer_state_dict(model, self.optimizers, self.state["optimizers"], options=WHOLE)
        print(f"{self.name}: going on after step {self.saved}")
        return True

    def save(self, step, done=False):
        now = time.perf_counter()
        self.state["seconds"] += now - self.clock
        self.clock, self.saved = now, step
        if isinstance(self.model, FSDPModule):                  # sampling leaves the root's weights gathered
            self.model.reshard()
        # Before the first step there is no state, and torch's function would make one by a step of its own.
        self.state["optimizers"] = {}
        if any(optimizer.state for optimizer in self.optimizers):
            self.state["optimizers"] = get_optimizer_state_dict(self.model, self.optimizers, options=WHOLE)
        self.state["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        self.state.update(step=step, settings=settings(self.config), done=done)
        # final/ is the last stage that is done.  It comes first: after a kill in between the stage is not done.
        if done:
            save_checkpoint(os.path.join(self.config.out, "final"), self.model, self.tokenizer)
        save_checkpoint(self.folder, self.model, self.tokenizer, self.state)

    def shows(self, step):
        return step % self.log_every == 0 or step in (1, self.steps)

    def finish_step(self, step, row, samples):
        """One row of log.csv; a line and a checkpoint now and then.  A step without a finite loss and gradient stops
        the run: the weights have not moved."""
        if not math.isfinite(row["loss"] + row["norm"]):
            good = f"{self.folder} (step {self.saved})" if self.saved else "none of this stage yet"
            raise SystemExit(f"{self.name} step {step}: loss {row['loss']}, gradient norm {row['norm']}; stopped "
                             f"before the update. Last good checkpoint: {good}. Try a lower --lr, or look at the first "
                             f"samples of this batch: {samples[:6]}")
        self.log.add(stage=self.name, step=step, **row)
        if self.shows(step):
            line = f"{self.name} {step}/{self.steps}"
            for key, value in row.items():
                line += f" | {key} {value:.5g}"
            print(line, flush=True)
        if step % self.save_every == 0 or step == self.steps:   # the last one too, before anything is evaluated
            self.save(step)


def supervised_stage(name, config, stage, model, tokenizer, state, device, dtype):
    """Train pretrain, midtrain or sft to its end, from `state` if it was begun, and leave its checkpoint in
    out/<stage> -> the state (see Checkpointer)."""
    checkpointer = Checkpointer(name, config, tokenizer, state)
    state = checkpointer.state
    # Data: samples of all sources, packed into rows of the stage's context length.
    sources = make_sources(config, stage, tokenizer, config.seed)
    for source in sources:
        if state["data"].setdefault(source.name, source.fingerprint) != source.fingerprint:
            raise SystemExit(f"{checkpointer.folder} was begun on other data: {source.name} changed since. Bring the "
                             f"old data back, take another --out, or delete {checkpointer.folder}")
    loader = Loader(sources, stage, config.tokens_per_step, config.seed, tokenizer.pad)
    # Then the stage's own RoPE base, weights sharded over the processes, and all that a step moves.
    if not config.init:                                         # which has its own
        model.config.rope_parameters["hybrid"]["rope_theta"] = stage.rope_theta
    model = shard_model(model, config.shard)
    optimizers = make_optimizers(model, stage.lr, weight_decay=0.1)
    balancer = PIDBalancer(model, config.balancer_lr)
    checkpointer.resume(model, optimizers, loader=loader, balancer=balancer)
    loss_of, twin = summed_loss, make_twin(model)
    if not config.no_compile:
        mine = config.tokens_per_step / world_size()            # this process' tokens in a step
        compiled, why = should_compile(model, stage.steps * mine, stage.steps * math.ceil(mine / config.micro_batch))
        if compiled:
            loss_of, twin = compile_loss(), None
        print(f"{name}: {why}")

    for step in range(state["step"] + 1, stage.steps + 1):
        begun = time.perf_counter()
        *batch, origins = loader.next()
        # FSDP2 averages gradients over the processes, so a process divides its summed loss by the targets that one of
        # them has on average.
        count = max(1, (batch[1] >= 0).sum().item()) / world_size()
        lr = learning_rate(step - 1, stage.steps, stage.lr, stage.lr_end)
        row = average(train_step(model, optimizers, balancer, shard_rows(batch), config, dtype, lr, loss_of, count,
                                 twin))
        seconds = time.perf_counter() - begun
        row |= {"lr": lr, "seconds": seconds, "tokens_per_second": config.tokens_per_step / seconds}
        checkpointer.finish_step(step, row, origins)
        if step % max(1, stage.steps // 4) == 0:
            show_samples(model, tokenizer, sources, step)

    state["measured"]["loss"] = held_out_loss(model, sources, stage, tokenizer.pad)
    checkpointer.save(stage.steps, done=True)
    for source in sources:
        if isinstance(source, TaskSource):
            print(f"{name}: generated conversations, trimmed to {stage.context} tokens: {dict(source.trim_counts)}")
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
    """(r - mean + bonus) / std over each group, for rewards between 0 and 1.  (P, G) -> (P, G).

    >>> grpo_advantage(torch.tensor([[0.2, 0.4, 0.6]]))
    tensor([[-1.2247,  0.0000,  1.2247]])
    """
    mean = rewards.mean(-1, keepdim=True)
    std = rewards.std(-1, keepdim=True, correction=0)
    return (rewards - mean + bonus) / std.clamp_min(1e-4)


def length_reward(lengths, correct, best, coefficient=0.1, tolerance=0.1, near=0.1):
    """Bonus for short correct rollouts of one group: coefficient * p * lambda, and 0 for wrong ones.  (G,) -> (G,).

    p is the group's solve rate.  lambda = 1/2 - (length - shortest) / (longest - shortest) falls from 1/2 to -1/2
    over the correct rollouts; those within `tolerance` of the shortest get 1/2.  All get 0 unless two or more are
    correct and p is within `near` of `best`, this task's highest solve rate so far: first learn it, then be brief.

    >>> length_reward(torch.tensor([10., 20, 30, 5]), torch.tensor([1., 1, 1, 0]), best=0.75, coefficient=0.4)
    tensor([ 0.1500,  0.0000, -0.1500,  0.0000])
    """
    p = correct.mean().item()
    if correct.sum() < 2 or p < best - near:
        return torch.zeros_like(lengths)
    right = lengths[correct > 0]
    shortest, longest = right.min(), right.max()
    scale = 0.5 - ((lengths - shortest) / (longest - shortest).clamp_min(1)).clamp(0, 1)
    scale = torch.where(lengths <= shortest * (1 + tolerance), 0.5, scale)
    return coefficient * p * scale * (correct > 0)


def dppo_mask(pi, mu, advantage, delta=0.1):
    """Which tokens count: all but those whose probability has already moved by more than `delta`, from the sampler's
    `mu` to the trainer's `pi`, to where the advantage pushes (binary total variation).  All (N,) -> (N,) bool.

    >>> dppo_mask(torch.tensor([.7, .5, .7, .1]), torch.tensor([.5, .5, .5, .5]), torch.tensor([1., 1, -1, -1]))
    tensor([False,  True,  True, False])
    """
    return torch.where(advantage > 0, pi - mu <= delta, pi - mu >= -delta)


def policy_loss(logp, sampled_logp, advantage, rollouts, divisor=64, delta=0.1):
    """Token losses summed per rollout, averaged over rollouts, by a constant divisor: no 1 / length anywhere.

        sum over tokens of  -A stopgrad(min(pi / mu, 20)) log pi [dppo mask]  / rollouts / divisor

    `divisor`, a typical length, only sets the scale of the printed loss and of what grad_clip compares: Muon and AdamW
    move as far whatever a gradient's size.  logp, sampled_logp, advantage (N,): all tokens of `rollouts` rollouts, the
    trainer's and the sampler's log probability, and the advantage of the token's rollout.

    >>> logp = torch.tensor([0.5, 0.25]).log().requires_grad_()
    >>> policy_loss(logp, logp.detach(), torch.tensor([3., -1.]), rollouts=2, divisor=1).backward(); logp.grad
    tensor([-1.5000,  0.5000])
    """
    now = logp.detach()
    keep = dppo_mask(now.exp(), sampled_logp.exp(), advantage, delta)
    ratio = (now - sampled_logp).exp().clamp_max(20)
    return -(advantage * ratio * logp * keep).sum() / rollouts / divisor


def best_and_worst(rewards, count):
    """Which rollouts of each group to learn from where learning takes longer than sampling: half of them with the
    highest rewards, half with the lowest, so that rewards vary most (arXiv 2504.13818).  (P, G) -> (P, count) indices.

    >>> best_and_worst(torch.tensor([[0., 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0]]), 4)
    tensor([[0, 4, 3, 5],
            [0, 1, 5, 2]])
    """
    order = rewards.sort(dim=1, stable=True).indices
    return torch.cat([order[:, :count // 2], order[:, count // 2 - count:]], 1)


def has_signal(rewards):
    """Dynamic sampling: a group whose rewards are all equal carries no gradient, and another takes its place."""
    return max(rewards) - min(rewards) > 1e-3


def repetitive(text, chunk=2048, ratio=0.05):
    """Rambling: some piece of the text repeats itself so much that zlib makes it 20 times smaller.

    >>> repetitive("7+5=12," * 80), repetitive("7+5=12,")
    (True, False)
    """
    for start in range(0, len(text), chunk):
        piece = text[start:start + chunk].encode("utf-8", "replace")
        if len(zlib.compress(piece)) < ratio * len(piece):
            return True
    return False


def next_difficulty(d, solve_rate):
    """RLVE's rule for a group at the current difficulty: up above 0.7, down at 0.

    >>> [next_difficulty(3, rate) for rate in (0.75, 0.7, 0.1, 0.0)], next_difficulty(1, 0.0)
    ([4, 3, 3, 2], 1)
    """
    if solve_rate > 0.7:
        return d + 1
    return max(1, d - 1) if solve_rate == 0 else d


class LogisticBelief:
    """Where an environment's pass rate is one half: a posterior over curves p(d) = sigmoid(slope (middle - d)).

    Thompson sampling: `propose` draws one curve and tries its middle, so the search is wide at first and narrow later.
    """
    curves = [(middle / 4, slope) for middle in range(2, 53) for slope in (0.5, 1.0, 2.0)]

    def __init__(self):
        self.middles, self.slopes = np.array(self.curves).T
        self.log_weight = np.zeros(len(self.curves))

    def update(self, d, right, wrong):
        """`right` and `wrong` rollouts were seen at difficulty d."""
        z = self.slopes * (self.middles - d)
        self.log_weight -= right * np.logaddexp(0, -z) + wrong * np.logaddexp(0, z)

    def weights(self):
        weight = np.exp(self.log_weight - self.log_weight.max())
        return weight / weight.sum()

    def propose(self, rng):
        middle, _ = rng.choices(self.curves, self.weights())[0]
        return max(1, round(middle))

    def middle(self):
        return max(1, round(float(self.weights() @ self.middles)))


# ---- reinforcement learning: rollouts -------------------------------------------------------------------------------


@dataclass
class Group:
    """A prompt and its rollouts: everything the trainer and the log need, in lists that torch.save keeps."""
    problem: "Problem"
    prompt: list                            # token ids
    level: int = 0                          # the environment's difficulty; 0: an aggregation prompt
    version: int = 0                        # the trainer's step whose weights sampled it
    # One entry a rollout:
    tokens: list = field(default_factory=list)              # ids, with the end token if it came in time
    logps: list = field(default_factory=list)               # (length,) fp32: the sampler's log probabilities
    choices: list = field(default_factory=list)             # (L, prompt + length - 1) int16: the experts taken
    texts: list = field(default_factory=list)
    ended: list = field(default_factory=list)               # whether the end token came in time
    rewards: list = field(default_factory=list)

    def add(self, tokenizer, tokens, logps, choices):
        """One rollout of `roll_out`."""
        ended = tokens[-1] in end_tokens(tokenizer)
        self.tokens.append(tokens)
        self.logps.append(logps)
        self.choices.append(choices)
        self.texts.append(opening(tokenizer, self.prompt) + tokenizer.decode(tokens[:-1] if ended else tokens))
        self.ended.append(ended)

    def lengths(self):
        return list(map(len, self.tokens))


def roll_out(model, prompts, group_size, context, end, generator=None, uniform=None):
    """Sample `group_size` replies of up to `context` tokens to each prompt (a list of ids) at temperature 1 -> for each
    prompt a list of rollouts: (tokens up to an end token, log probabilities (n,) fp32, experts (L, prompt + n - 1)).

    end: the tokens that end a reply, a list.  generator, or uniform (context, len(prompts) * group_size): where the
    random numbers are from, as in zaya.Zaya.generate.
    """
    owners = [prompt for prompt in prompts for _ in range(group_size)]
    inputs, mask = left_padded(owners, model.config.pad_token_id or 0, model.norm.weight.device)
    S = inputs.shape[1]
    sampled, logps, choices = model.generate(inputs, context, attention_mask=mask, generator=generator,
                                             eos_token_id=end, uniform=uniform, record=True)
    logps, choices, rolled = logps.cpu(), choices.cpu(), [[] for _ in prompts]
    for row, tokens in enumerate(sampled[:, S:].tolist()):
        ends = [place for place, token in enumerate(tokens) if token in end]
        if ends:
            tokens = tokens[:ends[0] + 1]
        # Left of the prompt is padding; the last token was sampled but not read, so no expert saw it.
        seen = slice(S - len(owners[row]), S + len(tokens) - 1)
        rollout = tokens, logps[row, :len(tokens)].clone(), choices[:, row, seen].clone()
        rolled[row // group_size].append(rollout)
    return rolled


def verifier_rewards(group):
    """The usual reward: what the task says."""
    reward = find_task(group.problem.task).reward
    return [reward(group.problem, text) for text in group.texts]


class Actor:
    """Samples rollouts for the trainer, as PipelineRL does: with older weights, some steps ahead.

    The sampler is a copy of the model that gets the trainer's weights every `sync_every` steps.  Each task is an
    environment, with a difficulty of its own.  Groups wait in a buffer until the trainer takes them, and are dropped
    when they are more than `most_stale` steps old.  `score(group)` gives the rewards.
    """
    sync_every, most_stale, pool_size = 2, 2, 64
    STATE = ("difficulty", "asked", "best_rates", "useful", "version", "rounds")

    def __init__(self, model, tokenizer, stage, seed, score=verifier_rewards, dtype=torch.float32):
        self.sampler, self.tokenizer = copy.deepcopy(model), tokenizer
        self.stage, self.seed = stage, seed
        self.score, self.dtype = score, dtype
        self.difficulty = dict.fromkeys(stage.tasks, 1)
        self.hardest = {name: self.longest(find_task(name)) for name in stage.tasks}
        self.asked = dict.fromkeys(stage.tasks, 0)              # groups so far
        self.best_rates = {}                                    # the highest solve rates by task and difficulty
        self.useful = 1.0                                       # the running share of groups with a signal
        self.buffer, self.pool = [], []                         # groups to train on; (problem, tails) to aggregate
        self.version = self.rounds = 0

    def longest(self, task):
        """The highest difficulty at which a reply of the teacher's still fits the context."""
        for d in range(2, task.hardest + 1):
            problem = draw(task, "length", d, held_out=False)
            lengths = [count_tokens(task.solve(problem, seed), self.tokenizer) for seed in range(8)]
            if min(lengths) >= self.stage.context:
                return d - 1
        return task.hardest

    def sync(self, model, version):
        """The sampler, which is whole in every process, gets the trainer's weights."""
        self.sampler.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        self.version = version

    def take(self, version):
        """-> up to `groups` groups for the trainer's step `version`, the oldest first, and all that were sampled now.

        Three quarters of `groups` are enough: a whole round for the last few would mostly grow stale."""
        self.buffer = [group for group in self.buffer if version - group.version <= self.most_stale]
        generated = []
        for _ in range(3):
            if len(self.buffer) >= 0.75 * self.stage.groups:
                break
            generated += self.generate()
        taken = self.buffer[:self.stage.groups]
        del self.buffer[:self.stage.groups]
        return taken, generated

    def generate(self):
        """One round of rollouts, into the buffer -> all its groups."""
        # Enough for `sync_every` steps of the trainer, if as many groups have a signal as lately.
        rng = random.Random(f"{self.seed} round {self.rounds}")
        enough = self.sync_every * self.stage.groups
        count = min(2 * enough, math.ceil(enough / self.useful))
        groups = self.sample([self.draw_prompt(rng) for _ in range(count)], self.stage.group_size)
        for group in groups:
            self.remember(group)
        # Dynamic sampling: a group without a signal is no use to the trainer.
        signals = [group for group in groups if has_signal(group.rewards)]
        self.buffer += signals
        self.useful = max(0.1, 0.8 * self.useful + 0.2 * len(signals) / len(groups))
        return groups

    def draw_prompt(self, rng):
        """A new problem of the environment that was asked least; or, for a share of the prompts, an earlier problem
        with the tails of some of the model's own replies, to aggregate."""
        if self.pool and rng.random() < self.stage.aggregation:
            problem, tails = self.pool[rng.randrange(len(self.pool))]
            prompt = terse_prompt(problem.prompt, rng.sample(tails, min(4, len(tails))))
            return Group(problem, prompt_ids(self.tokenizer, prompt))
        name = min(self.asked, key=self.asked.get)
        levels = find_task(name).levels
        d = self.difficulty[name] if self.stage.adaptive else levels[self.asked[name] % len(levels)]
        self.asked[name] += 1
        return self.new_group(name, d, rng)

    def new_group(self, name, d, rng):
        problem = draw(find_task(name), rng.getrandbits(48), d, held_out=False)
        return Group(problem, prompt_ids(self.tokenizer, problem.prompt), d)

    def sample(self, groups, group_size):
        """Fill in the groups' rollouts and rewards -> the groups.  Every process samples its share, and gets all."""
        # A rollout's random numbers depend on its place among all, not on the process that samples it.
        rng = random.Random(f"{self.seed} sample {self.rounds}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        uniform = torch.rand(self.stage.context, len(groups), group_size, generator=generator)
        uniform = shard(uniform.transpose(0, 1)).transpose(0, 1).flatten(1)
        mine = shard(groups)
        if mine:
            with autocast(self.sampler, self.dtype):            # the same precision as the trainer's
                rolled = roll_out(self.sampler, [group.prompt for group in mine], group_size, self.stage.context,
                                  end_tokens(self.tokenizer), uniform=uniform)
            for group, rollouts in zip(mine, rolled):
                for rollout in rollouts:
                    group.add(self.tokenizer, *rollout)
        # Rambling earns nothing: neither a reply without an end nor one that repeats itself.
        for group in mine:
            group.version = self.version
            for reward, ended, text in zip(self.score(group), group.ended, group.texts):
                group.rewards.append(float(reward) if ended and not repetitive(text) else 0.0)
        self.rounds += 1
        return unshard(mine)

    def remember(self, group):
        """What a group's solve rate changes: its environment's difficulty and best rate, and the pool."""
        task, rate = find_task(group.problem.task), float(np.mean(group.rewards))
        if self.stage.adaptive and group.level == self.difficulty[task.name]:
            self.difficulty[task.name] = min(self.hardest[task.name], next_difficulty(group.level, rate))
        if group.level:
            self.best_rates[task.name, group.level] = max(self.best(group), rate)
        if self.stage.aggregation and task.reads and rate < 1:  # replies to aggregation prompts are aggregated too
            tails = [cut_tail(text, self.stage.tail, self.tokenizer) for text in group.texts]
            self.pool = [*self.pool, (group.problem, tails)][-self.pool_size:]

    def best(self, group):
        """The highest solve rate so far of this group's environment at its difficulty; 0 for an aggregation prompt,
        so that its short right replies are always paid."""
        return self.best_rates.get((group.problem.task, group.level), 0.0)

    def init_difficulty(self, rounds=6, group_size=8):
        """Set each environment's first difficulty to where half of the rollouts pass."""
        beliefs = {name: LogisticBelief() for name in self.difficulty}
        for i in tqdm(range(rounds), desc="finding difficulties", leave=False, disable=None):
            rng, groups = random.Random(f"{self.seed} start {i}"), []
            for name, belief in beliefs.items():
                d = min(self.hardest[name], belief.propose(rng))
                groups.append(self.new_group(name, d, rng))
            for group in self.sample(groups, group_size):
                right = sum(group.rewards)
                beliefs[group.problem.task].update(group.problem.difficulty, right, group_size - right)
        for name, belief in beliefs.items():
            self.difficulty[name] = min(self.hardest[name], belief.middle())

    def state_dict(self):
        """Everything that a round depends on; groups as plain dictionaries, as trainer.pt is read with weights_only."""
        state = {name: getattr(self, name) for name in self.STATE}
        state["sampler"] = self.sampler.state_dict()
        state["buffer"] = [dataclasses.asdict(group) for group in self.buffer]
        state["pool"] = [(dataclasses.asdict(problem), tails) for problem, tails in self.pool]
        return state

    def load_state_dict(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])
        self.sampler.load_state_dict(state["sampler"])
        self.buffer = [Group(**{**group, "problem": Problem(**group["problem"])}) for group in state["buffer"]]
        self.pool = [(Problem(**problem), tails) for problem, tails in state["pool"]]


# ---- reinforcement learning: the trainer ----------------------------------------------------------------------------


def autocast(model, dtype):
    """Matrix products in `dtype`; the weights stay fp32."""
    return torch.autocast(model.norm.weight.device.type, dtype, enabled=dtype != torch.float32)


def rl_batches(groups, advantages, micro_batch, pad, device):
    """Groups and their advantages (P, G) -> this process' micro-batches: four or more, of at most `micro_batch` tokens.

    Every process gets equally many micro-batches and rows, as FSDP2 needs it.
    """
    rollouts = []
    for group, row in zip(groups, advantages.tolist()):
        for rollout in zip(group.tokens, group.logps, group.choices, row):
            if rollout[-1]:                                     # without an advantage there is nothing to learn
                rollouts.append((group.prompt, *rollout))
    # Rows of a micro-batch are about as long as each other, so that little of it is padding.
    rollouts.sort(key=lambda rollout: len(rollout[0]) + len(rollout[1]))
    prompt, tokens, *_ = rollouts[-1]
    longest, processes, batches = len(prompt) + len(tokens), world_size(), []
    rows = processes * max(1, min(len(rollouts) // processes // 4, micro_batch // longest))
    for start in range(0, len(rollouts), rows):
        batch = rollouts[start:start + rows]
        batch += [(*batch[-1][:4], None)] * (-len(batch) % processes)
        batches.append(collate(shard(batch), pad, device))
    return batches


def collate(rollouts, pad, device):
    """Rollouts (prompt, tokens, logps, choices, advantage) -> one right-padded batch for `rl_step`:
    input_ids, targets (-100: not the policy's token), position_ids (R, S); choices [L x (R, S)]; logps, advantage (N,).
    A rollout whose advantage is None fills up a batch: its row is padding, which no router counts.
    """
    rows, columns, logps, advantages = [], [], [], []
    for prompt, tokens, logp, choice, advantage in rollouts:
        # Position i predicts token i + 1: the reply's targets begin at the prompt's last token.
        targets = torch.tensor([-100] * (len(prompt) - 1) + tokens)
        inputs = torch.tensor(prompt + tokens)[:-1]
        positions = torch.arange(len(inputs))
        if advantage is None:
            targets.fill_(-100)
            positions.fill_(-1)
            logp, advantage = logp[:0], 0.0
        rows.append((inputs, targets, positions, choice.T.long()))
        logps.append(logp)
        advantages.append(torch.full_like(logp, advantage))
    for column, padding in zip(zip(*rows), (pad, -100, -1, 0)):
        columns.append(pad_sequence(column, batch_first=True, padding_value=padding).to(device))
    inputs, targets, positions, choices = columns
    choices = list(choices.permute(2, 0, 1).contiguous())       # (R, S, L) -> L x (R, S)
    return inputs, targets, positions, choices, torch.cat(logps).to(device), torch.cat(advantages).to(device)


def token_logps(model, inputs, targets, positions, routing):
    """The model's log probability of each target: (N,) fp32.  `routing`: as in hidden_states, to replay or to fill."""
    hidden = model.hidden_states(inputs, position_ids=positions, routing=routing)[targets >= 0]
    return model.logits(hidden).log_softmax(-1).gather(1, targets[targets >= 0][:, None])[:, 0]


def kl(sampled_logp, logp):
    """KL(sampler || trainer) a token, from the sampler's samples: mean of x - 1 - log x, x = pi / mu; never below 0."""
    log_ratio = (logp - sampled_logp).float()
    return (log_ratio.exp() - 1 - log_ratio).mean().item()


@torch.no_grad()
def replay_gap(model, batch):
    """What the replay is for, on one batch: (share of the sampler's expert choices that the trainer's own router would
    change, sampler-trainer KL with the replay, and without it)."""
    inputs, targets, positions, choices, sampled_logp, _ = batch
    was_training, own = model.training, []
    model.eval()                                                # not counted as load
    alone = token_logps(model, inputs, targets, positions, own)
    replayed = token_logps(model, inputs, targets, positions, list(choices))
    model.train(was_training)
    changed = torch.stack(own) != torch.stack(choices)          # (L, R, S)
    flips = changed[:, positions >= 0].float().mean().item()
    return flips, kl(sampled_logp, replayed), kl(sampled_logp, alone)


def rl_step(model, optimizers, balancer, batches, rollouts, tokens, config, dtype, lr, measure=True, rehearsal=None,
            twin=None):
    """One optimizer step on `policy_loss` -> its row of the log: {"loss", "norm", "masked", and as in train_step}.

    The loss has one term for each token that the policy wrote: its rollout's advantage over the group (rl_stage makes
    it) times the clipped ratio of trainer and sampler times log pi, unless DPPO's mask leaves the token out.  Experts
    are replayed: each token takes those that the sampler took, and only their weights are computed anew.  There is no
    KL, entropy or auxiliary term; `measure` only logs what the replay is good for: {"flips", "kl", "kl_live"}.  We
    differ: a quarter of the loss of `rehearsal`, a batch of SFT, is added, since RL wears off what it does not ask for.
    batches: micro-batches of `collate`; rollouts, tokens: how many they hold, which loss and masked are divided by (of
    several processes the mean, as FSDP2 averages gradients).
    """
    row = {"loss": 0.0, "masked": 0.0}
    if measure:
        with autocast(model, dtype):
            row["flips"], row["kl"], row["kl_live"] = replay_gap(model, batches[len(batches) // 2])

    def backward(model, batch):
        """-> the loss, and how many tokens were masked."""
        # The trainer's log probability of each sampled token, through the experts that the sampler took.
        inputs, targets, positions, choices, sampled_logp, advantage = batch
        with autocast(model, dtype):
            logp = token_logps(model, inputs, targets, positions, list(choices))
        # The policy gradient, without the tokens whose probability has moved far enough already.
        loss = policy_loss(logp, sampled_logp, advantage, rollouts)
        loss.backward()
        keep = dppo_mask(logp.detach().exp(), sampled_logp.exp(), advantage)
        return loss.item(), (~keep).sum().item()

    # Gradients of the micro-batches add up to those of all rollouts.
    model.train()
    for loss, masked in learn(model, backward, batches, twin):
        row["loss"] += loss
        row["masked"] += masked / tokens
    if rehearsal:
        inputs, targets, positions, count = rehearsal
        loss = summed_loss(model, inputs, targets, positions, dtype) / count
        (loss / 4).backward()
        row["rehearsed"] = loss.item()
    # Muon moves the matrices and AdamW the rest.
    row["norm"] = optimizer_step(model, optimizers, config.grad_clip, lr)
    # The routers have counted the replayed choices meanwhile: the balancer moves their biases.
    if math.isfinite(row["norm"]):
        row |= balancer.step()
    return row


def rl_stage(name, config, stage, model, tokenizer, state, device, dtype):
    """Train one RL stage to its end, from `state` if it was begun, and leave its checkpoint in out/<stage> -> the state
    (see Checkpointer)."""
    checkpointer = Checkpointer(name, config, tokenizer, state)
    state, measured = checkpointer.state, checkpointer.state["measured"]
    if not config.init:
        model.config.rope_parameters["hybrid"]["rope_theta"] = stage.rope_theta
    # A verifier says right or wrong, and MaxRL weighs rare successes; a reward model's scores lie between.
    score, advantage_of, parts = verifier_rewards, maxrl_advantage, {}
    if stage.reward_model_steps:
        reward_model = RewardModel(model).to(device).eval()
        parts = {"reward_model": reward_model}
        score, advantage_of = GatedReward(reward_model, tokenizer), grpo_advantage
    actor = Actor(model, tokenizer, stage, f"{config.seed} {name}", score, dtype)
    # What SFT taught is rehearsed, with new problems.
    sft, seed = stage_settings(config, "sft"), config.seed + 1000 * STAGES.index(name)
    sources = make_sources(config, sft, tokenizer, seed)
    rehearsal = Loader(sources, sft, stage.rehearsal * sft.context, seed, tokenizer.pad)
    model = shard_model(model, config.shard)
    optimizers = make_optimizers(model, stage.lr, momentum=0.0)
    # A tenth of the pretraining rate: RL prompts cover few tasks, and balancing hard on them would undo the
    # specialisation learned earlier.
    balancer = PIDBalancer(model, config.balancer_lr / 10)
    resumed = checkpointer.resume(model, optimizers, actor=actor, balancer=balancer, rehearsal=rehearsal, **parts)
    if stage.reward_model_steps and not resumed:
        measured["judged"] = train_reward_model(reward_model, tokenizer, stage.reward_model_steps,
                                                config.lr["sft"] / 4, config.seed)
        print(f"{name}: the reward model agrees with {measured['judged']:.1%} of 200 held-out preferences")
    twin = make_twin(model)
    if stage.adaptive and not resumed:
        actor.init_difficulty()
        measured["start"] = dict(actor.difficulty)

    for step in range(state["step"] + 1, stage.steps + 1):
        # The sampler gets the trainer's weights every other step, and lags behind in between.
        if (step - 1) % actor.sync_every == 0:
            actor.sync(model, step - 1)
        # Groups of rollouts with their rewards, from the buffer or sampled now.
        begun = time.perf_counter()
        groups, generated = actor.take(step - 1)
        row = {"loss": 0.0, "norm": 0.0}
        lr = learning_rate(step - 1, stage.steps, stage.lr, stage.lr_end)
        if groups:
            # A rollout's advantage over its group; short right ones get a little more.
            rewards = torch.tensor([group.rewards for group in groups])                     # (P, G)
            lengths = torch.tensor([group.lengths() for group in groups])
            bonus = torch.zeros_like(rewards)
            for i, group in enumerate(groups):
                bonus[i] = length_reward(lengths[i].float(), rewards[i], actor.best(group), stage.length_reward)
            chosen = best_and_worst(rewards, min(stage.learned, rewards.shape[1]))          # (P, learned)
            advantages = torch.zeros_like(rewards).scatter(
                1, chosen, advantage_of(rewards.gather(1, chosen), bonus.gather(1, chosen)))
            batches = rl_batches(groups, advantages, config.micro_batch, tokenizer.pad, device)
            # One step of policy gradient; FSDP2 averages over processes, so sums are divided by what one has.
            rollouts = chosen.numel() / world_size()
            tokens = lengths.gather(1, chosen).sum().item() / world_size()
            *rows, _ = rehearsal.next()
            count = max(1, (rows[1] >= 0).sum().item()) / world_size()
            rows = [part.to(device) for part in shard_rows(rows)]
            row = average(rl_step(model, optimizers, balancer, batches, rollouts, tokens, config, dtype, lr,
                                  checkpointer.shows(step), (*rows, count), twin))
        row |= {"lr": lr, "seconds": time.perf_counter() - begun, **rollout_metrics(generated, groups, step - 1)}
        checkpointer.finish_step(step, row, [group.problem.prompt for group in groups])
        if step % max(1, stage.steps // 4) == 0 and generated:
            last = generated[-1]
            print(f"    reward {last.rewards[0]:.2f} | {last.problem.prompt} -> {last.texts[0][:200]!r}")

    if stage.adaptive:
        measured["end"] = actor.difficulty
    checkpointer.save(stage.steps, done=True)
    return state


def rollout_metrics(generated, taken, version):
    """What the log says of the rollouts just sampled (reward … zero_groups), and of those trained on (staleness)."""
    rows = collections.defaultdict(list)
    for group in taken:
        rows["staleness"].append(version - group.version)
    for group in generated:
        rows["reward"].append(np.mean(group.rewards))
        rows["length"].append(np.mean(group.lengths()))
        rows["no_end"].append(1 - np.mean(group.ended))
        rows["zero_groups"].append(not has_signal(group.rewards))
    return {key: float(np.mean(values)) for key, values in rows.items()}


# ---- the behavioral stage's reward model ----------------------------------------------------------------------------


class RewardModel(torch.nn.Module):
    """A copy of the backbone with a scalar head on the last token: ids of conversations -> scores (B,) fp32."""

    def __init__(self, model):
        super().__init__()
        self.backbone = copy.deepcopy(model)
        self.head = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, conversations):
        ids, mask = left_padded(conversations, 0, self.head.weight.device)
        hidden = self.backbone.hidden_states(ids, mask)[:, -1]                              # (B, E)
        return self.head(hidden.float())[:, 0]


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
        pair = []
        for _ in range(2):
            write = task.solve if rng.random() < 0.5 else task.corrupt
            pair.append(write(problem, rng.getrandbits(48)))
        pair.sort(key=lambda text: -warmth(split_answer(text)))
        if warmth(split_answer(pair[0])) > warmth(split_answer(pair[1])):
            return problem, *pair


def conversation(tokenizer, problem, text):
    return tokenizer.render([{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": text}])[0]


def train_reward_model(reward_model, tokenizer, steps, lr, seed, pairs=32):
    """Bradley-Terry on generated preferences -> the share of 200 held-out ones that the reward model agrees with."""
    rng, optimizers = random.Random(f"{seed} preferences"), make_optimizers(reward_model, lr)

    def scores(count, held_out):
        """Of `count` new pairs: the preferred replies' (count,), and the others'."""
        better, worse = [], []
        for _ in range(count):
            problem, preferred, other = preference_pair(rng, held_out)
            better.append(conversation(tokenizer, problem, preferred))
            worse.append(conversation(tokenizer, problem, other))
        return reward_model(better + worse).split(count)

    reward_model.train()
    for step in tqdm(range(steps), desc="reward model", leave=False, disable=None):
        bradley_terry_loss(*scores(pairs, held_out=False)).backward()
        optimizer_step(reward_model, optimizers, 1.0, learning_rate(step, steps, lr, lr / 10))
    reward_model.eval()
    with torch.no_grad():
        better, worse = scores(200, held_out=True)
    return (better > worse).float().mean().item()


class GatedReward:
    """score(group) of the behavioral stage: the reward model's sigmoid, or 0 for a reply that the gate (the verifier)
    refuses.  Other tasks are paid what the gate says."""

    def __init__(self, reward_model, tokenizer, gate=verifier_rewards):
        self.reward_model, self.tokenizer, self.gate = reward_model, tokenizer, gate

    @torch.no_grad()
    def __call__(self, group):
        if group.problem.task != "constraints":
            return self.gate(group)
        conversations = [conversation(self.tokenizer, group.problem, text) for text in group.texts]
        scores = self.reward_model(conversations).sigmoid().tolist()
        return [allowed * score for allowed, score in zip(self.gate(group), scores)]


# ---- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model, sources, stage, pad, tokens=16384):
    """Mean loss on held-out samples, by source."""
    result, device = {}, model.norm.weight.device
    model.eval()
    for source in sources:
        if source.size(held_out=True) == 0:
            continue
        loader = Loader([source], stage, max(tokens, stage.context), 0, pad, held_out=True)
        *batch, _ = loader.next()
        total = 0.0
        for inputs, targets, positions in zip(*map(torch.split, shard_rows(batch), (8, 8, 8))):
            total += summed_loss(model, inputs.to(device), targets.to(device), positions.to(device)).item()
        count = max(1, (batch[1] >= 0).sum().item())
        name = source.name.encode("utf-8", "replace").decode()  # some file systems' names are no UTF-8
        result[name] = round(sum(all_gather(total)) / count, 4)
    return result


def held_out_problems(tasks, count, levels=None):
    """`count` held-out problems a task, over its levels in turn; none twice: when the easy ones have run out, harder
    ones take their place."""
    problems, seen = [], set()
    for name in tasks:
        task = find_task(name)
        for i in range(count):
            level = (levels or task.levels)[i % len(levels or task.levels)]
            for attempt in range(1000):
                problem = draw(task, f"eval {i} {attempt}", level + attempt // 50, held_out=True)
                if (name, problem.prompt) not in seen:
                    break
            seen.add((name, problem.prompt))
            problems.append(problem)
    return problems


def verify_replies(problems, replies):
    """(problems, samples) texts -> rewards, an array (problems, samples)."""
    rewards = []
    for problem, texts in zip(problems, replies):
        verify = find_task(problem.task).verify
        rewards.append([verify(problem, text)[0] for text in texts])
    return np.array(rewards, float)


def solve_rates(model, tokenizer, problems, samples, temperature=1.0):
    """The share of `samples` replies to each problem that are right: (problems,) array."""
    source, rates = Checkpoint(model, tokenizer, temperature), np.zeros(len(problems))
    names = sorted({problem.task for problem in problems})
    # The processes share out the tasks: replies to one are about equally long, and a batch waits for its longest.
    for name in tqdm(shard(names), desc="held-out problems", leave=False, disable=None):
        mine = np.array([problem.task == name for problem in problems])
        asked, prompts, limit = list(itertools.compress(problems, mine)), [], 160
        # A reply may be half as long again as the teacher's, and a short one longer: a search takes its time.
        for problem in asked:
            prompts += [problem.prompt] * samples
            limit = max(limit, len(tokenizer.encode(find_task(name).solve(problem))) * 3 // 2 + 16)
        replies = np.array(source(prompts, limit, 0), object).reshape(-1, samples)
        rates[mine] = verify_replies(asked, replies).mean(1)
    return sum(all_gather(rates))


def pass_at_1(model, tokenizer, tasks, problems, samples):
    """Accuracy of single samples at temperature 1 on `problems` held-out problems a task -> report.json's {"pass@1",
    "ci95", "problems", "tasks"}."""
    # The same problems after every stage, so that stages can be compared.
    held = held_out_problems(tasks, problems if samples else 0)
    if not held:
        return {"pass@1": 0.0, "ci95": [0.0, 0.0], "problems": 0, "tasks": {}}
    rates = solve_rates(model, tokenizer, held, samples)
    by_task = dict(zip(tasks, rates.reshape(len(tasks), problems).mean(1).tolist()))
    return {"pass@1": float(rates.mean()), "ci95": interval(rates), "problems": len(held), "tasks": by_task}


def majority_rates(problems, replies):
    """Whether each problem's most frequent answer is right, 0 or 1; a reply without an answer has no vote."""
    right = []
    for problem, texts in zip(problems, replies):
        answer, _ = majority([split_answer(text) or None for text in texts])
        right.append(find_task(problem.task).verify_answer(problem.data, answer or ""))
    return np.array(right, float)


def texts_by_round(results):
    """What Markovian RSA wrote: an array of texts (rounds + 1, problems, population)."""
    texts = [[[candidate.text for candidate in found] for found in result.rounds] for result in results]
    return np.array(texts, object).swapaxes(0, 1)


def reading_rates(model, tokenizer, tasks, eval_spec, problems=12, population=8):
    """What Markovian RSA makes of those tasks that read after 0, 1, …, T rounds -> {task: [share right, …]}.

    On few problems, to be looked at after every stage: one that rewards other things can spoil what tails are read for.
    """
    budget, source, result = eval_spec.budget, Checkpoint(model, tokenizer), {}
    names = [name for name in shard(READERS) if name in tasks]
    for name in tqdm(names, desc="reading tails", leave=False, disable=None):
        # One that is not evaluated is asked above its own levels.
        difficulty = eval_spec.tasks.get(name) or find_task(name).levels[-1] + 2
        asked = held_out_problems([name], problems, (difficulty,))
        found = markovian_rsa([problem.prompt for problem in asked], source, population, budget.subset, budget.rounds,
                              budget.budget, budget.tail, 0, tokenizer)
        result[name] = [float(verify_replies(asked, replies).mean()) for replies in texts_by_round(found)]
    result = collections.ChainMap(*all_gather(result))
    return {name: result[name] for name in READERS if name in result}


def story_rate(model, tokenizer, stories=32):
    """The share of sampled stories that are consistent."""
    begun = [tokenizer.encode(f"{PEOPLE[i % len(PEOPLE)][0]} lived") for i in range(stories)]
    prompts, mask = left_padded(begun, tokenizer.pad, model.norm.weight.device)
    told = model.generate(prompts, 256, attention_mask=mask, generator=torch.Generator().manual_seed(0),
                          eos_token_id=tokenizer.end_of_text)
    consistent = 0
    for row in told.tolist():
        text = tokenizer.decode(row).replace("<|pad|>", "")     # it pads a short prompt, and what comes after the end
        consistent += is_consistent(text.removesuffix("<|endoftext|>"))
    return consistent / stories


def evaluate_ttc(model, tokenizer, name, eval_spec, seed=0, alternatives=True):
    """Test-time compute on one task: Markovian RSA beside what else as many tokens buy, as an entry of report.json.

    Shares of held-out problems that are right, with 95 % intervals over them, for Delethink and full RSA of a few of
    them.  rounds: by method, the population's after each round, or a vote's; tokens: what was generated until then, a
    problem.  Without `alternatives` only one sample and the vote stand beside it.
    """
    budget, difficulty = eval_spec.budget, eval_spec.tasks[name]
    N, C, T = budget.population, budget.subset, budget.rounds
    problems = held_out_problems([name], eval_spec.problems, (difficulty,))
    prompts = [problem.prompt for problem in problems]
    bar = functools.partial(tqdm, desc=f"test-time compute on {name}", leave=False, disable=None)
    source, plain, longest = Checkpoint(model, tokenizer), None, {}
    first = np.repeat(prompts, N).tolist()

    def generate(asked, max_new_tokens, seed):
        """All methods begin with the same samples, the first N of each problem."""
        if plain is not None and asked == first[:len(asked)]:
            return list(plain[:, :N].flat)[:len(asked)]
        return source(asked, max_new_tokens, seed, progress=bar)

    def sample(method, count, population, subset, rounds, tail):
        """-> the texts of all rounds for the first `count` problems, an array (rounds + 1, count, population)."""
        results = markovian_rsa(prompts[:count], generate, population, subset, rounds, budget.budget, tail, seed,
                                tokenizer)
        longest[method] = max(result.longest_prompt for result in results)
        return texts_by_round(results)

    # The vote spends on plain samples what T rounds cost: it looks at N of them, then at N more, …
    P, few = len(prompts), min(eval_spec.few, len(prompts))
    plain = sample("vote", P, N * (T + 1), 1, 0, 0)[0]          # (problems, N (T + 1))
    texts = {"vote": plain.reshape(-1, T + 1, N).swapaxes(0, 1)}
    curves = {"vote": [majority_rates(problems, plain[:, :N * (t + 1)]) for t in range(T + 1)]}
    rates = {"single": verify_replies(problems, plain).mean(1), "maj@equal_tokens": curves["vote"][T]}
    # Markovian RSA, and two special cases of it.
    texts["markovian_rsa"] = sample("markovian_rsa", P, N, C, T, budget.tail)
    if alternatives:
        texts["delethink"] = sample("delethink", few, N, 1, T, budget.tail)
        texts["full_rsa"] = sample("full_rsa", few, N, C, T, budget.budget)
    for method in list(texts)[1:]:
        curves[method] = [verify_replies(problems, replies).mean(1) for replies in texts[method]]
        rates[method] = curves[method][T]
    rates["markovian_rsa_majority"] = majority_rates(problems, texts["markovian_rsa"][T])

    row = {"task": name, "difficulty": difficulty, "problems": P, "few": few, "rounds": {}, "tokens": {}}
    for method, each in texts.items():
        spent = [sum(count_tokens(text, tokenizer) for text in replies.flat) for replies in each]
        row["tokens"][method] = (np.cumsum(spent) / each.shape[1]).tolist()
        row["rounds"][method] = np.mean(curves[method], 1).tolist()
    for key, each in rates.items():
        row[key] = float(each.mean())
        row[key + "_ci95"] = interval(each)
    return {**row, "generated_tokens": row["tokens"]["markovian_rsa"][T], "longest_prompt": longest}


def show_samples(model, tokenizer, sources, seed):
    """Print how the model goes on with a held-out sample of each source: a text, or the answer to a question."""
    for source in sources:
        size = source.size(held_out=True)
        if size == 0:
            continue
        ids, by_assistant = source.get(seed % size if size else seed, held_out=True)
        start = by_assistant.index(True) if source.is_traces and True in by_assistant else 24
        prompt = torch.tensor([ids[:start]], device=model.norm.weight.device)
        out = model.generate(prompt, 48, 0.8, generator=torch.Generator().manual_seed(seed))[0, prompt.shape[1]:]
        print(f"    {source.name} | {tokenizer.decode(ids[:start])[-100:]!r} -> {tokenizer.decode(out.tolist())!r}")


# ---- checkpoints and the log ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_folder(out):
    """Keep other runs out of a folder until this one ends, be it by kill -9: two would delete each other's files."""
    lock = FileLock(os.path.join(out, ".lock"), timeout=0) if is_main() else contextlib.nullcontext()
    try:
        with lock:
            yield
    except Timeout:
        raise SystemExit(f"{out} is taken: another run is at work in it; wait for its end, or take another "
                         "--out") from None


def write_text(path, text):
    """Write a temporary file and rename it: at any moment the old file is whole, or the new one."""
    with open(path + ".tmp", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)    # whole tensors, in the first process


def save_checkpoint(folder, model, tokenizer, state=None):
    """Write a checkpoint beside the old one, then swap them by rename: at any moment one of the two is whole."""
    weights = get_model_state_dict(model, options=WHOLE)        # every process takes part, the first one writes
    if is_main():
        shutil.rmtree(folder + ".new", ignore_errors=True)
        model.save_pretrained(folder + ".new", state_dict=weights)
        tokenizer.save_pretrained(folder + ".new")
        if state is not None:
            try:
                with open(os.path.join(folder + ".new", "trainer.pt"), "wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:                       # torch hides what the system said: the disk is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        if os.path.exists(folder):
            shutil.rmtree(folder + ".old", ignore_errors=True)
            os.rename(folder, folder + ".old")
        os.rename(folder + ".new", folder)
        shutil.rmtree(folder + ".old", ignore_errors=True)
    barrier()


def load_checkpoint(folder, device):
    """-> model, tokenizer, trainer state (None if it has none); None for a folder that is not there.

    Puts right what a kill between the renames of `save_checkpoint` left behind.  Raises SystemExit if it is damaged.
    """
    if is_main() and not os.path.exists(folder) and os.path.exists(folder + ".old"):
        os.rename(folder + ".old", folder)
    barrier()
    if not os.path.exists(folder):
        return None
    path, state = os.path.join(folder, "trainer.pt"), None
    try:
        model = fuse(Zaya.from_pretrained(folder, torch.float32, device))
        tokenizer = open_tokenizer(folder)
        if os.path.exists(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not {"step", "seconds", "settings", "parts"} <= state.keys():
                raise ValueError("no run of this program wrote trainer.pt")
    except Exception as error:                                  # damage has many kinds
        raise SystemExit(f"{folder} is damaged: {type(error).__name__} {' '.join(str(error).split())[:150]}") from None
    # The weights move out of the mapped file into aligned memory, else a resumed run may round differently.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, tokenizer, state


class Log:
    """log.csv, one row a step.  Opened at a step, it forgets the rows after it: a resumed run writes them again."""
    COLUMNS = ["stage", "step", "loss", "lr", "norm", "load", "entropy", "bias", "skip", "tokens_per_second", "seconds",
               "reward", "length", "no_end", "zero_groups", "staleness", "masked", "rehearsed", "flips", "kl",
               "kl_live"]

    def __init__(self, out, stage, step):
        path = os.path.join(out, "log.csv") if is_main() else os.devnull
        if is_main():
            text = io.StringIO()
            writer = csv.DictWriter(text, self.COLUMNS)
            writer.writeheader()
            for row in read_log(out):
                if (STAGES.index(row["stage"]), int(row["step"])) <= (STAGES.index(stage), step):
                    writer.writerow(row)
            write_text(path, text.getvalue())
        self.file = open(path, "a", encoding="utf-8", newline="")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)

    def add(self, **row):
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()


def read_log(out):
    """log.csv as dictionaries; a last row that a kill cut in half is left out."""
    path = os.path.join(out, "log.csv")
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values()]
        for row in rows:
            STAGES.index(row["stage"]), int(row["step"]), float(row["loss"]), float(row["reward"] or 0)
        if reader.fieldnames != Log.COLUMNS:
            raise ValueError("it has other columns")
    except (LookupError, TypeError, ValueError, csv.Error) as error:
        raise SystemExit(f"{path} is damaged: {error}; delete it, or put it right") from None
    return rows


# ---- many processes -------------------------------------------------------------------------------------------------
# torchrun --nproc_per_node N train.py …: the same run, whatever N is.  FSDP2 shards weights, gradients and optimizer
# states over the processes; each computes its own rows of every batch.  FSDP2 averages gradients, so a loss is divided
# by what *one* process has on average.  Sampling needs no gradients: each process samples its share of the prompts with
# a whole copy of the weights.  All processes need to see the same --out and --data.


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this is the process that writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def shard(items):
    """This process' part of a list, range or tensor: every N-th, so that what is sorted is shared out evenly."""
    return items[dist.get_rank()::world_size()] if world_size() > 1 else items


def all_gather(value):
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def unshard(part):
    """The parts of all processes in the old order: unshard(shard(items)) == items."""
    parts = all_gather(part)
    whole = [None] * sum(map(len, parts))
    for number, items in enumerate(parts):
        whole[number::len(parts)] = items
    return whole


def average(row):
    """A row of the log, each of its numbers averaged over the processes."""
    rows = all_gather(row)
    return {key: sum(other[key] for other in rows) / len(rows) for key in row}


def barrier():
    all_gather(None)


def shard_model(model, size=0):
    """Shard the weights of each layer, and of what is around the layers, over the processes (FSDP2), in place.

    size: how many processes share one copy, such as those of a node; between such groups weights are replicated and
    gradients averaged.  0: all processes share one.  Alone: nothing.  -> the model, whose parameters are now DTensors.
    """
    if world_size() == 1:
        return model
    device, size = model.norm.weight.device.type, size or world_size()
    mesh = dist.init_device_mesh(device, (world_size() // size, size), mesh_dim_names=("replicate", "shard"))
    # A layer's router state is a view, which FSDP2 warns about: an operation in place would lose its gradient.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "hidden_states")
    return model


def shard_rows(batch):
    """This process' rows of input_ids, targets, position_ids (rows, S).  Rows of padding are added until all processes
    have equally many, since FSDP2 wants every process to take part in every forward pass."""
    missing = -len(batch[0]) % world_size()
    rows = []
    for part, padding in zip(batch, (0, -100, -1)):
        rows.append(shard(F.pad(part, (0, 0, 0, missing), value=padding)))
    return rows


@contextlib.contextmanager
def process_group():
    """Initialise torch.distributed under torchrun; a no-op otherwise.  Only the first process prints, but whichever
    stops first says why."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, number, processes = next(dist.rendezvous("env://"))
    ended = "stopped, because another process of this run ended (torchrun says which); the same command goes on from " \
        "the last checkpoint"

    def stop(message):
        if store.add("stopped", 1) == 1:
            print(message, file=sys.__stderr__, flush=True)
        os._exit(1)                                             # without waiting for those that are no more

    signal.signal(signal.SIGTERM, lambda *_: stop(ended))       # torchrun's, when another process has ended
    if number:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # The first process may tokenise a file for long while the others wait.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=number,
                            world_size=processes, timeout=datetime.timedelta(hours=4))
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, str):
            stop(error.code)
        raise
    except BaseException as error:
        lost = re.search("gloo|NCCL", str(error))               # the other end of a connection is gone
        stop(ended if lost else traceback.format_exc())
    dist.destroy_process_group()


# ---- a run ----------------------------------------------------------------------------------------------------------


def keep_freed_memory():
    """Keep what is freed for the next operation, where the C library is glibc: it would give large blocks back to the
    system, and a training step spent a tenth of its time on getting them again."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)                                 # M_MMAP_THRESHOLD: no block has a mapping of its own
        libc.mallopt(-1, 2**31 - 1)                             # M_TRIM_THRESHOLD: the heap does not shrink


def choose_device(config):
    """-> device, dtype.  Raises SystemExit for what this machine does not have."""
    check_choice("--dtype", config.dtype, ["auto", "float32", "bfloat16"])
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device, dtype = config.device, config.dtype
    if device == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise SystemExit(f"--device {device}: this PyTorch sees no such GPU; use --device cpu, or another build")
    if config.shard and world_size() % config.shard:
        raise SystemExit(f"--shard {config.shard}: the {world_size()} processes are no multiple of it")
    if dtype == "auto":                                         # bfloat16 where it is known to be faster
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
    return device, getattr(torch, dtype)


def make_tokenizer(config, vocab_size):
    """A new run's tokenizer, trained on the data (digits stay single).  Every checkpoint keeps it."""
    texts = []
    for path in config.data:                                    # a beginning is enough: 4 MB, or a thousand rows
        if file_kind(path) == "txt":
            begun = list(itertools.islice(read_text(path), 4))
        else:
            talks = itertools.islice(read_jsonl(path, config.skip_bad_lines), 1000)
            begun = [message["content"] for messages in talks for message in messages]
        if not "".join(begun).strip():
            raise SystemExit(f"{path} has no text")
        texts += begun
    if not config.data:
        for own in own_texts(min(2_000_000, PRESETS[config.preset]["text_bytes"])).values():
            texts += own
    bar = functools.partial(tqdm, desc="learning tokens", leave=False, disable=None)
    try:
        return Tokenizer.train("\n".join(texts), vocab_size or ZayaConfig.preset(config.preset).vocab_size, bar)
    except ValueError as error:
        raise SystemExit(f"--vocab-size: {error}") from None


def new_model(config, shape, tokenizer):
    """The preset's model with the command line's shape and random weights."""
    shape = {**shape, "vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad,
             "bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end}
    try:
        model_config = ZayaConfig.preset(config.preset, **shape)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    # The seed decides the weights, whatever was drawn before.
    torch.manual_seed(config.seed)
    return fuse(Zaya(model_config))


def initial_model(config, shape, device):
    """--init's checkpoint, its tokenizer with it -> model, tokenizer.  Raises SystemExit if they cannot be had."""
    if shape:
        raise SystemExit(f"--init {config.init} brings its own shape: leave out {flag(min(shape))}")
    with explained(f"--init {config.init}", Exception):         # damage has many kinds
        tokenizer = open_tokenizer(config.init, chat=True)
        model = fuse(Zaya.from_pretrained(config.init, torch.float32, device))
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.end, tokenizer.pad
    if model.config.vocab_size < tokenizer.vocab_size:
        raise SystemExit(f"--init {config.init}: its tokenizer has {tokenizer.vocab_size} tokens, and its model knows "
                         f"{model.config.vocab_size}")
    for parameter in model.parameters():                        # out of the mapped file
        parameter.data = parameter.data.clone()
    return model, tokenizer


def check_same_run(folder, name, model, state, config, shape):
    """A run goes on only with the settings and the shape that it began with; which one differs is said."""
    if state is None:
        raise SystemExit(f"{folder} has no trainer.pt to go on from: put it back, or delete {folder}")
    # The model's config knows the whole shape, of which the command line names what it wants to be different.
    then = {**vars(model.config), **state["settings"]}
    for setting, now in {**settings(config), **shape}.items():
        before = then.get(setting)
        if isinstance(now, dict) and isinstance(before, dict):  # one value a stage: only this stage's counts
            before, now = before.get(name), now[name]
        if before != now:
            raise SystemExit(f"{folder} was made with {setting}={before}, and now it is {now}. Go on with the old "
                             f"value, take another --out, or delete {folder}")


def open_stage(name, before, config, shape, device):
    """Where a stage goes on: its own checkpoint if it was begun, else the end of the stage before, else new weights
    -> model, tokenizer, trainer state (None: not begun)."""
    for origin in filter(None, (name, before)):
        folder = os.path.join(config.out, origin)
        found = load_checkpoint(folder, device)
        if found:
            model, tokenizer, state = found
            check_same_run(folder, origin, model, state, config, shape)
            if origin == name:
                return found
            if state["done"]:
                return model, tokenizer, None
            raise SystemExit(f"{name} goes on from the end of {before}, which is not done: run --stages {before} first")
    if config.init:
        return *initial_model(config, shape, device), None
    if name == STAGES[0]:
        tokenizer = make_tokenizer(config, shape.get("vocab_size"))
        return new_model(config, shape, tokenizer).to(device), tokenizer, None
    raise SystemExit(f"{name} goes on from the end of {before}, which {config.out} does not have: run --stages "
                     f"{before} first, or name a checkpoint with --init")


def finish_stage(name, before, config, shape, report, device, dtype):
    """Train one stage to its end from wherever it stands, and measure it once."""
    model, tokenizer, state = open_stage(name, before, config, shape, device)
    counts = model.parameter_counts()
    report["params"] = {"total": counts["total"], "active": counts["active"]}
    if not (state and state["done"]):
        print(f"{name}: {counts['total']:,} parameters, {counts['active']:,} active per token (without the embedding), "
              f"vocabulary {tokenizer.vocab_size}")
        for later in STAGES[STAGES.index(name) + 1:]:
            if os.path.exists(os.path.join(config.out, later)):
                raise SystemExit(f"{name} is still to be trained, but {os.path.join(config.out, later)} was made from "
                                 "another one: delete it, or take another --out")
        # What an older run in this folder measured was measured on other weights.
        report["stages"].pop(name, None)
        report["seconds"].pop("evaluate", None)
        report["ttc"].clear()
        stage = stage_settings(config, name)
        train = rl_stage if isinstance(stage, RLStage) else supervised_stage
        state = train(name, config, stage, model, tokenizer, state, device, dtype)
        if world_size() > 1:                                    # it was sharded: whole again, to sample from
            model, tokenizer, _ = load_checkpoint(os.path.join(config.out, name), device)
    # A checkpoint is on disk before anything is measured; a run killed in between is measured when it goes on.
    if name in report["stages"]:
        print(f"{name}: done before")
        return
    result = pass_at_1(model, tokenizer, task_names(config.tasks), config.eval_problems, config.eval_samples)
    if result["problems"] and name in STAGES[2:]:
        eval_spec = PRESETS[config.preset]["evaluate"]
        result["reads"] = reading_rates(model, tokenizer, task_names(config.tasks), eval_spec)
    if not config.data:
        result["stories"] = story_rate(model, tokenizer)
    report["stages"][name] = {**result, **state["measured"]}
    report["seconds"][name] = state["seconds"]
    write_report(config.out, report)
    line, measured = f"{name}: {state['seconds']:.0f} s", state["measured"]
    if "loss" in measured:
        line += " | held-out loss " + ", ".join(f"{source} {loss:.2f}" for source, loss in measured["loss"].items())
    if "end" in measured:
        line += " | difficulty " + ", ".join(f"{task} {measured['start'][task]} -> {d}"
                                             for task, d in measured["end"].items())
    if "stories" in result:
        line += " | consistent stories {stories:.0%}".format(**result)
    line += " | pass@1 {pass@1:.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}] on {problems} held-out problems".format(**result)
    print(line)
    if result.get("reads"):
        rates = [f"{task} " + " ".join(f"{rate:.2f}" for rate in each) for task, each in result["reads"].items()]
        print(f"{name}: right after 0, 1, … rounds of Markovian RSA: " + ", ".join(rates))


def run_evaluation(config, report, tasks, device):
    """Test-time compute after SFT and of the finished model on each of `tasks` -> report["ttc"]; what is there already
    stays."""
    eval_spec = PRESETS[config.preset]["evaluate"]
    if not report["stages"]:
        raise SystemExit(f"evaluate needs the report.json of a run in {config.out}: run the other stages first")
    for after in ("sft", "final"):
        found = load_checkpoint(os.path.join(config.out, after), device)
        if not found and after == "final":
            raise SystemExit(f"evaluate needs {config.out}/final: run the other stages first")
        done = [(row["after"], row["task"]) for row in report["ttc"]]
        # Of the model after SFT two tasks tell enough.
        asked = tasks if after == "final" else tasks[:2]
        todo = [name for name in asked if found and (after, name) not in done]
        # As many tasks at a time as there are processes.
        for start in range(0, len(todo), world_size()):
            begun, rows = time.perf_counter(), []
            for name in shard(todo[start:start + world_size()]):
                row = evaluate_ttc(*found[:2], name, eval_spec, config.seed, alternatives=after == "final")
                rows.append({"after": after, **row})
            rows = unshard(rows)
            report["ttc"] += rows
            report["seconds"]["evaluate"] = report["seconds"].get("evaluate", 0.0) + time.perf_counter() - begun
            write_report(config.out, report)
            for row in rows:
                print(f"evaluate: {ttc_line(row)}")


def read_report(config):
    """report.json of this run so far.  Raises SystemExit if another run or no run of this program wrote it."""
    path = os.path.join(config.out, "report.json")
    if not os.path.exists(path):
        return {"preset": config.preset, "seed": config.seed, "seconds": {}, "params": {}, "stages": {}, "ttc": []}
    try:
        report = read_json(path)
        report_table(report)                                    # a report of this program can be shown
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} is damaged, or no report of this program ({error}): put it back, or delete it, then "
                         "finished stages are measured again") from None
    if (report["preset"], report["seed"]) != (config.preset, config.seed):
        raise SystemExit(f"{config.out} was made with --preset {report['preset']} --seed {report['seed']}: say so "
                         "again, or take another --out")
    return report


METHODS = {"single": "one sample", "maj@equal_tokens": "majority of equal tokens", "delethink": "Delethink",
           "full_rsa": "full RSA", "markovian_rsa": "Markovian RSA"}


def ttc_line(row):
    line = "after {after}: {task}, difficulty {difficulty}, {problems} problems:".format(**row)
    for method, name in METHODS.items():
        if method in row:
            line += " {} {:.2f} [{:.2f}, {:.2f}],".format(name, row[method], *row[method + "_ci95"])
    return line.rstrip(",")


def report_table(report):
    """report.md: held-out pass@1 at temperature 1, a line a stage; then test-time compute, a line a task."""
    text = "# {preset}, seed {seed}: {params[total]:,} parameters, {params[active]:,} active per token".format(**report)
    text += "\n\n| after | held-out pass@1 | 95 % interval | by task |\n|---|---|---|---|\n"
    for name in sorted(report["stages"], key=STAGES.index):
        result = report["stages"][name]
        tasks = ", ".join(f"{task} {rate:.2f}" for task, rate in result["tasks"].items())
        text += "| {} | {pass@1:.3f} | {ci95[0]:.3f}-{ci95[1]:.3f} | {} |\n".format(name, tasks, **result)
    for row in report["ttc"]:
        text += f"\n{ttc_line(row)}\n"
    return text


def write_report(out, report):
    """report.json for programs; report.md, report.png and loss.png for people."""
    if not is_main():
        return
    write_json(os.path.join(out, "report.json"), report)
    write_text(os.path.join(out, "report.md"), report_table(report))
    solved, losses = collections.defaultdict(dict), collections.defaultdict(dict)
    for stage in sorted(report["stages"], key=STAGES.index):
        for task, rate in report["stages"][stage]["tasks"].items():
            solved[task][stage] = rate
    for number, row in enumerate(read_log(out), 1):
        if row["stage"] in STAGES[:3]:
            losses[row["stage"]][number] = float(row["loss"])
    draw_curves(os.path.join(out, "report.png"), solved, "What each stage solves", "after", "held-out pass@1")
    draw_curves(os.path.join(out, "loss.png"), losses, "What each stage learns", "step", "loss (nats a token)")


def draw_curves(path, curves, title, xlabel, ylabel):
    """A picture of {label: {x: y}}."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    axis.set_prop_cycle(color=colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2])
    for label, points in curves.items():
        axis.plot(list(points), list(points.values()), ".-", linewidth=1, markersize=4, label=label)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if curves:
        figure.legend(loc="outside right center")
    figure.savefig(path + ".tmp", format="png", dpi=110)
    os.replace(path + ".tmp", path)


@explained("stopped", (OSError, SafetensorError))               # what the system refuses ends in one sentence
def main(arguments=None):
    """The command line: the stages that were asked for, one after the other, a report after each, then evaluation."""
    begun = time.perf_counter()
    keep_freed_memory()
    config, shape = parse_arguments(arguments)
    for path in config.data:
        if file_kind(path) is None:
            raise SystemExit(f"--data {path}: .txt and .jsonl files are read, .json too, each also as .gz; rename or "
                             "convert it")
    device, dtype = choose_device(config)
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    print(f"device {device}, {dtype}, {torch.get_num_threads()} threads{processes}")
    print("settings: " + ", ".join(f"{name}={value}" for name, value in vars(config).items()))
    asked, tasks = config.stages.split(","), []
    stages = [name for name in STAGES if getattr(stage_settings(config, name), "tasks", True)]
    for name in set(asked) - {*stages, "evaluate"}:
        print(f"{name} is left out: --tasks {config.tasks} has nothing for it")
    if "evaluate" in asked:
        tasks = [task for task in PRESETS[config.preset]["evaluate"].tasks if task in task_names(config.tasks)]
    if not (tasks or set(asked) & set(stages)):
        raise SystemExit(f"--stages {config.stages} with --tasks {config.tasks} leaves nothing to run")
    os.makedirs(config.out, exist_ok=True)
    with lock_folder(config.out):
        report = read_report(config)
        for before, name in zip([None, *stages], stages):
            if name in asked:
                finish_stage(name, before, config, shape, report, device, dtype)
        if tasks:
            run_evaluation(config, report, tasks, device)
    print("\n" + report_table(report))
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes in all; {config.out} holds final/ (the checkpoint), "
          "report.md, report.png, report.json, loss.png, log.csv", flush=True)


# ---- appendix: stories ----------------------------------------------------------------------------------------------

# Name, he or she, his or her, him or her.
PEOPLE = [("Mia", "she", "her", "her"), ("Anna", "she", "her", "her"), ("Rosa", "she", "her", "her"),
          ("Lily", "she", "her", "her"), ("Tom", "he", "his", "him"), ("Ben", "he", "his", "him"),
          ("Max", "he", "his", "him"), ("Sam", "he", "his", "him")]
HOMES = ["near the sea", "in a little town", "on a farm", "by the forest", "in a house of stone"]
COLORS = ["red", "blue", "green", "yellow", "white", "old", "small", "big"]
THINGS = ["ball", "kite", "hat", "book", "cup", "doll", "drum", "bell", "boat", "shoe"]
# Where a thing may be, the tool that gets it from there, and how.
PLACES = [("high up in a tree", "ladder", "climbed up"), ("at the bottom of the pond", "net", "reached down"),
          ("behind a locked door", "key", "opened the door"), ("in a dark cave", "lamp", "went in"),
          ("on the roof", "rope", "pulled hard"), ("under the thick snow", "spade", "dug for a long time")]
LOSSES = ["One day {he} lost {his} {color} {thing}.", "{He} had {a} {color} {thing}, but one morning it was gone.",
          "What {he} liked best was {his} {color} {thing}. But one windy day it was gone."]
SEARCHES = ["{He} looked under the bed and in the garden, but it was not there.",
            "{He} asked everyone, but no one had seen it.", "{He} was sad and looked for it all day."]
FINDS = ["Then {he} saw it {place}.", "At last {he} found it {place}.", "In the evening {he} saw it {place}."]
TROUBLES = ["{He} could not get it alone.", "But it was too hard for {him}.", "{He} did not know what to do."]
HELPS = ['"Can you help me?" {he} asked {friend}. "Yes," said {friend}, "I have a {tool}."',
         "Then {friend} came by with a {tool}.",
         '{He} called {friend}. "Wait," said {friend}, "I will bring a {tool}."']
RESCUES = ["With the {tool} they {action} and got the {thing}.",
           "They took the {tool} and {action}, and soon {he} had the {thing} again."]
ENDINGS = ["They played until the sun went down.", "{He} was so happy that {he} laughed.",
           "From that day on they were friends.", '"Thank you!" {he} said. "Now we can play with it."']


def tell_story(rng):
    """Somebody loses something and gets it back with a friend's help."""
    (name, he, his, him), (friend, *_) = rng.sample(PEOPLE, 2)
    place, tool, action = rng.choice(PLACES)
    color = rng.choice(COLORS)
    words = dict(he=he, He=he.capitalize(), his=his, him=him, friend=friend, place=place, tool=tool, action=action,
                 a="an" if color == "old" else "a", color=color, thing=rng.choice(THINGS))
    parts = [f"{name} lived {rng.choice(HOMES)}."]
    for sentences in (LOSSES, SEARCHES, FINDS, TROUBLES, HELPS, RESCUES, ENDINGS):
        parts.append(rng.choice(sentences).format(**words))
    return " ".join(parts)


def is_consistent(story):
    """Whether a story has one hero with fitting pronouns, one friend, one lost thing, and one tool that fits the place
    and comes to use.

    >>> story = tell_story(random.Random(0))                    # Max had a red cup …
    >>> [is_consistent(text) for text in (story, story.replace("the cup", "the hat"), story.replace("He", "She"))]
    [True, False, False]
    """
    words = re.findall(r"\w+", story)
    heroes = [person for person in PEOPLE if words[:2] == [person[0], "lived"]]
    if not heroes:
        return False
    pronouns = set(re.findall(r"\b(?:he|she|his|her|him)\b", story.lower()))
    names = {person[0] for person in PEOPLE} & set(words)
    lost = set(THINGS) & set(words)
    tools = [(place in story, words.count(tool)) for place, tool, _ in PLACES]
    return (pronouns <= set(heroes[0][1:]) and len(names) == 2 and len(lost) == 1
            and sorted(tools) == [(False, 0)] * (len(PLACES) - 1) + [(True, 2)]
            and any(story.endswith(ending.rsplit(" ", 1)[1]) for ending in ENDINGS))


# ---- appendix: the tasks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What the user asks, and the data that checks an answer (JSON only: a verifier keeps no state)."""
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
    which each step goes wrong with that probability; and `verify_answer(data, answer)` -> bool for any string, unless
    the teacher's answer is the only right one.
    """
    exact = True                            # the teacher always finds the answer; otherwise it searches and may fail
    levels = (1, 2, 3)                      # the fixed difficulties of evaluation and RL, where SFT leaves room above
    hardest = 30                            # difficulties end here
    reads = False                           # aggregate(problem, replies, seed) builds on the replies that it is shown

    def __init__(self, name):
        self.name = name

    def make(self, seed, d):
        """The same seed and difficulty (an integer from 1) give the same problem."""
        prompt, data = self.generate(random.Random(f"{self.name} {seed} {d}"), max(1, d))
        return Problem(self.name, d, prompt, data)

    def verify_answer(self, data, answer):
        return answer == self.solution(data, None, 0.0)[1]

    def verify(self, problem, text):
        """(reward, format), 0 or 1 each, for any text."""
        answer = split_answer(text)
        if answer is None or len(answer) > 1000:
            return 0, 0
        return int(self.verify_answer(problem.data, answer)), 1

    def reward(self, problem, text):
        """What reinforcement learning pays: 1 for a right answer.  A task that reads pays for what the next round lives
        on: its reasoning must also end in the answer, or the tail would carry nothing."""
        return float(self.verify(problem, text)[0] and (not self.reads or ends_in_answer(text)))

    def solve(self, problem, seed=0):
        """A worked reply by the teacher: <think>…</think>answer."""
        reasoning, answer = self.solution(problem.data, random.Random(f"solve {seed}"), 0.0)
        return f"<think>{reasoning}</think>{answer}"

    def corrupt(self, problem, seed=0):
        """A plausible reply with a wrong answer: the teacher makes more and more errors until one spoils it.  If none
        does, we take the teacher's reply to another problem."""
        rng = random.Random(f"corrupt {seed}")
        error_rate, answer, data = 0.0, None, problem.data
        while answer is None or self.verify_answer(problem.data, answer):
            if error_rate > 3.05:                               # after 31 attempts
                data = draw(self, rng.getrandbits(48), problem.difficulty, held_out=False).data
            error_rate += 0.1
            reasoning, answer = self.solution(data, rng, error_rate)
        return f"<think>{reasoning}</think>{answer}"

    def good_rollout(self, problem, seed=0):
        """A reply that helps whoever reads it in an aggregation prompt."""
        return self.solve(problem, seed)

    def aggregate(self, problem, replies, seed=0):
        """The teacher's reply to an aggregation prompt.  One that always finds the answer needs nobody's tails."""
        return self.solve(problem, seed)


class Search(Task):
    """A task whose teacher guesses and checks: guess(data, rng) -> answer, and trial(data, answer, rng, error_rate) ->
    (its text, whether the answer seems to work).  "#y" or "#n" before the answer says how the last trial went.

    The teacher often gives up after a failed trial.  So imitating it is capped, and only reward can teach a model to
    guess better and to go on.  An answer that is_valid(data, answer) is right if a trial without errors works.
    """
    exact = False
    gives_up, most = 0.6, 8

    def verify_answer(self, data, answer):
        return self.is_valid(data, answer) and self.trial(data, answer, random.Random(0), 0.0)[1]

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
        right = [reply for reply in replies if self.verify(problem, reply)[0]]
        if not right:
            return self.solve(problem, seed)
        rng = random.Random(f"aggregate {seed}")
        answer = split_answer(rng.choice(right))
        text, _ = self.trial(problem.data, answer, rng, 0.0)
        return f"<think>{text}#y{answer}</think>{answer}"


def ends_in_answer(text):
    """Whether the reasoning ends in the answer, "#y" or "#n" or "#" before it: the form that tails are read in."""
    reasoning, answer = text.partition("</think>")[0], split_answer(text)
    return bool(answer) and re.search("#[yn]?" + re.escape(answer) + r"\Z", reasoning) is not None


def with_error(value, rng, error_rate):
    """`value`, or with probability `error_rate` a number with another last digit."""
    if not error_rate or rng.random() >= error_rate:
        return value
    return value - value % 10 + (value + rng.randrange(1, 10)) % 10


def labels(rng, count):
    """Letters that follow each other in the alphabet, from a random one on."""
    letters = 2 * "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    start = rng.randrange(52)
    return letters[start:start + count]


class ColumnSums(Task):
    """The last digit of each column's sum; d columns.  One right answer, made of independent steps.

    sum 75c,39d -> <think>c:7+5=2d:3+9=2#c2d2</think>c2d2
    A value stands right behind its label only at the end, where a reader of the tail finds it.
    """
    reads, levels = True, (6, 7, 8)

    def generate(self, rng, d):
        columns, said = [], []
        for label in labels(rng, d):
            columns.append([rng.randrange(10), rng.randrange(10), label])
            said.append("{}{}{}".format(*columns[-1]))
        return "sum " + ",".join(said), {"columns": columns}

    def solution(self, data, rng, error_rate):
        steps, answer = "", ""
        for a, b, label in data["columns"]:
            total = with_error((a + b) % 10, rng, error_rate)
            steps += f"{label}:{a}+{b}={total}"
            answer += f"{label}{total}"
        return f"{steps}#{answer}", answer


class Add(Task):
    """Addition of two numbers with d + 1 digits together, with carries.  An error spoils only what follows it.

    47+85 -> <think>7+5+0=12,4+8+1=13</think>132                (digit + digit + carry = carry and digit)
    """
    levels = (2, 3, 5)

    def generate(self, rng, d):
        a, b = (rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
                for digits in (d // 2 + 1, (d + 1) // 2))
        return f"{a}+{b}", {"a": a, "b": b}

    def solution(self, data, rng, error_rate):
        a, b = data["a"], data["b"]
        steps, carry, answer = [], 0, ""
        for place in range(len(str(max(a, b)))):
            x, y = a // 10**place % 10, b // 10**place % 10
            value = with_error(x + y + carry, rng, error_rate)
            steps.append(f"{x}+{y}+{carry}={value:02}")
            carry = value // 10
            answer = f"{value % 10}{answer}"
        return ",".join(steps), str(int(f"{carry}{answer}"))


class Sort(Task):
    """Sort 2 + d // 2 digits by selection: the smallest one, then what is left.  At even d no digit comes twice.

    sort 3917 -> <think>1:397,3:97,7:9,9:</think>1379
    """
    levels, hardest = (6, 8, 10), 16

    def generate(self, rng, d):
        digits = "11"
        while len(set(digits)) == 1:
            digits = "".join(rng.choices("0123456789", k=2 + d // 2) if d % 2 else rng.sample("0123456789", 2 + d // 2))
        return f"sort {digits}", {"digits": digits}

    def solution(self, data, rng, error_rate):
        left, steps, answer = data["digits"], [], ""
        while left:
            pick = min(left)
            if error_rate and rng.random() < error_rate:
                pick = rng.choice(left)
            left = left.replace(pick, "", 1)
            answer += pick
            steps.append(f"{pick}:{left}")
        return ",".join(steps), answer


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
DIGITS = {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "5": 5, "6": 6, "7": 7, "8": 8, "9": 9}


def run_expression(text, registers, rng=None, error_rate=0.0):
    """The values an expression goes through, left to right, all mod 10: the language of every program here.

        expression := operand (operator operand)*      operand := digit | register      operator := + - *

    `registers` {letter: 0 … 9}.  None for any other text, or more than 100 characters.  Nothing else can happen: the
    work is linear in the text and numbers stay below 10.

    >>> run_expression("x*2+3", {"x": 4}), run_expression("y+1", {"x": 4}), run_expression("__import__('os')", {})
    ([8, 1], None, None)
    """
    known = {**DIGITS, **registers}
    if len(text) > 100 or len(text) % 2 == 0:
        return None
    if not (set(text[::2]) <= known.keys() and set(text[1::2]) <= OPERATORS.keys()):
        return None
    value, values = known[text[0]], []
    for sign, operand in zip(text[1::2], text[2::2]):
        value = with_error(OPERATORS[sign](value, known[operand]) % 10, rng, error_rate)
        values.append(value)
    return values or [value]


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
    """Output prediction: what a program of 2 + d // 2 lines, on more registers at odd d, leaves in them.

    run a=3;b=7;a=b*2 -> <think>a=3>a3;b=7>a3b7;a=b*2>a4b7</think>a4b7
    """
    levels = (3, 4, 5)

    def generate(self, rng, d):
        names, lines = "abcde"[:1 + d % 2 + d // 4], []
        for _ in range(2 + d // 2):
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


class Program(Task):
    """Write a program (the standard form of code tasks): for a formula with 1 + d // 2 operations, checked on ten
    inputs.  At even d each operation has its digit on the right.

    code (3-(x+4)) -> <think>6:0,3</think>a=x+4;a=3-a           (a try: on input 6, a is 0, then 3)
    """
    levels = (4, 5, 6)

    def generate(self, rng, d):
        outputs = {0}
        while len(outputs) == 1:                                # a constant would be no lesson
            formula, lines, inner = "x", [], "x"
            for _ in range(1 + d // 2):
                other, operator = rng.choice("x123456789"), rng.choice("+-*")
                if d % 2 and rng.random() < 0.5:
                    formula, line = f"({other}{operator}{formula})", f"a={other}{operator}{inner}"
                else:
                    formula, line = f"({formula}{operator}{other})", f"a={inner}{operator}{other}"
                lines.append(line)
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
    A trial stops at the first example that does not hold.
    """
    reads, levels = True, (1, 2)

    def generate(self, rng, d):
        count, examples = (d + 1) // 2, []
        hidden = self.guess({"count": count}, rng)
        for x in rng.sample(range(10), min(d + 1, 8)):
            examples.append([x, run_expression(hidden, {"x": x})[-1]])
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

    def is_valid(self, data, answer):
        return run_expression(answer, {"x": 0}) is not None


class Falsify(Search):
    """Find an input on which a wrong program fails: it is right but for a branch, (d + 1) // 2 operations, and at odd d
    many inputs take the branch.  Many valid answers.

    break x*2+3,x>6?x*2-1 -> <think>3n;8y:8*2=6,6+3=9/8*2=6,6-1=5#y8</think>8
    A trial asks whether the input takes the branch, and if so works out both programs.
    """
    hardest = 24

    def generate(self, rng, d):
        while True:
            right, other = [random_chain(rng, (d + 1) // 2, "+-*", 9) for _ in range(2)]
            above, count = rng.random() < 0.5, rng.randrange(4, 7) if d % 2 else rng.randrange(1, 4)
            branch = f"x>{9 - count}" if above else f"x<{count}"
            data = {"right": right, "other": other, "branch": branch}
            if any(self.verify_answer(data, x) for x in DIGITS):
                return f"break {right},{branch}?{other}", data

    def guess(self, data, rng):
        return str(rng.randrange(10))

    def trial(self, data, answer, rng, error_rate):
        _, sign, bound = data["branch"]                         # digits compare as their numbers do
        taken = answer > bound if sign == ">" else answer < bound
        misjudged = rng.random() < error_rate
        if taken == misjudged:
            return f"{answer}n", False
        steps, value = worked(data["right"], int(answer), rng, error_rate)
        more, other = worked(data["other"], int(answer), rng, error_rate)
        return f"{answer}y:{steps}/{more}", value != other

    def is_valid(self, data, answer):
        return answer in DIGITS


class Find(Task):
    """Predict an input: for each of d columns (a, t) find a digit x with (a + x) mod 10 < t.  Many valid answers.

    find 06b,85c -> <think>b:0+5=5<65;c:8+0=8<5.#b5c.</think>b5c.      (after t, the guess if it holds or a dot)
    The teacher guesses once per column and checks honestly.  A dot says that it did not solve a column.
    """
    exact, reads, levels = False, True, (3, 4, 5)
    operators, signs, asked = "+", "<", "{a}{t}{label}"

    def generate(self, rng, d):
        columns, said = [], []
        for label in labels(rng, d):
            valid = []
            while not 4 <= len(valid) <= 8:                     # so many of the ten digits hold
                column = dict(a=rng.randrange(10), sign=rng.choice(self.operators), than=rng.choice(self.signs),
                              t=rng.randrange(1, 10), label=label)
                valid = [x for x in range(10) if self.holds(column, self.value(column, x))]
            columns.append(column)
            said.append(self.asked.format(**column))
        return f"{self.name} " + ",".join(said), {"columns": columns}

    @staticmethod
    def value(column, x):
        return OPERATORS[column["sign"]](column["a"], x) % 10

    @staticmethod
    def holds(column, value):
        return value < column["t"] if column["than"] == "<" else value > column["t"]

    def solution(self, data, rng, error_rate, candidates=None):
        """`candidates` {label: digits}: guess among these where there are any."""
        candidates, steps, answer = candidates or {}, [], ""
        for column in data["columns"]:
            x = rng.choice(candidates.get(column["label"]) or range(10))
            value = with_error(self.value(column, x), rng, error_rate)
            kept = str(x) if self.holds(column, value) else "."
            steps.append("{label}:{a}{sign}{x}={value}{than}{t}{kept}".format(**column, x=x, value=value, kept=kept))
            answer += column["label"] + kept
        return f"{';'.join(steps)}#{answer}", answer

    def count_fields(self, data, answer):
        """-> how many columns of an answer are right, and how many wrong; a dot is neither.  All are wrong if it is
        none, such as one with other labels."""
        columns, right, wrong = data["columns"], 0, 0
        if len(answer) != 2 * len(columns) or answer[::2] != "".join(column["label"] for column in columns):
            return 0, len(columns)
        for column, x in zip(columns, answer[1::2]):
            if x in DIGITS and self.holds(column, self.value(column, int(x))):
                right += 1
            elif x != ".":
                wrong += 1
        return right, wrong

    def verify_answer(self, data, answer):
        return self.count_fields(data, answer) == (len(data["columns"]), 0)

    def reward(self, problem, text):
        """Right fields less wrong ones: an honest dot costs nothing, as the next round can fill it in."""
        if not ends_in_answer(text):
            return 0.0
        right, wrong = self.count_fields(problem.data, split_answer(text))
        return max(0, right - wrong) / len(problem.data["columns"])

    def aggregate(self, problem, replies, seed=0):
        """For each column take a valid value that one of the replies has, else guess; check each anew."""
        answers = "|".join(split_answer(text) or "" for text in replies)
        valid = {}
        for column in problem.data["columns"]:
            found = map(int, re.findall(column["label"] + "([0-9])", answers))
            valid[column["label"]] = [x for x in found if self.holds(column, self.value(column, x))]
        reasoning, answer = self.solution(problem.data, random.Random(f"aggregate {seed}"), 0.0, valid)
        return f"<think>{reasoning}</think>{answer}"


class Pass(Find):
    """Find inputs under which tests pass: for each of d tests (op, a, < or >, t) a digit x with (a op x) mod 10 < t, or
    > t.  Many valid answers.

    pass 7*<4b,3->5c -> <think>b:7*2=4<4.;c:3-5=8>55#b.c5</think>b.c5
    """
    operators, signs, asked = "+-*", "<>", "{a}{sign}{than}{t}{label}"


WARM = ["dear", "kind", "love", "happy", "thanks", "please"]
WORDS = WARM + ["red", "sun", "map", "tree", "cold", "fish", "book", "rain", "stone", "lamp", "gray", "door", "milk",
                "north", "quick", "glass", "bird", "old"]


class Constraints(Task):
    """Follow instructions: a reply of different words that obeys up to d + 1 rules (from d = 4 on, longer ones).

    write 3 words,no e,begins s,ends ! -> <think>1sun 2bird 3map</think>sun bird map!        (or has WORD)
    The verifier is the binary gate of the behavioral stage; what people like beyond it, `warmth` counts.
    """

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
    def fitting(rules, first=True, but=()):
        """The words that may stand at a place, without those that stand before it."""
        words, begins = [], rules.get("begins", "") if first else ""
        for word in WORDS:
            if word.startswith(begins) and rules.get("no", "#") not in word and word not in but:
                words.append(word)
        return words

    def solution(self, data, rng, error_rate):
        rules = data["rules"]
        count, words = rules["count"], []
        if rng.random() < error_rate:
            count += rng.choice((-1, 1))
        for i in range(count):
            forgets = rng.random() < error_rate
            words.append(rng.choice(WORDS if forgets else self.fitting(rules, i == 0, words)))
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

    The difficulty is the level of the dataset's curriculum, where it has one; a score of 0.99 or more is right.  The
    teacher knows no reasoning, and nothing bounds the time of these verifiers.
    """

    def __init__(self, name):
        super().__init__(name)
        try:
            import reasoning_gym.factory
        except ImportError:
            raise SystemExit(f"--tasks {name} needs reasoning-gym: pip install reasoning-gym") from None
        self.factory, self.dataset = reasoning_gym.factory, name.removeprefix("reasoning_gym:")
        check_choice("--tasks reasoning_gym:", self.dataset, self.factory.DATASETS)

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
        return self.entry(**data)[1]["question"].strip(), data

    def solution(self, data, rng, error_rate):
        seed = rng.getrandbits(31) if rng.random() < error_rate else data["seed"]
        return "", self.entry(seed, data["level"])[1]["answer"]

    def verify_answer(self, data, answer):
        dataset, entry = self.entry(**data)
        try:
            return dataset.score_answer(answer, entry) >= 0.99
        except Exception:                                       # it did not expect this text
            return False


TASKS = {task.name: task for task in (
    ColumnSums("column_sums"), Add("add"), Sort("sort"), Registers("registers"), Find("find"), Pass("pass"),
    Program("program"), Synthesize("synthesize"), Falsify("falsify"), Constraints("constraints"))}


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
    sys.stdout.reconfigure(errors="replace")                    # a code page that lacks a character must not end a run
    with process_group():
        try:
            main()
        except KeyboardInterrupt:
            raise SystemExit("\nstopped; the same command goes on from the last checkpoint") from None
