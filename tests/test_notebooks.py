"""Every notebook runs from top to bottom, and its outputs are stored.  The tests write nothing; this does:

    python tests/test_notebooks.py                       # makes all stored outputs anew, or those of the files named

without what would show up in every diff: execution times, printouts torn in pieces, the Python's version.
A notebook may shorten its training when the environment has CI=1, as in the tests; its asserts still hold or fail.
"""
import copy
import glob
import os
import sys

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, "notebooks")
NOTEBOOKS = sorted(glob.glob(os.path.join(FOLDER, "*.ipynb")))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shows(cell):
    """What a cell left: "text", "picture", "stderr", "error"."""
    found = set()
    for output in cell.outputs:
        if output.output_type == "error" or output.get("name") == "stderr":
            found.add("error" if output.output_type == "error" else "stderr")
        else:
            found.add("picture" if "image/png" in output.get("data", {}) else "text")
    return found


def execute(notebook, folder=FOLDER):
    """A copy, run top to bottom in a folder."""
    executed = copy.deepcopy(notebook)
    nbclient.NotebookClient(executed, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": folder}}).execute()
    executed.metadata.language_info = {"name": "python"}
    return executed


def faults(stored, executed):
    """What is wrong with a notebook as it is stored, one sentence each."""
    found = []
    for number, (cell, again) in enumerate(zip(code_cells(stored), code_cells(executed)), 1):
        if cell.execution_count != number:
            found.append(f"code cell {number} was run as number {cell.execution_count}: run it all, top to bottom")
        if shows(cell) & {"error", "stderr"}:
            found.append(f"code cell {number} stores an error, a warning or a progress bar")
        elif shows(cell) != shows(again):
            found.append(f"code cell {number} stores {sorted(shows(cell)) or 'nothing'}, run it gives "
                         f"{sorted(shows(again)) or 'nothing'}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=os.path.basename)
def test_it_runs_and_shows_what_is_stored(path, monkeypatch):
    """Not in its own folder: a reader may start Jupyter anywhere in the repository."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")              # see conftest.py
    monkeypatch.delenv("MPLBACKEND", raising=False)         # Agg would draw nothing
    assert not faults(read(path), execute(read(path), ROOT))


def test_all_begin_with_the_same_cell():
    """It finds the project and installs what is missing: one text, in eight places."""
    assert len(NOTEBOOKS) == 8 and len({code_cells(read(path))[0].source for path in NOTEBOOKS}) == 1


# ---- the checks themselves can fail ----------------------------------------------------------------------------------

def stored(*outputs, count=1):
    return new_notebook(cells=[new_code_cell("print(1)", execution_count=count, outputs=list(outputs))])


PRINTED, DRAWN = new_output("stream", name="stdout", text="1\n"), new_output("display_data", {"image/png": "…"})
BAD = {"was run as number 7": stored(PRINTED, count=7),
       "stores an error": stored(new_output("error", ename="E", evalue="", traceback=[])),
       "a progress bar": stored(PRINTED, new_output("stream", name="stderr", text="careful")),
       "stores nothing, run it gives ['text']": stored(),
       "stores ['picture', 'text'], run it gives ['text']": stored(PRINTED, DRAWN)}


def test_a_good_notebook_has_no_fault():
    assert faults(stored(PRINTED), stored(PRINTED)) == []


@pytest.mark.parametrize("what", BAD)
def test_a_bad_notebook_is_told_why(what):
    assert [what in fault for fault in faults(BAD[what], stored(PRINTED))] == [True]


if __name__ == "__main__":
    for one in sys.argv[1:] or NOTEBOOKS:
        executed = execute(read(one))
        nbformat.write(executed, one)
        print(one, *faults(executed, executed), sep="\n    ")
