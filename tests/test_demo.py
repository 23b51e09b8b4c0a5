"""`make demo` at a small size: the three runs, the promised report, and what a second run may replace."""

import contextlib
import json

import pytest
from click.testing import CliRunner

from dft_lora.cli import main
from dft_lora.errors import RequestError
from dft_lora.experiments import demo
from dft_lora.experiments.demo import clear, demo_recipe, keep_mark, run_demo
from dft_lora.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("many_runs")


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """`--quick` on fewer rows and problems: the demo runs three times here."""
    fewer = ("data.sample=64", "train.batch_size=8", "train.micro_batch_size=8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", (*demo.QUICK, *fewer))
        patch.setattr(demo, "QUICK_LIMIT", 6)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo"
    run_demo(path, quick=True)
    return path


def test_the_report_holds_what_is_promised(out):
    report = json.loads((out / "report.json").read_text())
    assert list(report["runs"]) == ["base", "sft", "dft"]
    keys = {"avg", "ci95", "greedy", "samples", "problems", "truncated", "unparsable"}
    for run in report["runs"].values():
        assert list(run["tasks"]) == ["arithmetic", "arithmetic-long"]
        for result in run["tasks"].values():
            assert keys <= set(result)
            assert result["ci95"][0] <= result["avg"] <= result["ci95"][1]
    pairs = {(entry["a"], entry["b"]) for entry in report["paired"]}
    assert pairs == {("base", "sft"), ("base", "dft"), ("sft", "dft")}
    assert {"difference", "ci95", "p_value", "task"} <= set(report["paired"][0])
    assert report["provenance"]["versions"]["torch"]


def test_files_are_where_they_are_promised(out):
    for name in ("report.md", "plots/accuracy.png", "plots/training.png"):
        assert (out / name).stat().st_size > 0, name
    for run in ("sft", "dft"):
        for name in ("adapter/adapter_model.safetensors", "run.json", "metrics.jsonl", "report.json"):
            assert (out / run / name).is_file(), name
    lines = (out / "base" / "evaluation" / "arithmetic.jsonl").read_text().splitlines()
    assert {"problem", "text", "extracted", "verdict"} <= set(json.loads(lines[0]))
    assert not list(out.rglob("*.pkl")) + list(out.rglob("*.bin")) + list(out.rglob("*.pt"))


def test_sft_and_dft_differ_in_the_objective_alone(out):
    sft, dft = (json.loads((out / name / "run.json").read_text()) for name in ("sft", "dft"))
    differing = {key for key in sft["recipe"] if sft["recipe"][key] != dft["recipe"][key]}
    assert differing == {"name", "objective", "output"}
    assert sft["data_hash"] == dft["data_hash"] and sft["template_hash"] == dft["template_hash"]


@pytest.mark.slow
def test_a_second_demo_replaces_what_it_wrote_and_nothing_else(out):
    (out / "mine.txt").write_text("precious")
    with pytest.raises(RequestError, match=r"mine\.txt"):
        run_demo(out, quick=True)
    assert (out / "report.json").is_file() and (out / "mine.txt").read_text() == "precious"
    (out / "mine.txt").unlink()
    before = json.loads((out / "report.json").read_text())["runs"]
    run_demo(out, quick=True)
    again = json.loads((out / "report.json").read_text())["runs"]
    assert [r["tasks"] for r in again.values()] == [r["tasks"] for r in before.values()]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The folder in which `dft-lora demo --quick --clean` was run."""
    home = tmp_path_factory.mktemp("clean")
    with contextlib.chdir(home):
        done = CliRunner().invoke(main, ["demo", "--quick", "--clean"])
    assert done.exit_code == 0, done.output
    return home


@pytest.mark.slow
def test_a_demo_on_the_clean_set_stands_beside_the_other(out, clean):
    erring, right = (RunFolder(path / "dft").run() for path in (out, clean / "runs" / "demo-clean"))
    differing = {key for key in right["recipe"] if right["recipe"][key] != erring["recipe"][key]}
    assert differing == {"data", "output"}
    assert right["recipe"]["data"] == {**erring["recipe"]["data"], "split": "train-clean"}
    assert right["data_hash"] != erring["data_hash"]
    assert not (clean / "runs" / "demo").exists()
    check_training_data(clean / "runs" / "demo-clean", "train-clean")


def check_training_data(path, split):
    runs = json.loads((path / "report.json").read_text())["runs"]
    assert "data" not in runs["base"]
    for name in ("sft", "dft"):
        assert runs[name]["data"] == {"source": "arithmetic", "split": split}
        figures, steps = runs[name]["training"], RunFolder(path / name).metrics()
        assert figures["steps"] == len(steps) == 6
        for key in ("loss", "nll"):
            assert figures[key] == pytest.approx(sum(step[key] for step in steps) / 6)


def test_the_report_says_what_each_adapter_was_trained_on(out):
    check_training_data(out, "train")


def test_what_the_mark_names_is_removed_below_the_folder_alone(tmp_path):
    """The mark is a file like any other: a foreign one must not reach other folders."""
    out = tmp_path / "out"
    for folder in (out, tmp_path / "precious", tmp_path / "linked"):
        folder.mkdir()
        (folder / "report.md").write_text("precious")
    (out / "sft").symlink_to(tmp_path / "linked")
    wrote = ["sft", "report.md", "../precious", str(tmp_path / "precious")]
    (out / "demo.json").write_text(json.dumps({"wrote": wrote}))
    clear(out)
    assert [path.name for path in out.iterdir()] == ["demo.json"]
    assert (tmp_path / "precious/report.md").is_file() and (tmp_path / "linked/report.md").is_file()


def test_what_was_added_to_a_finished_demo_is_not_removed(tmp_path):
    (tmp_path / "sft" / "steps" / "step-000003").mkdir(parents=True)
    keep_mark(tmp_path, finished=True)
    (tmp_path / "sft" / "steps" / "step-000003" / "run.json").touch()  # as the page's Steps tab does
    (tmp_path / "sft" / "plots").mkdir()
    (tmp_path / "sft" / "plots" / "gsm8k.png").touch()  # as evaluate does, from the answers
    (tmp_path / "sft" / ".lock").touch()  # as a killed evaluation does
    (tmp_path / "sft" / "gsm8k.jsonl").touch()
    with pytest.raises(RequestError, match=r"did not write \(sft/gsm8k\.jsonl\); move them"):
        clear(tmp_path)
    (tmp_path / "sft" / "gsm8k.jsonl").unlink()
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_a_run_in_training_is_not_removed(tmp_path):
    run = RunFolder(tmp_path / "sft")
    run.path.mkdir()
    (run.path / "run.json").write_text("{}")
    keep_mark(tmp_path)
    with run.held(), pytest.raises(RequestError, match="another process is training"):
        clear(tmp_path)
    assert run.begun
    clear(tmp_path)
    assert not run.path.exists()


def test_a_demo_refused_for_its_seed_leaves_the_last_one(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "demo.json").write_text('{"wrote": ["sft"]}')
    with pytest.raises(RequestError, match=r"train\.seed"):
        run_demo(tmp_path, seed=-1)
    assert (tmp_path / "sft").is_dir()


@pytest.mark.parametrize("name", ["my: demo", "a #1", "[x"])
def test_the_runs_lie_where_out_says(tmp_path, name):
    recipe = demo_recipe("sft", tmp_path / name)
    assert recipe.output_dir == tmp_path / name / "sft" and recipe.name == "sft"
