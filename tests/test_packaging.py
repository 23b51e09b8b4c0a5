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
from test_loss import ALONE

ROOT = Path(__file__).parent.parent
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def built(source: Path, kind: str, out: Path) -> Path:
    """Build with setuptools as pip does, without fetching it anew."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the sdist, which is built from a copy of the tracked files."""
    try:
        if int(version("setuptools").split(".")[0]) < 77:
            pytest.skip("setuptools is older than pyproject.toml asks for")
    except PackageNotFoundError:
        pytest.skip("setuptools is not installed")
    home = tmp_path_factory.mktemp("build")
    for name in tracked():
        (home / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, home / "source" / name)
    with tarfile.open(built(home / "source", "sdist", home)) as sdist:
        sdist.extractall(home / "sdist", filter="data")
    (unpacked,) = (home / "sdist").iterdir()
    assert (unpacked / "examples" / "alpaca.yaml").is_file() and (unpacked / "LICENSE").is_file()
    return built(unpacked, "wheel", home)


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


def test_the_loss_of_the_wheel_needs_torch_alone(installed, tmp_path):
    code = ALONE + "\nimport dft_lora; print(dft_lora.__file__)"
    done = run(installed, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(installed))


def test_the_wheel_runs_without_the_repository(installed, tmp_path):
    """Recipes, the embedded base, its data and a training step are all in the package."""
    small = ["train.max_steps=1", "train.batch_size=2", "train.micro_batch_size=2", "data.sample=4"]
    changes = [part for change in small for part in ("--set", change)]
    done = run(installed, "-m", "dft_lora", "train", "tiny_dft", *changes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny_dft" / "adapter" / "adapter_model.safetensors").is_file()
