"""The wheel holds the whole package and nothing else, the sdist makes the same wheel, and the wheel runs."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """What `python -m build` makes of a copy of the tracked files: the sdist, and a wheel from it."""
    pytest.importorskip("build", reason="pip install build")
    try:
        if int(version("setuptools").split(".")[0]) < 77:
            pytest.skip("setuptools is older than pyproject.toml asks for")
    except PackageNotFoundError:
        pytest.skip("setuptools is not installed")
    home = tmp_path_factory.mktemp("build")
    for name in tracked():
        (home / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, home / "source" / name)
    # without isolation: setuptools is here, and is not fetched anew
    line = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(home / "dist"),
        str(home / "source"),
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return home / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    return next(dist.glob("*.whl"))


def test_the_index_would_take_both_files_and_show_the_readme(dist):
    pytest.importorskip("twine", reason="pip install twine")
    line = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout


def test_the_sdist_holds_what_the_repository_does(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"examples/alpaca.yaml", "LICENSE", "README.md"} <= held


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked in a folder of its own, as `pip install --no-deps --target` leaves it."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {name for name in tracked() if name.startswith("dft_lora/")}


def run(installed, *arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


ALONE = """
import sys, torch
from importlib.abc import MetaPathFinder

OF_TORCH = {"torch", "numpy", "sympy", "mpmath", "typing_extensions", "networkx", "jinja2", "markupsafe",
            "filelock", "fsspec", "triton"}

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        ours = name == "dft_lora" or name.startswith("dft_lora.loss")
        if not ours and top not in sys.stdlib_module_names | OF_TORCH:
            raise ImportError(f"{name} is not torch")

sys.meta_path.insert(0, Blocked())
from dft_lora.loss import ObjectiveError, gradient_weights, objective, objective_names, token_logps

hidden = torch.randn(6, 4, requires_grad=True)
targets = torch.tensor([1, -100, 3, 8, 0, -100])
sequence = torch.arange(6) // 2
names = [name for name in objective_names() if objective(name).learns_from == "solutions"]
for name in names:
    wanted, weight = objective(name), torch.randn(9, 4)
    with torch.no_grad():
        reference = token_logps(hidden, weight, targets, keep_jacobian=True)
    scores = token_logps(
        hidden, weight, targets, needs=wanted.needs, sequence=sequence, reference=reference
    )
    wanted(scores).backward()
try:
    objective("dtf")
except ObjectiveError as error:
    assert "did you mean 'dft'" in str(error)
print(sorted(m for m in sys.modules if m.startswith("dft_lora") and not m.startswith("dft_lora.loss")))
"""


def test_the_loss_of_the_wheel_needs_torch_alone(installed, tmp_path):
    """Every other import is blocked, the rest of this package included."""
    done = run(installed, "-c", ALONE + "\nimport dft_lora; print(dft_lora.__file__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    modules, where = done.stdout.splitlines()
    assert modules == "['dft_lora']" and where.startswith(str(installed))


def test_the_wheel_runs_without_the_repository(installed, tmp_path):
    """Recipes, the embedded base, its data and a training step are all in the package."""
    small = ["train.max_steps=1", "train.batch_size=2", "train.micro_batch_size=2", "data.sample=4"]
    changes = [part for change in small for part in ("--set", change)]
    done = run(installed, "-m", "dft_lora", "train", "tiny_dft", *changes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny_dft" / "adapter" / "adapter_model.safetensors").is_file()
