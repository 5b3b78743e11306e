"""How fast three things are beside what they replace, each side in a process of its own, in turns, on one thread.

    python notebooks/experiments/speed.py              # minutes; needs git's history and transformers
    python notebooks/experiments/speed.py generate --threads 2 --turns 1

The older code is commit 0d920a6, the first edition.  All get the same checkpoint: out/tiny/final, or --checkpoint.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OLD = "0d920a6"


def timed(function, count):
    """Median seconds of `count` calls after one that warms up."""
    seconds = []
    for _ in range(count + 1):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def measure(what, checkpoint, inputs):
    """In a process whose path begins with the code to be measured -> seconds."""
    import torch
    torch.manual_seed(0)
    given = torch.load(inputs)
    if what.startswith("transformers"):
        from transformers import AutoModelForCausalLM
        dtype = torch.bfloat16 if "bf16" in what else torch.float32
        experts = "grouped_mm" if "grouped" in what else "eager"
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, experts_implementation=experts).eval()
        more = dict(max_new_tokens=64, min_new_tokens=64, do_sample=True, top_k=0, pad_token_id=0)
        with torch.no_grad():
            return timed(lambda: model.generate(given["rows"], **more), 3)
    import train
    from kernels import fuse
    from zaya import PIDBalancer, Zaya
    getattr(train, "keep_freed_memory", lambda: None)()
    model = fuse(Zaya.from_pretrained(checkpoint))
    if what == "generate":
        return timed(lambda: model.generate(given["rows"], 64), 3)
    if what == "rollouts":
        end = given["end"] if "end: " in (train.roll_out.__doc__ or "") else given["end"][0]
        return timed(lambda: train.roll_out(model, given["prompts"], 8, 96, end, torch.Generator().manual_seed(1)), 3)
    optimizers, balancer = train.make_optimizers(model, 1e-4, weight_decay=0.1), PIDBalancer(model, 1e-3)
    config = SimpleNamespace(micro_batch=16384, grad_clip=1.0)
    return timed(lambda: train.train_step(model, optimizers, balancer, given["batch"], config, torch.float32, 1e-4), 9)


def in_turns(sides, checkpoint, inputs, threads, turns):
    """{name: (path, what)} -> {name: median seconds over so many turns}."""
    found = {name: [] for name in sides}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    for _ in range(turns):
        for name, (path, what) in sides.items():
            command = [sys.executable, os.path.abspath(__file__), "--measure", what, "--checkpoint", checkpoint,
                       "--inputs", inputs]
            done = subprocess.run(command, env={**environment, "PYTHONPATH": path}, cwd=path, check=True, text=True,
                                  stdout=subprocess.PIPE)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def make_inputs(checkpoint, path):
    """One round of RL's prompts, a batch of SFT's, and 64 rows of 32 tokens."""
    sys.path.insert(0, ROOT)
    import torch

    import train
    from rsa import prompt_ids
    from zaya import Tokenizer
    tokenizer, prompts = Tokenizer.from_pretrained(checkpoint), []
    tasks = train.PRESETS["tiny"]["stages"]["rlve"].tasks
    for i in range(32):
        task = train.find_task(tasks[i % len(tasks)])
        prompts.append(prompt_ids(tokenizer, train.draw(task, i, task.levels[i % len(task.levels)], False).prompt))
    stage = train.PRESETS["tiny"]["stages"]["sft"]
    source = train.TaskSource(list(train.TASKS), stage, tokenizer, 0)
    *batch, _ = train.Loader([source], stage, 2048, 0, tokenizer.pad).next()
    rows = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(0))
    torch.save({"prompts": prompts, "end": [tokenizer.end], "batch": batch, "rows": rows}, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", help="rollouts, step, generate (default: all three)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--checkpoint", default=os.path.join(ROOT, "out", "tiny", "final"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.checkpoint, given.inputs)))
        return
    checkpoint = os.path.abspath(given.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        old, inputs = os.path.join(folder, "old"), os.path.join(folder, "inputs.pt")
        make_inputs(checkpoint, inputs)
        git = ["git", "-C", ROOT, "worktree"]
        subprocess.run([*git, "add", "--detach", "-f", old, OLD], check=True, capture_output=True)
        try:
            print(f"{given.threads} thread(s), medians of {given.turns} turn(s)\n\n"
                  "| what | side | seconds | times now's |\n|---|---|---|---|")
            kinds = ["transformers, eager fp32", "transformers, grouped_mm fp32", "transformers, grouped_mm bf16"]
            tables = {"rollouts": ("a round of 256 RL rollouts", {OLD: (old, "rollouts")}),
                      "step": ("a training step of 2,048 tokens", {OLD: (old, "step")}),
                      "generate": ("64 new tokens for 64 rows", {kind: (ROOT, kind) for kind in kinds})}
            for what in given.what or tables:
                title, sides = tables[what]
                seconds = in_turns({**sides, "now": (ROOT, what)}, checkpoint, inputs, given.threads, given.turns)
                for side, each in seconds.items():
                    print(f"| {title} | {side} | {each:.3f} | {each / seconds['now']:.2f} |", flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", old], check=True, capture_output=True)


if __name__ == "__main__":
    main()
