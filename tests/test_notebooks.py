"""The notebooks run from top to bottom on the embedded base, and are kept without outputs."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_the_embedded_base(path, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells[1].source = notebook.cells[1].source.replace("TINY = None", "TINY = True")
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code" and c.source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_stripped_and_opens_on_colab(path):
    raw = json.loads(path.read_text())
    code = [c for c in raw["cells"] if c["cell_type"] == "code"]
    assert len(code) <= 20
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
    (repository,) = re.findall(
        r'REPOSITORY = "https://github.com/([\w-]+/[\w-]+)"', "\n".join(cells(path, "code"))
    )
    assert (
        f"colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
        in cells(path, "markdown")[0]
    )


def test_all_four_are_there():
    assert [p.stem for p in NOTEBOOKS] == [
        "01_quickstart",
        "02_dft_from_scratch",
        "03_sft_vs_dft",
        "04_should_i_use_dft",
    ]
