"""The command line: light, and one clear line for a wrong request, before anything is loaded."""

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from evidence_runs import answered

from dft_lora.cli import OUT_OF_MEMORY, main
from dft_lora.config import parse_recipe
from dft_lora.errors import RunError
from dft_lora.runs.folder import new_folder

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "gradio",
    "numpy",
    "scipy",
    "matplotlib",
    "bitsandbytes",
)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_import_and_help_pull_in_no_heavy_package():
    code = (
        "import sys, dft_lora, dft_lora.cli\n"
        "try: dft_lora.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_exports_and_all_agree():
    import dft_lora

    assert sorted(dft_lora.__all__) == sorted(dft_lora._HOMES)
    for name in dft_lora.__all__:
        assert getattr(dft_lora, name).__name__ == name
    with pytest.raises(AttributeError):
        dft_lora.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("recipe", "where"),
    [
        ("tiny_dft", "transformers.AutoModelForCausalLM.from_pretrained"),
        ("tiny_rft", "dft_lora.training.rollouts.generate"),
    ],
)
def test_out_of_memory_is_one_line(monkeypatch, tmp_path, recipe, where):
    """While the base is loaded, or answers are sampled. Any other error keeps its traceback."""
    import torch

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(where, fails)
    command = ("train", recipe, "--set", "data.sample=12")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    done = invoke(*command, "--set", f"output={tmp_path / 'a'}")
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert done.stderr.splitlines()[-1] == f"error: {OUT_OF_MEMORY}"
    error = RuntimeError("something else")
    assert invoke(*command, "--set", f"output={tmp_path / 'b'}").exception is error


def test_every_command_has_an_example():
    def walk(command, path):
        for name, sub in getattr(command, "commands", {}).items():
            if not getattr(sub, "commands", None):
                assert f"Example: dft-lora {' '.join([*path, name])}" in sub.help, name
            walk(sub, [*path, name])

    walk(main, [])


def test_the_example_of_each_set_is_one_that_its_command_takes():
    found = 0
    for command in main.commands.values():
        for option in command.params:
            if "--set" in option.opts:
                what, example = re.search(
                    r"Override an? (\w+) field, for example (\S+);", option.help
                ).groups()
                prefix = "evaluate." if what == "evaluate" else ""
                parse_recipe({}).override([prefix + example])
                assert (command.name == "evaluate") == (what == "evaluate")
                found += 1
    assert found == 6


def refused(*arguments):
    """The one line of a refused request."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"problem": "1+1?", "solution": "2"}) + "\n")
    return file


def test_wrong_requests_are_refused_before_a_model_is_loaded(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(
        "dft_lora.model.backends.load_base", lambda *a, **k: pytest.fail("a model was loaded")
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = f"output={tmp_path / 'run'}"

    def train(*changes):
        return refused("train", "tiny_dft", *(x for change in (out, *changes) for x in ("--set", change)))

    assert "no file" in train("data.source=nope.jsonl")
    assert "no column 'question'" in train(f"data.source={rows}", "data.prompt=question")
    assert "model.name" in train("model.name=./nope")
    assert "did you mean 'learning_rate'" in train("train.learning_rat=1")
    assert "did you mean 'dft'" in train("objective.name=dfft")
    assert "template" in train("data.template=nope")
    assert "longer than data.max_length 2" in train(f"data.source={rows}", "data.max_length=2")
    rows.write_text('{"problem": "x", "solution": ""}\n')
    assert "row 1" in train(f"data.source={rows}")
    rows.write_text("")
    assert "no rows" in train(f"data.source={rows}")
    assert not (tmp_path / "run").exists()
    assert "no recipe" in refused("train", tmp_path / "nope.yaml")


def test_an_output_that_exists_or_cannot_be_written_is_refused(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("precious")
    assert "exists" in refused("train", "tiny_dft", "--set", f"output={taken}")
    assert "exists" in refused("train", "tiny_dft", "--set", f"output={taken / 'mine.txt'}")
    assert "cannot write" in refused("train", "tiny_dft", "--set", f"output={taken / 'mine.txt' / 'run'}")
    assert "demo did not write" in refused("demo", "--out", taken)
    assert [p.name for p in taken.iterdir()] == ["mine.txt"] and (
        taken / "mine.txt"
    ).read_text() == "precious"


def test_a_merge_that_fails_leaves_no_folder(tmp_path):
    out = tmp_path / "merged"
    with pytest.raises(RunError, match="merged could not be written"), new_folder(out, "OUT"):
        (out / "half.safetensors").write_text("half")
        raise OSError(28, "No space left on device")
    assert not out.exists()


def test_evaluate_and_compare_refuse_what_is_no_run(tmp_path):
    assert "not a run folder" in refused("evaluate", tmp_path)
    assert "not a run folder" in refused("compare", tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"recipe": {"modle": {}}, "template": "", "template_hash": ""}']
)
def test_a_broken_run_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    for command in ("evaluate", "compare", "app"):
        assert "run.json" in refused(command, tmp_path)


def test_a_run_named_twice_is_refused(tmp_path):
    run = answered(tmp_path / "run", [[1, 0], [0, 1]]).path
    for command in ("evaluate", "compare", "app"):
        assert "is named twice" in refused(command, run, tmp_path / "." / "run" / ".." / "run")


def test_recipes_list_show_copy(tmp_path):
    listed = invoke("recipes", "list").output
    assert listed.startswith("lora_dft ") and "tiny_dft" in listed
    assert "diagnose RECIPE" in listed.splitlines()[-3] and "lora_power is" in listed.splitlines()[-2]
    shown = invoke("recipes", "show", "tiny_dft").output
    target = tmp_path / "mine.yaml"
    assert invoke("recipes", "copy", "tiny_dft", target).exit_code == 0
    assert target.read_text() == shown
    assert "exists" in refused("recipes", "copy", "tiny_dft", target)
    assert "did you mean 'tiny_dft'" in refused("recipes", "show", "tiny_dt")


def test_an_unknown_command_names_the_nearest():
    result = invoke("trian")
    assert result.exit_code == 2 and "did you mean 'train'" in result.stderr


def test_doctor_tells_versions_and_device():
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["torch"] and "device" in found
    assert found["loss row pass"].startswith(("torch operations (", "Triton kernel"))
