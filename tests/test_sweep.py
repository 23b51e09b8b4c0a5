"""Sweeps: what they train, what they refuse, that they go on, and that each objective keeps its own best."""

import json

import pytest
from click.testing import CliRunner

from dft_lora.cli import main
from dft_lora.config import load_recipe
from dft_lora.errors import Interrupted, RecipeError, RequestError
from dft_lora.experiments.own_samples import own_samples
from dft_lora.experiments.sweep import Sweep, _plan, run_sweep
from dft_lora.runs.folder import RunFolder, read_lines
from dft_lora.tasks.judge import judge
from dft_lora.training import loop

pytestmark = pytest.mark.usefixtures("many_runs")

FILE = """
recipe: tiny_dft
set:
  {{data.sample: 8, train.max_steps: 1, train.batch_size: 4, train.micro_batch_size: 4, evaluate.samples: 2}}
grid:
  objective.name: [sft, dft]
  train.learning_rate: [1.0e-3, 3.0e-3]
task: arithmetic-validation
limit: 6
output: {output}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    file = out / "sweep.yaml"
    file.write_text(FILE.format(output=out / "runs"))
    return file, out / "runs", run_sweep(Sweep.load(file))


def test_every_combination_is_trained_on_the_same_data(made):
    _, out, report = made
    assert len(report["runs"]) == 4
    found = [RunFolder(out / name).run() for name in report["runs"]]
    assert len({run["data_hash"] for run in found}) == 1
    assert {(r["recipe"]["objective"]["name"], r["recipe"]["train"]["learning_rate"]) for r in found} == {
        (objective, rate) for objective in ("sft", "dft") for rate in (1e-3, 3e-3)
    }


def test_each_objective_keeps_its_own_best(made):
    _, _, report = made
    for objective, best in report["best"].items():
        rivals = [run["avg"] for run in report["runs"].values() if run["objective"] == objective]
        assert report["runs"][best]["objective"] == objective
        assert report["runs"][best]["avg"] == max(rivals)
    assert [(p["a"], p["b"]) for p in report["paired"]] == [tuple(report["best"].values())]


def test_it_goes_on_and_trains_nothing_twice(made):
    """The command again: one adapter was lost, the others keep their bytes and dates."""
    import shutil

    file, out, report = made
    names = list(report["runs"])
    shutil.rmtree(out / names[0])
    dates = {
        name: (out / name / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns for name in names[1:]
    }
    done = CliRunner().invoke(main, ["train", "--sweep", str(file)])
    assert done.exit_code == 0, done.output
    again = json.loads((out / "sweep.json").read_text())
    assert {n: r["avg"] for n, r in again["runs"].items()} == {n: r["avg"] for n, r in report["runs"].items()}
    for name, date in dates.items():
        assert (out / name / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == date
    assert "of its objective" in done.stdout


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"model.quantization": ["nf4", "none"]}, "the runs of a sweep share a base"),
        ({"model.dtype": ["bfloat16", "float32"]}, "the runs of a sweep share a base"),
        ({"data": [{"source": "arithmetic"}]}, "see the same data"),
        ({"objective.name": ["dft", "sft"], "objective.floor": [0.1]}, "'sft' has no such number"),
    ],
)
def test_a_grid_that_cannot_end_is_refused_before_training(grid, message):
    with pytest.raises(RecipeError, match=message):
        Sweep(recipe="tiny_dft", grid=grid, task="arithmetic-validation").recipes()


def test_the_plan_of_a_finished_run_has_its_own_objective():
    """Runs share the rendered data; steps per rollout depend on the objective and its numbers."""
    changes = ["rollouts.samples=4", "train.batch_size=16", "train.max_steps=6", "data.sample=8"]
    for change, each in (("objective.name=sft", 6), ("objective={name: grpo, kl: 0.1}", 1)):
        plan = _plan(load_recipe("tiny_rft", [*changes, change]))
        assert plan.steps_each == each and plan.objective.name == plan.recipe.objective.name
    assert plan.objective.kl == 0.1


def test_another_recipe_in_the_same_folder_is_refused(made):
    file, _, _ = made
    with pytest.raises(RequestError, match=r"train\.warmup was 0\.1, is 0\.5"):
        other = Sweep.load(file)
        run_sweep(other.model_copy(update={"set": {**other.set, "train.warmup": 0.5}}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid": {"train.learning_rte": [1e-3]}}, "learning_rate"),
        ({"grid": {"train.learning_rate": [-1]}}, "learning_rate"),
        ({"grid": {"objective.name": []}}, "no values"),
        ({"grid": {"train.seed": [0, 1]}}, "same data"),
        ({"grid": {"data.source": ["arithmetic"]}}, "same data"),
        ({"task": "aritmetic-validation"}, "arithmetic-validation"),
        ({"recipe": "tiny_dtf"}, "tiny_dft"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, change, said):
    values = {"recipe": "tiny_dft", "grid": {"objective.name": ["sft"]}, "task": "arithmetic-validation"}
    with pytest.raises(RequestError, match=said):
        run_sweep(Sweep.model_validate({**values, **change, "output": str(tmp_path / "runs")}))
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_run_says_how_to_continue(tmp_path, monkeypatch):
    """A sweep has no --resume: starting it again continues it."""

    def stopped(recipe, resume):
        raise Interrupted("runs/sweep/sft: stopped after step 3 of 120", 2)

    monkeypatch.setattr(loop, "train", stopped)
    sweep = Sweep(
        recipe="tiny_dft",
        grid={"objective.name": ["sft"]},
        task="arithmetic-validation",
        output=str(tmp_path / "runs"),
    )
    with pytest.raises(Interrupted, match="step 3 of 120; run the same command again to continue") as raised:
        run_sweep(sweep)
    assert raised.value.exit_code == 130 and "--resume" not in str(raised.value)


@pytest.mark.parametrize("text", ["grid: {}\nrecipe: tiny_dft\ntask: x", "- 1", "gird: 3", "a: [", ""])
def test_broken_files_end_in_one_line(tmp_path, text):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    done = CliRunner().invoke(main, ["train", "--sweep", str(file)])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1 and "sweep.yaml" in done.stderr


def test_own_samples_are_verified_and_made_once(tmp_path):
    recipe = load_recipe("tiny_dft", ["data.sample=24"])
    file = own_samples(recipe, tmp_path / "own.jsonl", samples=2, max_new_tokens=96)
    rows = list(read_lines(file))
    assert rows and all(judge(row["solution"], row["answer"]).correct for row in rows)
    assert len({(row["problem"], row["solution"]) for row in rows}) == len(rows)
    date = file.stat().st_mtime_ns
    assert own_samples(recipe, file, samples=2, max_new_tokens=96).stat().st_mtime_ns == date
    with pytest.raises(RequestError, match=r"own\.jsonl exists, and these files were not all made"):
        own_samples(recipe, file, samples=1, max_new_tokens=96)
    changed = own_samples(recipe, file, samples=1, max_new_tokens=96, overwrite=True)
    assert changed.stat().st_mtime_ns != date


def test_a_value_with_any_characters_is_one_run_of_its_own_name(tmp_path):
    sweep = Sweep(
        recipe="tiny_dft",
        grid={"adapter.target_modules": ["./a", "me/b: #1"]},
        task="arithmetic",
        output=str(tmp_path / "my: sweep #2"),
    )
    recipes = sweep.recipes()
    assert [recipe.adapter.target_modules for recipe in recipes.values()] == ["./a", "me/b: #1"]
    assert {recipe.output_dir.parent for recipe in recipes.values()} == {tmp_path / "my: sweep #2"}
