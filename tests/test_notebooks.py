"""The notebooks run from top to bottom on the embedded base, and are kept without outputs.

By default in this process, with few steps and problems; `pytest -m slow` runs them in a kernel, at the
reader's own sizes.
"""

import contextlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from patience import HANG

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {"STEPS": 3, "PROBLEMS": 4}  # what a notebook names so, a test sets


def cells(path, kind):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def set_names(notebook, **values):
    """Change the lines `NAME = ...` of the code cells; a notebook need not have all names."""
    for cell in notebook.cells:
        for name, value in values.items() if cell.cell_type == "code" else ():
            cell.source = re.sub(rf"^{name} = .*$", f"{name} = {value}", cell.source, count=1, flags=re.M)


def read(path, **values):
    """A notebook on the embedded base, with these values of its names."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    set_names(notebook, TINY=True, **values)
    return notebook


def execute(path, folder, **values):
    """Run a notebook in `folder` in a kernel of its own, see `read`; the executed cells."""
    nbclient = pytest.importorskip("nbclient")
    notebook = read(path, **values)
    nbclient.NotebookClient(notebook, timeout=HANG, resources={"metadata": {"path": str(folder)}}).execute()
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code" and c.source)
    return notebook.cells


def execute_here(path, folder, **values):
    """The same without the ten seconds in which a kernel imports what is imported here."""
    shells = pytest.importorskip("IPython.core.interactiveshell")
    traitlets = pytest.importorskip("traitlets.config")
    quiet = traitlets.Config(HistoryManager={"enabled": False})
    # A name of its own: `__main__` stays pytest's.
    shell = shells.InteractiveShell(config=quiet, user_ns={"__name__": path.stem})
    with contextlib.chdir(folder):
        for cell in read(path, **values).cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source).raise_error()


LONG = {"03_sft_vs_dft", "04_should_i_use_dft", "05_sft_dft_grpo"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LONG else []) for p in NOTEBOOKS],
)
def test_a_notebook_runs_on_the_embedded_base(path, tmp_path):
    execute_here(path, tmp_path, **SMALL)
    for metrics in tmp_path.rglob("metrics.jsonl"):  # SMALL reached it: nobody's machine trains for long
        assert len(metrics.read_text().splitlines()) == SMALL["STEPS"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_at_the_readers_size(path, tmp_path):
    execute(path, tmp_path)


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


@pytest.mark.slow
def test_the_quickstart_runs_in_the_float16_of_a_t4(tmp_path):
    """The T4's rule on a CPU: float16 with loss scaling. One changed line stands for the GPU."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('changes = [f"output', 'changes = ["model.dtype=float16", f"output')
    nbformat.write(notebook, path := tmp_path / "quickstart.ipynb")
    execute(path, tmp_path, **SMALL)
    (run,) = tmp_path.rglob("run.json")
    assert json.loads(run.read_text())["provenance"]["dtype"] == "float16"


@pytest.mark.slow
def test_the_install_cell_leaves_colabs_torch(tmp_path):
    """What the cell installs, resolved for Colab's Python with the versions that must stay."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    command += ["--target", str(tmp_path), "--only-binary=:all:", "--python-version", "3.12"]
    tags = ["manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{n}" for n in range(5, 36))]
    command += [f"--platform={tag}_x86_64" for tag in tags]
    command += ["-c", str(ROOT / "constraints-colab.txt"), "--report", str(tmp_path / "report.json")]
    subprocess.run([*command, *project["dependencies"]], check=True, timeout=HANG)
    items = json.loads((tmp_path / "report.json").read_text())["install"]
    chosen = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in items}
    assert chosen["torch"] == "2.11.0" and chosen["numpy"] == "2.0.2"
    assert {"transformers", "bitsandbytes", "math-verify", "gradio"} <= set(chosen)


def test_all_five_are_there():
    assert [p.stem for p in NOTEBOOKS] == [
        "01_quickstart",
        "02_dft_from_scratch",
        "03_sft_vs_dft",
        "04_should_i_use_dft",
        "05_sft_dft_grpo",
    ]
