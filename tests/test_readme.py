"""The README says only what committed results printed, its commands and examples run, and its tables can be made again.

    python tests/test_readme.py          # makes EVIDENCE.md anew, and each table with the command in its first line
"""
import glob
import importlib
import json
import os
import re
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "notebooks", "results")
MADE = re.compile(r"Made by `(.+?)`(?=[.:])")


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def made_tables():
    """The tables that a command prints from stored results; the others were measured and take hours."""
    return [path for path in sorted(glob.glob(os.path.join(RESULTS, "*.md"))) if MADE.match(read(path))]


def make(path):
    """What a table's file should hold: its first line, and what the command named there prints."""
    first = read(path).splitlines()[0]
    command = MADE.match(first).group(1).replace("python ", f"'{sys.executable}' ", 1)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, encoding="utf-8",
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    return f"{first}\n\n{done.stdout}"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", read("README.md"), re.S | re.M)


def rows(heading):
    """The cells of the README's table that begins with the column `heading`, without its head."""
    lines = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", read("README.md"), re.M).group(1)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]


def numbers(text):
    """What somebody must have measured: numbers with a decimal point, and whole ones of three digits or more."""
    return set(re.findall(r"(?<![\w.,])(?:\d+(?:,\d{3})*\.\d+|\d{3,}|\d{1,3}(?:,\d{3})+)(?![\w.,]*\d)", text))


def test_it_is_short():
    assert len(read("README.md").encode()) <= 10_000


def test_the_first_screen_is_the_runs_own():
    """Eight lines of the run's output, and the minutes it took."""
    printed, shown = read(RESULTS, "tiny", "output.txt").splitlines(), blocks("text")[0].splitlines()
    assert len(shown) == 8 and all(line in printed for line in shown), [line for line in shown if line not in printed]
    claimed = re.search(r"from random weights.*?in ([0-9.]+) minutes", read("README.md"), re.S).group(1)
    seconds = json.loads(read(RESULTS, "tiny", "report.json"))["seconds"]
    assert printed[-1].startswith(f"{claimed} minutes in all") and float(claimed) * 60 >= sum(seconds.values()) - 3


def test_the_first_screen_quotes_the_worst_of_the_runs():
    """Of the finished models, for two tasks: the least of Markovian RSA, the most of one sample and of the vote, over
    the runs in which it stands out; and how many these are, and what the other one did."""
    sys.path.insert(0, os.path.join(ROOT, "notebooks", "experiments"))
    import runs as made
    import train
    runs = json.loads(read(RESULTS, "runs.json"))
    said = re.search(r"^In (\d+) of (\d+) whole runs.*?\n(?=It needs)", read("README.md"), re.S | re.M)
    rows = {task: [row for run in runs for row in run["ttc"] if (row["after"], row["task"]) == ("final", task)]
            for task in ("find", "pass")}
    well = [made.stands_out(find) and made.stands_out(other) for find, other in zip(*rows.values(), strict=True)]
    assert [int(said[1]), int(said[2])] == [sum(well), len(runs)] and len(runs) == sum(well) + 1
    wanted = []
    for task in rows:
        mine = [row for row, good in zip(rows[task], well) if good]
        wanted.append(min(row["markovian_rsa"] for row in mine))
        wanted += [max(row[rival] for row in mine) for rival in ("single", "vote")]
    failed = well.index(False)
    find, other = rows["find"][failed], rows["pass"][failed]
    wanted += [find["single"], find["markovian_rsa"], other["markovian_rsa"]]
    assert [f"{share:.2f}" for share in wanted] == re.findall(r"\b[01]\.\d\d\b", said[0])
    for run in runs:
        assert list(run["stages"]) == train.STAGES and run["minutes"] > 0 and run["cpu"] and run["threads"]
        assert all(row["ci95"]["markovian_rsa"][0] <= row["markovian_rsa"] for row in run["ttc"])


def test_every_number_was_printed_by_a_committed_result():
    """Where the run, the evidence, the GPU's page or the tour of the model say it: among all results some number nearly
    always fits.  Commands, links and the lengths of the files are other tests'."""
    text = re.sub(r"^```(sh|python)\n.*?^```|\]\([^)]*\)|^\[\d+\]: .*|^\| `\w+\.py` .*", "", read("README.md"),
                  flags=re.S | re.M)
    tour = json.loads(read("notebooks", "01_model_tour.ipynb"))
    printed = [read(RESULTS, "tiny", "output.txt"), read(RESULTS, "EVIDENCE.md"), read(RESULTS, "gpu.md")]
    printed += ["".join(output.get("text", "")) for cell in tour["cells"] for output in cell.get("outputs", [])]
    claimed = numbers(text)
    assert len(claimed) > 40 and not claimed - numbers("\n".join(printed)), claimed - numbers("\n".join(printed))


def test_links_exist():
    readme = read("README.md")
    links = re.findall(r"\]\(([^)#]+)\)|^\[\d+\]: (\S+)", readme, re.M)
    assert len(links) > 15
    for path in map("".join, links):
        assert path.startswith("https://") or os.path.exists(os.path.join(ROOT, path)), path
    defined = set(re.findall(r"^\[(\d+)\]: ", readme, re.M))
    assert defined == set(re.findall(r"\[(\d\d)\](?!:)", readme))


def test_links_of_the_tables_exist():
    for path in glob.glob(os.path.join(RESULTS, "*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", read(path)):
            assert os.path.exists(os.path.join(RESULTS, link)), f"{path} links to {link}"


def test_every_table_is_linked():
    linked = re.findall(r"notebooks/results/(\w+\.md)", read("README.md"))
    assert {os.path.basename(path) for path in glob.glob(os.path.join(RESULTS, "*.md"))} == set(linked)


def test_the_two_commands_stand_on_lines_of_their_own():
    lines = "".join(blocks("sh")).splitlines()
    assert lines[0] == "pip install -r requirements.txt && python train.py"
    assert "pip install -r requirements.txt -r tests/requirements.txt && pytest" in lines


def test_the_flags_exist(capsys, monkeypatch):
    """A flag after a file's name is one of that file; a flag alone in the text is one of any."""
    known = {}
    for file in ("train.py", "rsa.py", "kernels.py"):
        monkeypatch.setattr(sys, "argv", [file, "-h"])
        with pytest.raises(SystemExit):
            importlib.import_module(file.removesuffix(".py")).main()
        known[file] = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        uses = re.findall(rf"\b{re.escape(file)} ([^#`\n]*)", read("README.md"))
        used = {flag for use in uses for flag in re.findall(r"--[a-z][a-z-]*", use)}
        assert used and used <= known[file], used - known[file]
    alone = set(re.findall(r"`(--[a-z-]+)", read("README.md")))
    assert alone and alone <= set().union(*known.values()), alone


def test_no_file_is_longer_than_it_says():
    said = rows("file")
    assert [name for name, *_ in said] == ["`zaya.py`", "`train.py`", "`rsa.py`", "`kernels.py`"]
    for name, most, _ in said:
        lines = len(read(name.strip("`")).splitlines())
        assert lines <= int(most.replace(",", "")), f"{name} has {lines} lines, and the README says at most {most}"


def test_what_to_copy_is_where_it_says():
    """The components, and the helpers in code font that they need, or that what they are given must have."""
    for components, where, _ in rows("component"):
        module = importlib.import_module(where.strip("`").removesuffix(".py"))
        for name in re.findall(r"`(\w+)`", components):
            assert callable(getattr(module, name)), f"{where} has no {name}"
    import train
    assert callable(train.orthogonalize) and callable(train.split_think) and callable(train.dppo_mask)


def test_the_stages_are_the_presets():
    import train
    stages = train.PRESETS["tiny"]["stages"]
    said = {name: (int(steps), int(context)) for name, steps, context, *_ in rows("stage")}
    assert said == {name: (stage.steps, stage.context) for name, stage in stages.items()}


def test_the_verdicts_are_those_of_the_evidence():
    links = dict(re.findall(r"^\[(\d+)\]: notebooks/(\S+)\.ipynb", read("README.md"), re.M))
    said = [(claim, verdict, links[book.strip("[]")]) for claim, verdict, book in rows("claim")]
    table = read(RESULTS, "EVIDENCE.md").partition("\n## ")[0]
    evidence = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
                if line.startswith("| ")][1:]
    assert len(said) > 10 and said == [(claim, verdict.strip("*"), re.match(r"\[(.+?)\]", book).group(1))
                                       for claim, _, _, _, verdict, book in evidence]


def evidence():
    """EVIDENCE.md as the stored results make it."""
    sys.path.insert(0, os.path.join(ROOT, "notebooks", "experiments"))
    return importlib.import_module("evidence")


def test_the_evidence_is_what_its_command_makes():
    assert read(RESULTS, "EVIDENCE.md") == evidence().text()


def test_a_verdict_rests_on_another_arithmetic_too():
    """Of three seeds or more of an experiment one has other arithmetic."""
    checked = 0
    for folder in glob.glob(os.path.join(RESULTS, "*", "")):
        seeds = [json.loads(read(path)) for path in glob.glob(folder + "seed-*.json")]
        if len(seeds) > 2:
            assert len({seed["arithmetic"] for seed in seeds}) > 1, folder
            checked += 1
    assert checked == 6                                         # CCA, routers, residual scaling, trimming, RL, RSA


@pytest.mark.parametrize("path", made_tables(), ids=os.path.basename)
def test_a_table_is_what_its_command_prints(path):
    stored = read(path)
    assert stored == make(path) and len(numbers(stored)) > 5


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    """On a folder as a run leaves it, of a random model."""
    import torch
    from zaya import Tokenizer, Zaya, ZayaConfig
    tokenizer = Tokenizer()
    torch.manual_seed(0)
    folder = str(tmp_path / "out" / "tiny" / "final")
    Zaya(ZayaConfig.preset("smoke", vocab_size=tokenizer.vocab_size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert "sort 3917" in capsys.readouterr().out


if __name__ == "__main__":
    evidence().main()
    for one in made_tables():
        text = make(one)
        with open(f"{one}.tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{one}.tmp", one)
        print(os.path.relpath(one, ROOT))
