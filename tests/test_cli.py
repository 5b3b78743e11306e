"""train.py as its users run it: real command lines in real processes, killed, resumed, given bad input."""
import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file

import rsa
import train
from zaya import Tokenizer, Zaya

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHORT = ["--preset", "smoke", "--stages", "pretrain,midtrain", "--steps", "pretrain=10,midtrain=6",
         "--save-every", "4", "--log-every", "1", "--eval-problems", "2", "--eval-samples", "1"]
TWO_STEPS = ["--preset", "smoke", "--stages", "pretrain", "--tasks", "add", "--steps", "2", "--eval-problems", "0"]


def command(*arguments, **options):
    return dict(args=[sys.executable, os.path.join(ROOT, "train.py"), *map(str, arguments)], text=True, cwd=ROOT,
                env={**os.environ, "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}, **options)


def run(*arguments):
    done = subprocess.run(**command(*arguments), capture_output=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def stopped(*arguments):
    """What ends train.py with these arguments: a sentence."""
    with pytest.raises(SystemExit) as end:
        train.main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code, end.value.code
    return end.value.code


def run_until_killed(marker, *arguments, before=lambda: None):
    """Start a run, stop it as soon as it prints `marker`, call `before`, and kill -9 it."""
    with subprocess.Popen(**command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if marker in line:
                process.send_signal(signal.SIGSTOP)
                before()
                process.send_signal(signal.SIGKILL)
                return
    raise AssertionError(f"the run ended without printing {marker!r}")


def log_rows(out):
    with open(out / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One whole run of the smoke preset: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    return out, run("--preset", "smoke", "--out", out, "--stages", ",".join([*train.STAGES, "evaluate"]))


def test_a_run_leaves_what_the_readme_says(smoke):
    (out, printed), eval_spec = smoke, train.PRESETS["smoke"]["evaluate"]
    left = {path.name for path in out.iterdir()} - {".lock"}
    assert left == {"log.csv", "loss.png", "report.md", "report.png", "report.json", "final", *train.STAGES}
    assert all((out / stage / "trainer.pt").exists() for stage in train.STAGES)
    report, table = json.loads((out / "report.json").read_text()), (out / "report.md").read_text()
    assert report["preset"] == "smoke" and report["seed"] == 0
    assert report["params"]["total"] > report["params"]["active"] > 0 and report["seconds"]["evaluate"] > 0
    for after in ("sft", "final"):
        rows = [row for row in report["ttc"] if row["after"] == after]
        assert {row["task"]: row["difficulty"] for row in rows} == eval_spec.tasks  # smoke has two
        for row in rows:
            assert row["problems"] == eval_spec.problems and f"after {after}: {row['task']}, difficulty" in table
            assert len(row["rounds"]["markovian_rsa"]) == eval_spec.budget.rounds + 1
            assert ("full_rsa" in row) == (after == "final")
    for stage in train.STAGES:
        entry = report["stages"][stage]
        assert report["seconds"][stage] > 0 and f"{entry['pass@1']:.3f}" in table
        assert entry["ci95"][0] <= entry["pass@1"] <= entry["ci95"][1] and entry["problems"] == 4 * len(train.TASKS)
        assert set(entry["tasks"]) == set(train.TASKS)
        assert stage not in train.STAGES[:3] or set(entry["loss"]) == {"stories", "docstrings", "traces"}
        assert 0 <= entry["stories"] <= 1 and ("reads" in entry) == (stage not in train.STAGES[:2])
    first = report["stages"]["pretrain"]["loss"]
    assert all(loss < 5.2 for loss in first.values()), first    # from ln 384 = 5.95
    rows = log_rows(out)
    lengths = {name: stage.steps for name, stage in train.PRESETS["smoke"]["stages"].items()}
    assert [row["stage"] for row in rows] == [name for name in train.STAGES for _ in range(lengths[name])]
    numbers = [row[key] for row in rows for key in row if key != "stage" and row[key]]
    assert all(math.isfinite(float(number)) for number in numbers)
    assert abs(float(rows[0]["loss"]) - math.log(Tokenizer.from_pretrained(str(out / "final")).vocab_size)) < 1.5
    assert Zaya.from_pretrained(out / "final").config.rope_parameters["hybrid"]["rope_theta"] == 5e5
    assert "device cpu" in printed and "processes" not in printed and "kept" in printed and "traces | " in printed


def test_reinforcement_learning_leaves_its_traces(smoke):
    """Rewards, staleness, replay and difficulties; a trained step in every kind of stage."""
    out, printed = smoke
    rows = log_rows(out)
    for stage in train.STAGES[3:]:
        mine = [row for row in rows if row["stage"] == stage]
        assert any(row["reward"] and float(row["no_end"]) <= 1 for row in mine)
        trained = [row for row in mine if float(row["norm"]) > 0]
        assert trained or stage != "mathcode", "no group with a signal: the smoke preset learns nothing"
        assert all(0 <= float(row["staleness"]) <= 2 for row in trained)
        assert all(float(row["kl"]) < 1 and 0 <= float(row["flips"]) <= 1 for row in trained if row["kl"])
        assert f"{stage} 1/" in printed and "kl_live" in printed
    results = json.loads((out / "report.json").read_text())["stages"]
    environments = set(train.PRESETS["smoke"]["stages"]["rlve"].tasks)
    assert set(results["rlve"]["start"]) == set(results["rlve"]["end"]) == environments
    assert 0.3 < results["behavior"]["judged"] <= 1


def test_a_finished_run_is_not_trained_again(smoke):
    out, _ = smoke
    before = (out / "midtrain/model.safetensors").stat().st_mtime_ns
    assert "midtrain: done before" in run("--preset", "smoke", "--out", out)
    assert "evaluate: " not in run("--preset", "smoke", "--out", out, "--stages", "evaluate")
    assert (out / "midtrain/model.safetensors").stat().st_mtime_ns == before
    run("--preset", "smoke", "--out", out, "--stages", "pretrain")
    final, last = (load_file(out / name / "model.safetensors") for name in ("final", train.STAGES[-1]))
    assert all(torch.equal(final[name], last[name]) for name in last)   # final/ stays the last stage


def same_state(a, b):
    """Two trainer states, bit for bit; the seconds may differ."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(key == "seconds" or same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_checkpoints(one, other, stages):
    for stage in stages:
        states = [torch.load(out / stage / "trainer.pt", weights_only=True) for out in (one, other)]
        weights = [load_file(out / stage / "model.safetensors") for out in (one, other)]
        assert same_state(*states) and same_state(*weights)


def test_resuming_reinforcement_learning_is_exact(smoke, tmp_path):
    """Killed within an adaptive and within a judged stage: buffer, sampler, environments, judge go on bit for bit."""
    parts = tmp_path / "parts"
    shutil.copytree(smoke[0], parts)
    for name in (*train.STAGES[3:], "final"):
        shutil.rmtree(parts / name)
    arguments = ["--preset", "smoke", "--save-every", "5", "--log-every", "1", "--out", parts]
    run_until_killed("rlve 3/", *arguments)
    run_until_killed("behavior 3/", *arguments)
    run(*arguments)
    assert_same_checkpoints(smoke[0], parts, train.STAGES[3:])


def test_resuming_is_exact(tmp_path):
    """Killed twice within stages, once at a stage border and once before any checkpoint: the same bits as one run.
    Meanwhile another run is kept out of the folder."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def try_another():
        rows, files = log_rows(parts), sorted(parts.rglob("*"))
        assert f"{parts} is taken: another run" in stopped(*SHORT, "--out", parts)
        assert log_rows(parts) == rows and sorted(parts.rglob("*")) == files

    run(*SHORT, "--out", whole)
    run_until_killed("pretrain 2/10", *SHORT, "--out", parts)
    run_until_killed("pretrain 7/10", *SHORT, "--out", parts, before=try_another)
    assert torch.load(parts / "pretrain/trainer.pt", weights_only=True)["step"] == 4
    assert "run --stages pretrain first" in stopped(*SHORT, "--out", parts, "--stages", "midtrain")
    assert "pretrain: going on after step 4" in run(*SHORT, "--out", parts, "--stages", "pretrain")
    run_until_killed("midtrain 5/6", *SHORT, "--out", parts)
    assert "midtrain: going on after step 4" in run(*SHORT, "--out", parts)
    assert log_rows(parts) == log_rows(whole)
    assert_same_checkpoints(whole, parts, ("pretrain", "midtrain"))
    reports = [json.loads((out / "report.json").read_text()) for out in (whole, parts)]
    assert reports[0]["stages"] == reports[1]["stages"]


@pytest.mark.parametrize("changed, says", [
    (["--lr", "midtrain=0.5"], "midtrain was made with lr=0.003"),
    (["--num-experts", "8"], "num_experts=4, and now it is 8"),
    (["--stages", "evaluate", "--seed", "1"], "was made with --preset smoke --seed 0: say so again")])
def test_other_settings_do_not_go_on_silently(smoke, changed, says):
    said = stopped("--preset", "smoke", "--out", smoke[0], *changed)
    assert says in said and str(smoke[0]) in said


def test_own_data_in_every_form(tmp_path):
    """A text, and a .jsonl of messages and of pairs, one line of it bad; two tasks beside them."""
    (tmp_path / "words.txt").write_text("Whan that Aprill with his shoures soote 1387\n" * 400)
    rows = [{"question": f"What is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(60)]
    reply = {"role": "assistant", "content": "<think>so</think>yes"}
    rows += [{"messages": [{"role": "user", "content": f"{i}?"}, reply]} for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("\n".join([*map(json.dumps, rows), "{not json"]))
    data = ["--data", tmp_path / "words.txt", tmp_path / "chats.jsonl", "--tasks", "add,sort", "--vocab-size", "300"]
    assert "chats.jsonl:121: " in stopped(*SHORT, *data, "--out", tmp_path / "out")
    said = run(*SHORT, *data, "--out", tmp_path / "out", "--skip-bad-lines")
    assert "skipped 1 bad line" in said and "chats.jsonl, trimmed to 128 tokens: 120 kept" in said
    result = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["midtrain"]
    assert set(result["loss"]) == {"words.txt", "chats.jsonl", "traces"} and set(result["tasks"]) == {"add", "sort"}


def test_nan_and_changed_data_stop_a_run(tmp_path):
    """With the step, the samples and the last good checkpoint; and with the file that is another one now."""
    folder, words = tmp_path / "out" / "pretrain", tmp_path / "words.txt"
    words.write_text("Whan that Aprill with his shoures soote 1387\n" * 400)
    arguments = [*SHORT, "--data", words, "--vocab-size", "280", "--out", tmp_path / "out"]
    run(*arguments, "--stages", "pretrain")
    model, tokenizer, state = train.load_checkpoint(str(folder), "cpu")
    weight = model.layers[1].self_attn.o_proj.weight
    weight.data = torch.full_like(weight, float("nan"))
    train.save_checkpoint(str(folder), model, tokenizer, state)
    said = stopped(*arguments)
    assert "midtrain step 1: loss nan" in said and "traces" in said
    assert "Last good checkpoint: none of this stage" in said
    state.update(step=8, done=False)
    train.save_checkpoint(str(folder), model, tokenizer, state)
    said = stopped(*arguments)
    assert "pretrain step 9: loss nan" in said and f"{folder} (step 8)" in said
    words.write_text("The droghte of March hath perced to the roote 1387\n" * 400)
    assert "words.txt changed since" in stopped(*arguments)


MISTAKES = {
    "--sedd 3": "did you mean --seed?", "--steps middle=3": "did you mean midtrain?",
    "--steps many": "'many' is not a whole number", "--preset huge": "smoke, tiny, small, zaya1-8b",
    "--stages pretrian": "did you mean pretrain?", "--stages midtrain": "run --stages pretrain first",
    "--stages evaluate": "run the other stages first", "--stages rlve --tasks constraints": "leaves nothing to run",
    "--tasks addd": "did you mean add?", "--tasks none --data README.md": ".txt and .jsonl",
    "--data nowhere.txt": "nowhere.txt: No such file", "--data README.md README.md": ".txt and .jsonl",
    "--lr nan": "--lr nan must be at least 0", "--grad-clip -1": "--grad-clip -1.0 must be at least 0",
    "--seed 99999999999999999999": "at most 9223372036854775807", "--save-every 0": "--save-every 0 must be at least",
    "--context 0": "--context 0 must be at least 2", "--tokens-per-step 1000": "multiple of pretrain's context",
    "--device gpu": "There are auto, cpu, cuda, mps", "--device cuda": "no such GPU", "--device mps": "no such GPU",
    "--dtype float8": "auto, float32, bfloat16", "--num-experts 0": "num_experts must be a positive integer",
    "--vocab-size 10": "--vocab-size"}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_get_one_clear_sentence(tmp_path, monkeypatch, capsys, arguments):
    if torch.cuda.is_available() and "cuda" in arguments or torch.backends.mps.is_available() and "mps" in arguments:
        pytest.skip("a GPU is there")
    monkeypatch.chdir(ROOT)
    arguments = ["--preset", "smoke", "--out", str(tmp_path / "out"), *arguments.split()]
    with pytest.raises(SystemExit) as end:
        train.main(arguments)
    said = capsys.readouterr().err.splitlines()[-1] if end.value.code == 2 else end.value.code     # 2: argparse's
    assert MISTAKES[" ".join(arguments[4:])] in said and "\n" not in said


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "-0.001", "1e300", str(2**64)])
@pytest.mark.parametrize("setting", [f for f in dataclasses.fields(train.TrainConfig) if f.type in (int, float, dict)],
                         ids=lambda setting: setting.name)
def test_every_number_has_bounds(setting, value):
    flag = "--" + setting.name.replace("_", "-")
    with pytest.raises(SystemExit) as refused:
        train.parse_arguments([flag, f"pretrain=3,midtrain={value}"] if setting.type is dict else [f"{flag}={value}"])
    if refused.value.code != 2:                                 # 2: argparse has said that it is no whole number
        assert flag in refused.value.code and re.search("must be at least|is not a whole number", refused.value.code)


# ---- from a checkpoint ----------------------------------------------------------------------------------------------


def initial(kind, folder):
    """A small checkpoint of this kind in `folder` -> the end tokens that a run from it should have."""
    if kind == "ours":
        tokenizer = Tokenizer()
        config = train.ZayaConfig.preset("smoke", vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
        randomise(Zaya(config)).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        return [tokenizer.end]
    pytest.importorskip("transformers")
    from test_equality import legacy_checkpoint
    from test_rsa import official_folder
    official_folder(folder, "<think>\n")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    if kind == "official":
        return ends
    # A base model: alternating sublayers, a tokenizer without a chat template, and an end of its own.
    for name in ("chat_template.jinja", "generation_config.json", "model.safetensors", "config.json"):
        (folder / name).unlink()
    legacy_checkpoint(folder, vocab_size=len(tokenizer["model"]["vocab"]) + 9)
    return [ends[1], 1]


@pytest.mark.parametrize("kind", ["ours", "official", "legacy"])
def test_a_run_may_begin_from_a_checkpoint(tmp_path, kind, capsys):
    """SFT and RL of somebody's model: its shape, RoPE base, vocabulary and tokenizer come along, and stay."""
    (tmp_path / "from").mkdir()
    ends, chats = initial(kind, tmp_path / "from"), tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "What is 47 + 85?"}, {"role": "assistant", "content": "<think>12</think>132"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns * 2}) + "\n" * 2)
    line = ["--preset", "smoke", "--init", str(tmp_path / "from"), "--out", str(tmp_path / "out"), "--data", str(chats),
            "--stages", "sft,warmup", "--steps", "2", "--tasks", "add", "--eval-problems", "1", "--log-every", "1"]
    train.main(line)
    begun = Zaya.from_pretrained(str(tmp_path / "from"))
    for stage in ("sft", "warmup", "final"):
        model, tokenizer, _ = train.load_checkpoint(str(tmp_path / "out" / stage), "cpu")
        assert train.end_tokens(tokenizer) == ends
        then, now = begun.config.to_dict(), model.config.to_dict()
        assert {key for key in now if now[key] != then[key]} <= {"eos_token_id", "pad_token_id"}
        moved = [(a - b).abs().max() for a, b in zip(model.parameters(), begun.parameters())]
        assert 0 < max(moved) < 0.5
    ids, targets = tokenizer.render(turns)
    said = tokenizer.decode([i for i, target in zip(ids, targets) if target])
    assert "132" in said and "47" not in said
    rsa.main(["3+4", "--checkpoint", str(tmp_path / "out" / "final"), "--max-tokens", "4", "--rounds", "0",
              "--population", "2"])
    capsys.readouterr()
    train.main(line)                                            # goes on, and has nothing to do
    assert "sft: done before" in capsys.readouterr().out
    assert "was made with init=" in stopped(*line[:2], *line[4:])
    line += ["--hidden-size", "64", "--out", str(tmp_path / "other")]
    assert "brings its own shape: leave out --hidden-size" in stopped(*line)


def test_a_checkpoint_that_is_none(tmp_path):
    line = ["--preset", "smoke", "--stages", "sft", "--out", tmp_path / "out", "--init", tmp_path / "from"]
    assert "from" in stopped(*line)
    (tmp_path / "from").mkdir()
    initial("ours", tmp_path / "from")
    (tmp_path / "from" / "config.json").write_text("{")
    assert "config.json is damaged" in stopped(*line)
    (tmp_path / "from" / "config.json").unlink()
    assert "config.json" in stopped(*line)


def test_a_terminal_without_utf8_stops_no_run(tmp_path):
    """Neither the bytes of an untrained model nor a file's name that is none in this locale."""
    plain = dict(LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    data = tmp_path / "caf\u00e9.txt"
    data.write_text("Whan that Aprill with his shoures soote \u2026 1387\n" * 400, encoding="utf-8")
    options = command(*TWO_STEPS, "--data", data, "--vocab-size", "280", "--out", tmp_path / "out")
    for arguments in (["-h"], options["args"][2:]):
        done = subprocess.run(options["args"][:2] + arguments, capture_output=True, cwd=ROOT, timeout=1200,
                              env={**options["env"], **plain})
        assert done.returncode == 0, done.stderr[-2000:]
    assert b"?" in done.stdout and b"txt | " in done.stdout and done.stdout.isascii()


@pytest.mark.parametrize("name, content", [
    ("report.json", b'{"preset": "smo'), ("report.json", b"{}"), ("report.json", b"\xff\xfe{"),
    ("report.json", b'{"preset": "smoke", "seed": 0, "seconds": {}, "params": {"total": 1, "active": 1}, "stages": '
                    b'{"pretrain": {}}, "ttc": []}'),
    ("pretrain/trainer.pt", b"PK\x03\x04"), ("pretrain/trainer.pt", b""), ("pretrain/trainer.pt", {"model": 1}),
    ("pretrain/trainer.pt", None), ("pretrain/trainer.pt", 0.5), ("pretrain/config.json", b'{"hidden'),
    ("pretrain/tokenizer.json", b"{}"), ("pretrain/model.safetensors", b"cut"),
])
def test_damaged_files_are_named(smoke, tmp_path, name, content):
    """Cut, foreign, empty, no UTF-8 (a share: only a part of the file is left; None: it is gone)."""
    shutil.copytree(smoke[0], tmp_path / "out")
    path = tmp_path / "out" / name
    whole = path.read_bytes()
    path.unlink()
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else whole[:int(len(whole) * content)])
    said = stopped("--preset", "smoke", "--stages", "pretrain", "--out", tmp_path / "out")
    assert os.path.basename(name) in said or f"{path.parent} is damaged" in said, said


@pytest.mark.parametrize("taken", ["", "pretrain", "data", "log.csv/", "report.json/", "report.md.tmp/", ".lock/"])
def test_what_the_file_system_refuses_is_said(tmp_path, taken):
    """A file where a folder should be, and the other way round."""
    out, text = tmp_path / "out", tmp_path / "words.txt"
    text.write_text("Whan that Aprill with his shoures soote 1387\n" * 400)
    (out / taken).parent.mkdir(parents=True, exist_ok=True)
    (out / taken).mkdir(parents=True) if taken.endswith("/") else (out / taken).write_text("here")
    assert str(out / taken) in stopped(*TWO_STEPS, "--vocab-size", "280", "--data", text, "--out", out)


def test_help_is_short_and_complete(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["-h"])
    flags = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M)
    assert 20 <= len(flags) <= 30 and {"--preset", "--data", "--steps", "--num-experts"} <= set(flags)
