"""Merging keeps what was learned, cards say what was measured, and foreign tools are called or named."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from hub_stand_in import hub

from dft_lora.cli import main
from dft_lora.config import load_recipe
from dft_lora.data.templates import Renderer
from dft_lora.errors import MissingPart, RequestError, RunError
from dft_lora.export import (
    card,
    difference,
    logits_of,
    merge,
    probe_rows,
    push,
    to_gguf,
    to_llama_cpp,
    vllm_command,
)
from dft_lora.model.load import load_adapters, load_base, load_tokenizer
from dft_lora.runs.folder import RunFolder
from dft_lora.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny-run"
    changes = ("train.max_steps=3", "train.batch_size=8", "train.learning_rate=0.01", "data.sample=64")
    return train(load_recipe("tiny_dft", (*changes, "train.micro_batch_size=8", f"output={out}")))


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "model"
    return out, merge(run, out)


def test_the_merged_model_is_the_16_bit_base_with_the_adapter(run, merged):
    from transformers import AutoModelForCausalLM

    out, drift = merged
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    config = run.recipe().model.model_copy(update={"quantization": "none", "dtype": "float32"})
    rows = probe_rows(load_tokenizer(config), run.run()["template"])
    exact = logits_of(load_adapters(load_base(config)[0], {"default": run.adapter}), rows)
    base = logits_of(load_base(config)[0], rows)
    far = difference(exact, logits_of(model, rows))
    assert far["mean_kl"] < 0.1 * difference(exact, base)["mean_kl"], "what was learned is lost"
    assert far["mean_kl"] < 1e-3 and far["same_top1"] > 0.98
    assert drift["from_unmerged"]["mean_kl"] < drift["from_training"]["mean_kl"], "leaving 4 bits moves more"


def test_merging_refuses_what_exists_and_a_run_without_adapter(run, merged, tmp_path):
    with pytest.raises(RequestError, match="exists"):
        merge(run, merged[0])
    bare = RunFolder(tmp_path / "bare")
    bare.write_run(recipe=run.run()["recipe"])
    with pytest.raises(RequestError, match="no adapter"):
        merge(bare, tmp_path / "out")
    with pytest.raises(RequestError, match="no adapter"):
        push(bare, "a/b")


@pytest.fixture
def copied(run, tmp_path):
    """The run, to be changed."""
    return RunFolder(shutil.copytree(run.path, tmp_path / "copied"))


def test_a_run_whose_extension_was_interrupted_is_not_exported(copied, tmp_path):
    """Its adapter is still that of fewer steps than planned."""
    copied.write_run(steps=6)
    for export in (merge, push, to_llama_cpp):
        with pytest.raises(RequestError, match="no adapter of a finished run"):
            export(copied, tmp_path / "out")


def test_the_card_says_what_the_base_was_held_in(copied):
    drift = {"from_training": {"largest_logit_change": 0.1, "mean_kl": 0.0, "same_top1": 1.0}}
    for held, over in (("nf4", "a base in nf4"), ("none", "a base that was not quantized")):
        metadata = copied.run()
        metadata["recipe"]["model"]["quantization"] = held
        copied.write_run(**metadata)
        text, merged = card(copied), card(copied, merged=True, drift=drift)
        assert f", over {over}\n" in text and f"trained over {over} and merged" in merged
        assert ("qlora" in text) == (held == "nf4") and "qlora" not in merged and "4-bit" not in text + merged


def test_the_card_gives_the_objectives_numbers(copied):
    metadata = copied.run()
    metadata["recipe"]["objective"] = {"name": "dft", "floor": 0.1}
    copied.write_run(**metadata)
    assert card(copied).count("`dft`, floor 0.1") == 2


def test_the_card_of_a_run_whose_last_step_was_skipped(copied):
    metadata = copied.run()
    metadata["figures"]["last"] |= {"nll": None, "mean_probability": None}
    copied.write_run(**metadata)
    assert "Last step: NLL not finite, mean target probability not finite" in card(copied)


def test_the_card_holds_the_figures_of_the_run(run, merged):
    text = card(run)
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "tiny" and header["library_name"] == "peft"
    last = run.metrics()[-1]
    assert f"NLL {last['nll']:.3f}" in text and "`dft`" in text and "Not evaluated." in text
    assert vllm_command(run) in text
    far = merged[1]["from_training"]
    assert f"{far['largest_logit_change']:.3g}" in (merged[0] / "README.md").read_text()


def test_the_card_holds_the_report(run, tmp_path):
    cell = {"avg": 0.5, "ci95": [0.4, 0.6], "greedy": 0.55, "problems": 200}
    run.report_file.write_text(
        json.dumps({"runs": {"tiny-run": {"adapter": run.adapter_digest, "tasks": {"arithmetic": cell}}}})
    )
    try:
        assert "| tiny-run | arithmetic | 50.0% | 40.0% to 60.0% | 55.0% | 200 |" in card(run)
    finally:
        run.report_file.unlink()


def test_the_cards_python_asks_as_in_training(run, merged):
    """The code block of the merged model's card, run as it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", (merged[0] / "README.md").read_text(), re.S)
    names = {}
    exec(code.replace('"tiny-run"', repr(str(merged[0]))), names)
    renderer = Renderer(load_tokenizer(run.recipe().model), run.run()["template"])
    asked = [{"role": "user", "content": names["question"]}]
    assert names["prompt"] == renderer.prompt_text(asked)
    assert names["ids"].input_ids[0].tolist() == renderer.prompt_ids(asked)


def test_a_push_to_a_stand_in_for_the_hub(run, tmp_path):
    """What arrives is the adapter and a card, in a private repository, and nothing of this machine."""

    def push(hub):
        environment = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_stand_in",
            "no_proxy": "*",
        }
        line = [sys.executable, "-m", "dft_lora", "push", str(run.path), "me/tiny-dft"]
        return subprocess.run(line, env=environment, capture_output=True, text=True)

    with hub() as it:
        done = push(it)
        assert done.returncode == 0 and done.stdout.strip() == f"{it.address}/me/tiny-dft", done.stderr
        assert it.created["name"] == "tiny-dft" and it.created["visibility"] == "private"
        assert it.tokens >= {"Bearer hf_stand_in"}
        names = {path.name for path in run.adapter.iterdir()}
        assert it.files.keys() == names | {"README.md"}
        assert all(it.files[name] == (run.adapter / name).read_bytes() for name in names)
        said = it.files["README.md"].decode()
        assert said == card(run, repository="me/tiny-dft") and "tiny-run=me/tiny-dft" in said
        assert str(run.path.parent) not in said
        it.refuses = "/api/repos/create"
        done = push(it)
        (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
        assert done.returncode == 1 and "the Hub did not accept me/tiny-dft" in line
        assert "hf auth login" in line and "Traceback" not in done.stderr


def test_the_hub_is_reached_or_its_absence_told_in_a_line(run, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="me/model") as error:
        push(run, "me/model")
    assert "\n" not in str(error.value)


def test_llama_cpp_is_named_where_it_is_missing_and_called_where_it_is(run, merged, tmp_path, monkeypatch):
    """The stand-in converter only notes how it was called; llama.cpp itself is too large for a test."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(MissingPart, match="LLAMA_CPP"):
        to_gguf(merged[0], tmp_path / "x.gguf")
    home = tmp_path / "llama.cpp"
    (home / "build/bin").mkdir(parents=True)
    note = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text(' '.join(sys.argv[1:]))"
    (home / "convert_hf_to_gguf.py").write_text(note)
    out = to_gguf(merged[0], tmp_path / "x.gguf", home)
    assert out.read_text() == f"{merged[0]} --outtype bf16 --outfile {out}"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPart, match="llama-quantize"):
        to_gguf(merged[0], tmp_path / "q.gguf", home, "Q4_K_M")
    quantize = home / "build/bin/llama-quantize"
    for script in ("#!/bin/sh\nexit 1\n", '#!/bin/sh\necho "$3" > "$2"\n'):
        assert not (tmp_path / "q.bf16.gguf").exists()  # so that the next attempt can make it
        quantize.write_text(script)
        quantize.chmod(quantize.stat().st_mode | stat.S_IXUSR)
        if "exit" in script:
            with pytest.raises(RunError, match="exit code 1"):
                to_gguf(merged[0], tmp_path / "q.gguf", home, "Q4_K_M")
    out = to_gguf(merged[0], tmp_path / "q.gguf", home, "Q4_K_M")
    assert out.read_text() == "Q4_K_M\n" and not (tmp_path / "q.bf16.gguf").exists()
    (home / "convert_hf_to_gguf.py").write_text("raise SystemExit(3)")
    with pytest.raises(RunError, match="exit code 3"):
        to_gguf(merged[0], tmp_path / "x.gguf", home)
    with pytest.raises(RequestError, match="no merged model"):
        to_gguf(tmp_path, tmp_path / "x.gguf", home)


def test_a_checkpoint_is_exported_under_the_name_of_its_run_too(run):
    """Checkpoints of two runs share their names: an engine would replace one by the other."""
    (checkpoint,) = [one for one in run.checkpoint_runs() if one.name == "step-000003"]
    assert f"tiny-run-step-000003={checkpoint.adapter}" in vllm_command(checkpoint)
    assert f"tiny-run={run.adapter}" in vllm_command(run)
    assert RunFolder("steps/mine").full_name == "mine"  # a folder of the user's own


def test_the_commands(run, merged):
    def call(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    done = call("export", run.path, "--to", "vllm")
    assert done.exit_code == 0 and "--enable-lora" in done.output and str(run.adapter) in done.output
    assert os.path.isfile(f"{done.output.split()[2]}/config.json"), "the embedded base by its folder"
    assert call("export", run.path, "--to", "gguf").exit_code == 2
    assert call("merge", run.path, merged[0]).exit_code == 2


def test_a_run_leaves_its_curves_and_trackers_are_named_where_missing(run, monkeypatch):
    from dft_lora.training import trackers

    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingPart, match=r"train\.trackers: wandb .* pip install wandb"):
        trackers.check_trackers(["wandb"])
    assert trackers.check_trackers([]) is None
