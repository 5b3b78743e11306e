"""Every notebook runs top to bottom and keeps the form they all share.  The tests write nothing; this does:

    python tests/test_notebooks.py                       # makes all stored outputs anew, or those of the files named

without what would show up in every diff: execution times, printouts torn in pieces, the Python's version.
A notebook may shorten its training when the environment has CI=1, as in the tests; its asserts still hold or fail.
"""
import copy
import glob
import os
import re
import sys

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "notebooks")
NOTEBOOKS = sorted(glob.glob(os.path.join(FOLDER, "*.ipynb")))
MOST_CELLS, MOST_LINES = 22, 14             # "about" 20 code cells of 12 lines
LAST = ["copy this", "what we measured"]


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sections(notebook):
    """[(heading in lower case, its cells)], after the title; a section begins with a markdown line `## …`."""
    found = [("", [])]
    for cell in notebook.cells:
        heading = re.match(r"## +(.*)", cell.source) if cell.cell_type == "markdown" else None
        if heading:
            found.append((heading.group(1).strip().lower(), []))
        found[-1][1].append(cell)
    return found[1:]


def shows(cell):
    """What a cell left: "text", "picture", "stderr", "error"."""
    kinds = {"stream": lambda o: "stderr" if o.name == "stderr" else "text", "error": lambda o: "error"}
    return {kinds.get(o.output_type, lambda o: "picture" if "image/png" in o.data else "text")(o)
            for o in cell.outputs}


def stored_text(notebook):
    return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "")
                     for cell in code_cells(notebook) for o in cell.outputs)


def numbers(text):
    """The numbers in a text that somebody must have measured: decimals, and whole ones of three digits or more."""
    return set(re.findall(r"(?<![\w.,])(?:\d+(?:,\d{3})*\.\d+|\d{3,}|\d{1,3}(?:,\d{3})+)(?![\w.,]*\d)", text))


def execute(notebook):
    """A copy, run top to bottom in the folder notebooks/."""
    executed = copy.deepcopy(notebook)
    nbclient.NotebookClient(executed, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": FOLDER}}).execute()
    executed.metadata.language_info = {"name": "python"}
    return executed


def faults(notebook):
    """What is wrong with a notebook as it is stored, one sentence each."""
    cells, parts, found = code_cells(notebook), sections(notebook), []
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    if len(cells) > MOST_CELLS:
        found.append(f"{len(cells)} code cells, at most {MOST_CELLS}")
    for number, cell in enumerate(cells, 1):
        if len(cell.source.splitlines()) > MOST_LINES:
            found.append(f"code cell {number} has {len(cell.source.splitlines())} lines, at most {MOST_LINES}")
        if cell.execution_count != number:
            found.append(f"code cell {number} was run as number {cell.execution_count}: run it all, top to bottom")
        if shows(cell) & {"error", "stderr"}:
            found.append(f"code cell {number} stores an error, a warning or a progress bar")
        if "execution" in cell.metadata:
            found.append(f"code cell {number} stores its execution times")
        if any(a.output_type == b.output_type == "stream" for a, b in zip(cell.outputs, cell.outputs[1:])):
            found.append(f"code cell {number} stores its printout in pieces")
    if not re.search(r"runs in about \d+ s on 2 cores", text):
        found.append('no line "runs in about N s on 2 cores"')
    if [heading for heading, _ in parts[-2:]] != LAST:
        found.append('the last two sections are not "copy this" and "what we measured"')
    if not any(re.search(r"^\s*assert ", cell.source, re.M) for cell in cells):
        found.append("no assert pins the lesson")
    if parts:
        claimed = "\n".join(cell.source for cell in parts[-1][1] if cell.cell_type == "markdown")
        printed = stored_text(notebook)
        found += [f"{LAST[-1]} says {n}, which no cell printed" for n in sorted(numbers(claimed) - numbers(printed))]
    return found


def differences(stored, executed):
    """Where the stored outputs are not of the kinds that running the notebook makes."""
    pairs = enumerate(zip(code_cells(stored), code_cells(executed)), 1)
    return [f"code cell {number} stores {sorted(shows(a)) or 'nothing'}, run it gives {sorted(shows(b)) or 'nothing'}"
            for number, (a, b) in pairs if shows(a) != shows(b)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=os.path.basename)
def test_the_stored_notebook_keeps_the_form(path):
    assert not faults(read(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=os.path.basename)
def test_it_runs_and_shows_what_is_stored(path, monkeypatch):
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")              # see conftest.py
    monkeypatch.delenv("MPLBACKEND", raising=False)         # Agg would draw nothing
    assert not differences(read(path), execute(read(path)))


# ---- the checks themselves can fail ----------------------------------------------------------------------------------

def good():
    def code(source, number, text="loss 2.25\n"):
        outputs = [new_output("stream", name="stdout", text=text)] if text else []
        return new_code_cell(source, execution_count=number, outputs=outputs)

    return new_notebook(cells=[
        new_markdown_cell("# Title\nruns in about 5 s on 2 cores"), code("import sys", 1, ""),
        new_markdown_cell("## One idea"), code("print('loss 2.25')\nassert True", 2),
        new_markdown_cell("## Copy this\nthe class"), new_markdown_cell("## What we measured\na loss of 2.25")])


def edit(change):
    notebook = good()
    change(code_cells(notebook), notebook.cells)
    return notebook


BAD = {
    "code cells": lambda code, cells: cells.extend(copy.deepcopy(code[0]) for _ in range(MOST_CELLS)),
    "lines": lambda code, cells: code[1].update(source="assert 1\n" * (MOST_LINES + 1)),
    "was run as": lambda code, cells: code[1].update(execution_count=7),
    "an error": lambda code, cells: code[1].outputs.append(new_output("error", ename="E", evalue="", traceback=[])),
    "a warning": lambda code, cells: code[1].outputs.append(new_output("stream", name="stderr", text="careful")),
    "in pieces": lambda code, cells: code[1].outputs.extend(copy.deepcopy(code[1].outputs)),
    "execution times": lambda code, cells: code[0].metadata.update(execution={}),
    "runs in about": lambda code, cells: cells[0].update(source="# Title"),
    "copy this": lambda code, cells: cells.pop(4),
    "no assert": lambda code, cells: code[1].update(source="print('loss 2.25')"),
    "says 2.26": lambda code, cells: cells[-1].update(source="## What we measured\na loss of 2.26"),
}


def test_a_good_notebook_has_no_fault():
    assert faults(good()) == [] == differences(good(), good())


@pytest.mark.parametrize("what", BAD)
def test_a_bad_notebook_is_told_why(what):
    found = faults(edit(BAD[what]))
    assert len(found) >= 1 and all(what in fault for fault in found[:1]), found


def test_a_missing_output_is_found():
    bare = edit(lambda code, cells: code[1].update(outputs=[]))
    assert "stores nothing, run it gives ['text']" in differences(bare, good())[0]


def test_a_picture_is_not_text():
    drawn = edit(lambda code, cells: code[1].update(outputs=[new_output("display_data", {"image/png": "…"})]))
    assert differences(drawn, good())


if __name__ == "__main__":
    for one in sys.argv[1:] or NOTEBOOKS:
        nbformat.write(execute(read(one)), one)
        print(one, *faults(read(one)), sep="\n    ")
