"""The README says only what the committed run of `python train.py` printed, and what the files are."""
import json
import os
import re
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "notebooks", "results", "tiny")


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def test_the_tables_are_the_runs_own():
    readme = read("README.md")
    rows = [line for name in ("tiny/report.md", "kernels.md", "full_size.md") for line in
            read("notebooks", "results", name).splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert all(row in readme for row in rows)


def test_the_printed_lines_are_the_runs_own():
    """Every line of the first code block that is output stands so in the committed log of the run."""
    printed = read(RESULTS, "output.txt").splitlines()
    block = re.findall(r"```text\n(.*?)```", read("README.md"), re.S)[0].splitlines()
    shown = [line for line in block if line.strip() != "…"]
    assert len(shown) > 8
    assert all(line in printed for line in shown), [line for line in shown if line not in printed]


def test_the_minutes_are_the_runs_own():
    report = json.loads(read(RESULTS, "report.json"))
    claimed = re.search(r"from random weights.*?in ([0-9.]+) minutes", read("README.md"), re.S).group(1)
    in_all = re.search(r"^([0-9.]+) minutes in all", read(RESULTS, "output.txt"), re.M).group(1)
    assert claimed == in_all and float(in_all) * 60 >= sum(report["seconds"].values()) - 3


def test_links_and_line_counts_hold():
    readme = read("README.md")
    for path in re.findall(r"\]\(([^)#]+)\)", readme):
        assert path.startswith("https://") or os.path.exists(os.path.join(ROOT, path)), path
    for name, lines in re.findall(r"\| `(\w+\.py)` \| ([\d,]+) \|", readme):
        assert abs(len(read(name).splitlines()) - int(lines.replace(",", ""))) <= 25, name
    for command in ("pip install -r requirements.txt && python train.py",
                    "pip install -r requirements.txt -r tests/requirements.txt && pytest"):
        assert f"\n{command}\n" in readme


def test_the_examples_names_exist():
    import train
    import zaya
    for block in re.findall(r"```python\n(.*?)```", read("README.md"), re.S):
        for name in re.findall(r"from zaya import (.+)", block):
            assert all(hasattr(zaya, part.strip()) for part in name.split(","))
    assert callable(train.trim)


@pytest.mark.parametrize("command", ["markovian_rsa.py", "cluster.py", "evidence.py"])
def test_the_tables_of_scripts_are_what_their_commands_print(command):
    name, *options = command.split()
    said = subprocess.run([sys.executable, os.path.join(ROOT, "notebooks", "experiments", name), *options], text=True,
                          capture_output=True, check=True).stdout
    rows = [line for line in said.splitlines() if line.startswith("|")]
    readme = read("README.md")
    assert len(rows) > 12 and all(row in readme for row in rows), [row for row in rows if row not in readme]
