"""What a GPU makes of this project: its kernels, its training, and decoding at zaya1-8b's shape.

    python notebooks/experiments/gpu.py                       # every part in turn, then the page: half an hour
    python notebooks/experiments/gpu.py --parts kernels 8b    # some of them; `--parts` alone: the page of what is there

Every part is a process with a time limit; what it printed stays in --out.  One that fails does not stop the others.
The decoding of 64 tokens counts what goes before a graph can be launched again: a step as it is, and the capture.
"""
import argparse
import csv
import json
import os
import subprocess
import sys

import arms
import torch

import kernels
from zaya import Zaya, ZayaConfig

SMALL = ["train.py", "--preset", "small", "--stages", "pretrain", "--steps", "pretrain=200"]
RSA = ["rsa.py", "--checkpoint", "notebooks/results/checkpoint", "find 06b,85c,31d,74e,58f,95g"]
# {part: (seconds that it may take, its command)}; a training run leaves its log.csv in a folder of the part's name.
PARTS = {"tests": (120, ["-m", "pytest", "-q", "tests/test_triton.py", "-k", "gpu"]),
         "kernels": (300, ["kernels.py", "--compile"]),
         "8b": (120, ["notebooks/experiments/gpu.py", "--measure-8b"]),
         "rsa": (60, RSA),
         "smoke": (200, ["train.py", "--preset", "smoke"]),
         "small": (400, SMALL),
         "small-not-compiled": (400, [*SMALL, "--no-compile"]),
         "tiny": (1800, ["train.py", "--preset", "tiny"])}


def random_8b(device):
    """A Zaya of the 8B's shape with random bf16 weights, made where it is used."""
    with torch.device("meta"):
        model = Zaya(ZayaConfig.preset("zaya1-8b")).bfloat16()
    model.to_empty(device=device)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim > 1:
            torch.nn.init.normal_(tensor, std=model.config.initializer_range)
        else:
            torch.nn.init.constant_(tensor, 0 if name.endswith(("bias", "biases", "load")) else 1)
    for layer in model.layers:                                  # as from_pretrained leaves them
        layer.gate.balancing_biases = layer.gate.balancing_biases.float()
    return model.requires_grad_(False).eval()


def speed(model, prompt, new):
    """-> tokens/s: of reading the prompt for 0 new ones, else of decoding these."""
    first, whole = kernels.medians(lambda: model.generate(prompt, 1, temperature=0),
                                   lambda: model.generate(prompt, 1 + new, temperature=0), rounds=1)
    return 1e3 * len(prompt) * new / (whole - first) if new else 1e3 * prompt.numel() / whole


@torch.no_grad()
def measure_8b():
    """Print a JSON row for each: decoding by rows, one operation at a time and as a CUDA graph; a prompt."""
    torch.manual_seed(0)
    model = kernels.fuse(random_8b("cuda"))
    for what, rows, length, new in (("decoding, eager", 1, 32, 64), ("decoding, eager", 128, 32, 64),
                                    ("decoding, CUDA graph", 1, 32, 64), ("decoding, CUDA graph", 128, 32, 64),
                                    ("reading a prompt", 1, 8192, 0)):
        model.graphed_step = False if "eager" in what else None
        found = speed(model, torch.randint(3, 1000, (rows, length), device="cuda"), new)
        row = {"what": what, "rows": rows, "prompt": length, "new": new, "tokens/s": round(found, 1)}
        print(json.dumps(row), flush=True)


def run(name, out):
    """Run one part; what it prints goes into <out>/<name>.txt, and how it ended is its last line."""
    limit, command = PARTS[name]
    if command[0] == "train.py":
        command = [*command, "--out", os.path.join(out, name)]
    with open(os.path.join(out, f"{name}.txt"), "w", encoding="utf-8") as file:
        try:
            done = subprocess.run([sys.executable, "-u", *command], stdout=file, stderr=subprocess.STDOUT,
                                  cwd=arms.ROOT, timeout=limit)
            end = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            end = f"stopped after {limit} s"
        file.write(f"\n{end}\n")
    print(f"{name}: {end}", flush=True)


def rates(path):
    """A run's log.csv -> Markdown: each stage's steps, the seconds of its first step (compiling) and the median's."""
    rows = [["stage", "steps", "first step, s", "median step, s", "first loss", "last loss"]]
    with open(path, encoding="utf-8") as file:
        logged = list(csv.DictReader(file))
    for stage in dict.fromkeys(row["stage"] for row in logged):
        mine = [row for row in logged if row["stage"] == stage]
        seconds = [float(row["seconds"]) for row in mine]
        rows.append([stage, mine[-1]["step"], f"{seconds[0]:.1f}", f"{sorted(seconds)[len(seconds) // 2]:.3f}",
                     mine[0]["loss"], mine[-1]["loss"]])
    return arms.markdown(rows)


def page(out):
    """Markdown of what the parts left in `out`."""
    paragraphs = []
    for name, (_, command) in PARTS.items():
        path, log = os.path.join(out, f"{name}.txt"), os.path.join(out, name, "log.csv")
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip() for line in file if line.strip()]
        paragraphs.append(f"## {name}: {lines[-1]}\n\n`python {' '.join(command)}`")
        if os.path.exists(log):
            paragraphs.append(rates(log))
        elif name == "8b":
            found = [json.loads(line) for line in lines if line.startswith("{")]
            paragraphs.append(arms.markdown([list(found[0]), *(row.values() for row in found)]) if found else "")
        elif name == "kernels":
            paragraphs.append("\n".join(line for line in lines if line.startswith("|")).replace("| path", "\n| path"))
        else:
            paragraphs.append("\n".join(["```text", *lines[:-1][-9:], "```"]))
    return "\n\n".join(paragraphs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--out", default=os.path.join(arms.ROOT, "out", "gpu"), help="default out/gpu")
    parser.add_argument("--measure-8b", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    machine = os.path.join(given.out, "machine.txt")
    if given.parts and not torch.cuda.is_available():
        raise SystemExit("gpu.py: this PyTorch sees no GPU; `--parts` alone prints the page of what is in --out")
    if not given.parts and not os.path.exists(machine):
        raise SystemExit(f"gpu.py: nothing was measured into {given.out} yet: name parts, or leave --parts out")
    if given.measure_8b:
        return measure_8b()
    os.makedirs(given.out, exist_ok=True)
    if given.parts:
        with open(machine, "w", encoding="utf-8") as file:
            file.write(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    for name in given.parts:
        run(name, given.out)
    with open(machine, encoding="utf-8") as file:
        print(f"`python notebooks/experiments/gpu.py` on {file.read()}\n{page(given.out)}")


if __name__ == "__main__":
    main()
