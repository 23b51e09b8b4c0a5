"""The runs that come with the package: of today's recipe, base and template, portable, and small."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

from dft_lora.errors import RequestError
from dft_lora.evaluation.tokens import score
from dft_lora.experiments.demo import RUNS, demo_recipe
from dft_lora.experiments.shipped import HOME, PER_RUN, make, shipped_runs
from dft_lora.runs.atomic import damage
from dft_lora.tasks import get_task
from dft_lora.training.plan import make_plan
from dft_lora.training.resume_guard import base_fingerprint, guarded_fields, refuse_differences
from dft_lora.ui.server import default_runs
from dft_lora.ui.session import Session

ROOT = Path(__file__).resolve().parent.parent
AGAIN = "out of date: python -m dft_lora.experiments.shipped makes the shipped runs again"


def recorded_text(home: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(home.rglob("*.json*")))


@pytest.mark.parametrize("name", RUNS[1:])
def test_shipped_adapters_are_what_the_recipe_trains_today(name):
    """Recipe, data, template and base, as --resume compares them: a field that came later is its default."""
    run = next(folder for folder in shipped_runs() if folder.name == name)
    recipe = demo_recipe(name, Path("runs/demo"))
    assert run.recipe() == recipe, AGAIN
    try:
        today = guarded_fields(make_plan(recipe), torch.device("cpu"), 1)
        refuse_differences(run.run()["identity"], today, extend=False)
    except RequestError as changed:
        pytest.fail(f"{AGAIN} ({changed})")
    assert len(run.metrics()) == recipe.train.max_steps
    assert damage(run.adapter) is None


def test_the_shipped_base_has_todays_template_and_weights():
    base, trained, _ = (folder.run() for folder in shipped_runs())
    assert base["template_hash"] == trained["template_hash"], AGAIN
    assert trained["identity"]["base"] == base_fingerprint(shipped_runs()[0].recipe().model), AGAIN


def test_the_shipped_report_is_about_the_shipped_adapters():
    """Mean probability of the reference solutions' tokens: computed again from the adapters."""
    report = json.loads((HOME / "report.json").read_text())
    session = Session(shipped_runs())
    examples = [session.renderer.render(problem) for problem in get_task("arithmetic").problems()[:128]]
    for run in RUNS:
        table = score(session.model, examples, pad_id=session.renderer.pad_id, adapter=session.adapters[run])
        expected = report["tokens"]["arithmetic"][run]["mean_probability"]
        assert float(table.p_M.mean()) == pytest.approx(expected, rel=1e-3), AGAIN


def test_shipped_runs_name_no_machine_and_stay_small():
    assert not re.search(r"(?<![\w.])(/|[A-Z]:\\)\w", recorded_text(HOME))
    assert sum(file.stat().st_size for file in HOME.rglob("*")) < 2e6


@pytest.mark.slow
def test_making_them_again_records_no_path_and_leaves_no_scratch(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    home = tmp_path / "shipped"
    (home / "old").mkdir(parents=True)
    make(home, limit=2, changes=("train.max_steps=2", "data.sample=64", "evaluate.samples=1"))
    names = {path.relative_to(home).as_posix() for path in home.glob("*/*")}
    assert names == {f"{run}/{name}" for run in RUNS[1:] for name in PER_RUN} | {"base/run.json"}
    assert (home / "report.json").is_file() and not list((tmp_path / "scratch").iterdir())
    assert str(tmp_path) not in recorded_text(home) and str(ROOT) not in recorded_text(home)
    assert damage(home / "dft" / "adapter") is None


def test_the_page_prefers_a_demo_made_here(tmp_path):
    assert [folder.path for folder in default_runs(tmp_path)] == [folder.path for folder in shipped_runs()]
    (tmp_path / "demo").symlink_to(HOME, target_is_directory=True)
    assert [folder.path for folder in default_runs(tmp_path)] == [tmp_path / "demo" / run for run in RUNS]


def test_every_file_of_the_package_is_package_data():
    tracked = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "dft_lora"]
    files = subprocess.run(tracked, capture_output=True, text=True, check=True).stdout.split()
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    patterns = tool["setuptools"]["package-data"]["dft_lora"]
    packed = {file.relative_to(ROOT) for pattern in patterns for file in (ROOT / "dft_lora").glob(pattern)}
    assert {Path(file) for file in files if not file.endswith(".py")} <= packed
