"""Many processes: real torchrun command lines on two and four CPU processes, beside the same run in one process.

Equal means equal but for the order of fp32 sums.  That noise grows from step to step, in one process too: when its
micro-batches are halved, the losses of such steps move by up to 1e-3, because a router's choice flips here and there.
So the first steps are compared closely, and the whole curve, along which the loss falls by more than 0.5, to 0.5 %.
"""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import train
from zaya import Zaya

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRETRAIN = ["--preset", "smoke", "--stages", "pretrain", "--steps", "12", "--lr", "2e-3", "--save-every", "4",
            "--log-every", "1", "--tasks", "sort", "--eval-problems", "0"]
POST = ["--preset", "smoke", "--tasks", "synthesize,find", "--steps", "pretrain=2,midtrain=2,sft=150,warmup=4,rlve=2"]
COMPARED = ["step", "loss", "norm", "entropy", "bias", "reward", "length", "no_end", "zero_groups", "staleness",
            "masked"]


def torchrun(*arguments, processes=2):
    return dict(args=[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                      os.path.join(ROOT, "train.py"), *map(str, arguments)], text=True, cwd=ROOT,
                env={**os.environ, "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_processes(*arguments, code=0, processes=2):
    done = subprocess.run(**torchrun(*arguments, processes=processes), timeout=1200)
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


def curve(out):
    with open(out / "log.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if k in COMPARED and v} for row in csv.DictReader(file)]


def assert_equal_curves(got, expected, close=3):
    """Losses and gradient norms, the first `close` steps to 1e-4 of them, and with them what the balancer saw."""
    assert len(got) == len(expected)
    for i, (ours, theirs) in enumerate(zip(got, expected)):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5 if i < close else 5e-3), (i, ours, theirs)
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4 if i < close else 5e-2), (i, ours, theirs)
        if i < close:
            assert (ours["entropy"], ours["bias"]) == pytest.approx((theirs["entropy"], theirs["bias"]), rel=2e-3)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    train.main([*PRETRAIN, "--out", str(out)])
    return curve(out)


def rank_one(launcher):
    """The process id of torchrun's worker with RANK=1."""
    with open(f"/proc/{launcher}/task/{launcher}/children") as file:
        workers = file.read().split()
    for worker in workers:
        with open(f"/proc/{worker}/environ") as file:
            if "RANK=1" in file.read().split("\0"):
                return int(worker)
    raise AssertionError(f"no worker with RANK=1 among {workers}")


@pytest.mark.parametrize("shard", [4, 2])                      # 2: two copies of the weights, each in two processes
def test_four_processes_make_the_run_of_one(one, tmp_path, shard):
    printed = run_processes(*PRETRAIN, "--out", tmp_path, "--shard", shard, processes=4)
    assert one[0]["loss"] - one[-1]["loss"] > 0.5
    assert_equal_curves(curve(tmp_path), one)
    assert printed.count("pretrain 12/12") == 1 and "4 processes" in printed       # only the first process speaks
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".tmp", ".new", ".old")]


def test_a_run_goes_on_with_two_one_and_four_processes(one, tmp_path, monkeypatch, capsys):
    """One of two is killed, which ends the run; one process goes on and is interrupted; four end it."""
    with subprocess.Popen(**torchrun(*PRETRAIN, "--out", tmp_path)) as launcher:
        printed = ""
        for line in launcher.stdout:
            printed += line
            if "pretrain 6/12" in line:
                os.kill(rank_one(launcher.pid), signal.SIGKILL)
    assert launcher.returncode != 0
    assert printed.count("another process of this run ended") == 1 and "goes on from the last checkpoint" in printed
    assert "Traceback" not in printed.split("another process")[0] and "pretrain 12/12" not in printed

    add = train.Log.add

    def interrupted(log, **row):
        if row["step"] == 10:
            raise KeyboardInterrupt
        add(log, **row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Log, "add", interrupted)
        train.main([*PRETRAIN, "--out", str(tmp_path)])
    assert "going on after step 4" in capsys.readouterr().out
    assert "going on after step 8" in run_processes(*PRETRAIN, "--out", tmp_path, processes=4)
    assert_equal_curves(curve(tmp_path), one)
    # What four wrote is what one process writes: the whole state of every parameter, by its name.
    state = torch.load(tmp_path / "pretrain" / "trainer.pt", weights_only=True)["optimizers"]["state"]
    parameters = dict(Zaya.from_pretrained(tmp_path / "pretrain").named_parameters())
    assert state.keys() == parameters.keys()
    assert all(t.shape in (p.shape, ()) for name, p in parameters.items() for t in state[name].values())


@pytest.fixture(scope="module")
def after_sft(tmp_path_factory):
    """A model that solves some of its problems."""
    out = tmp_path_factory.mktemp("sft") / "run"
    train.main([*POST, "--stages", "pretrain,midtrain,sft", "--eval-problems", "2", "--out", str(out)])
    return out


def reports(*folders):
    return [json.loads((folder / "report.json").read_text()) for folder in folders]


def test_rollouts_of_two_processes_are_those_of_one(after_sft, tmp_path):
    single, double = (shutil.copytree(after_sft, tmp_path / name) for name in ("single", "double"))
    wanted = [*POST, "--stages", "warmup,rlve", "--eval-problems", "8", "--out"]
    train.main([*wanted, str(single)])
    run_processes(*wanted, double)
    expected, got = curve(single)[154:], curve(double)[154:]
    assert len(got) == len(expected) == 6 and sum(row["loss"] != 0 for row in expected) > 3
    for ours, theirs in zip(got[:4], expected):                 # the same tokens, rewards and steps
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    (ours, theirs) = (report["stages"]["rlve"] for report in reports(double, single))
    assert ours["start"] == theirs["start"] and ours["pass@1"] == pytest.approx(theirs["pass@1"], abs=0.1)


def test_evaluation_by_two_processes_is_that_of_one(after_sft, tmp_path):
    single, double = (shutil.copytree(after_sft, tmp_path / name) for name in ("single", "double"))
    train.main([*POST, "--stages", "evaluate", "--out", str(single)])
    run_processes(*POST, "--stages", "evaluate", "--out", double)
    ours, theirs = reports(double, single)
    assert ours["ttc"] == theirs["ttc"] != [] and ours["ttc"][0]["generated_tokens"] > 100


def test_a_mistake_is_said_once(tmp_path):
    printed = run_processes("--preset", "smoke", "--data", "nowhere.txt", "--out", tmp_path, code=1)
    assert printed.count("nowhere.txt: No such file") == 1
