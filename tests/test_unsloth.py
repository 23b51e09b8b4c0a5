"""The unsloth backend: one line where it is missing, and the plain backend's gradients where it is there.

unsloth cannot live beside the newest transformers, so the second half runs in an environment of its own:

    python -m venv .venv-unsloth
    .venv-unsloth/bin/pip install -c constraints-unsloth.txt -e '.[unsloth]' pytest
    .venv-unsloth/bin/python -m pytest tests/test_unsloth.py
"""

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from dft_lora.cli import main
from dft_lora.config import ModelConfig, parse_recipe
from dft_lora.errors import MissingPart
from dft_lora.model import unsloth
from dft_lora.model.load import load_base

here = pytest.mark.skipif(find_spec("unsloth") is None, reason="unsloth is not installed in this environment")

PASS = """
import sys, torch
from dft_lora.config import parse_recipe
from dft_lora.model.backends import build, prepare
name, backend, out = sys.argv[1:]
recipe = parse_recipe({"model": {"name": name, "backend": backend, "dtype": "bfloat16"},
                       "data": {"max_length": 128}, "adapter": {"r": 4}})
prepare(recipe)
torch.set_num_threads(1)
from dft_lora.loss import objective, token_logps
built = build(recipe, torch.device("cpu"))
weights = {n: p for n, p in built.model.named_parameters() if p.requires_grad}
for i, n in enumerate(sorted(weights)):
    generator = torch.Generator().manual_seed(i)
    weights[n].data = 0.05 * torch.randn(weights[n].shape, generator=generator)
built.model.train()
ids = torch.randint(5, 900, (2, 40), generator=torch.Generator().manual_seed(7))
h = built.hidden_states(built.model, input_ids=ids, attention_mask=torch.ones_like(ids))[:, :-1].flatten(0, 1)
for kind in ("dft", "sft"):
    scores = token_logps(h, targets=ids[:, 1:].flatten(), **built.head.arguments())
    objective(kind)(scores).backward(retain_graph=True)
torch.save({n: p.grad for n, p in weights.items()}, out)
"""


@here
def test_gradients_equal_the_plain_backends(qwen_dir, tmp_path):
    """In processes of their own: importing unsloth changes transformers for good."""
    found = {}
    for backend in ("plain", "unsloth"):
        out = tmp_path / f"{backend}.pt"
        done = subprocess.run(
            [sys.executable, "-c", PASS, str(qwen_dir), backend, str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found[backend] = torch.load(out)
    assert found["plain"].keys() == found["unsloth"].keys()
    for name, gradient in found["plain"].items():
        assert gradient.norm() > 0, name
        assert (found["unsloth"][name] - gradient).norm() <= 2e-2 * gradient.norm(), name


@here
def test_a_run_trains(tmp_path):
    arguments = ["train", "tiny_dft", "--set", "model.backend=unsloth", "--set", "train.max_steps=2"]
    arguments += ["--set", f"output={tmp_path / 'run'}", "--set", "train.batch_size=4"]
    command = [sys.executable, "-m", "dft_lora", *arguments, "--set", "train.micro_batch_size=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def absent(name):
    raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("version", "message"),
    [(absent, "unsloth is not installed"), (lambda name: "2025.9.5", "2025.9.5 is too old")],
)
def test_a_missing_or_old_install_is_one_line_that_says_what_to_install(version, message, monkeypatch):
    monkeypatch.setattr(unsloth.metadata, "version", version)
    with pytest.raises(MissingPart, match=message) as error:
        unsloth.import_unsloth()
    assert "constraints-unsloth.txt" in str(error.value) and "\n" not in str(error.value)
    done = CliRunner().invoke(main, ["train", "tiny_dft", "--set", "model.backend=unsloth"])
    assert done.exit_code == 2 and message in done.output


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("all-linear", list(unsloth.LINEAR)),
        (".*layers.[02].*(q|v)_proj", ".*layers.[02].*(q|v)_proj"),  # an expression, to peft
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ],
)
def test_target_modules_reach_unsloth_as_they_are(given, passed, monkeypatch):
    recipe = parse_recipe({"model": {"backend": "unsloth"}, "adapter": {"target_modules": given}})
    base, asked = load_base(ModelConfig(), torch.device("cpu"))[0], {}
    model = SimpleNamespace(
        from_pretrained=lambda *_, **__: (base, None),
        get_peft_model=lambda base, **options: asked.update(options) or base,
    )
    monkeypatch.setattr(unsloth, "import_unsloth", lambda: SimpleNamespace(FastLanguageModel=model))
    unsloth.build_with_unsloth(recipe, torch.device("cpu"))
    assert asked["target_modules"] == passed


def test_the_switch_is_put_back_and_a_model_without_it_is_refused(monkeypatch):
    from test_model import tiny_config
    from transformers import AutoModelForCausalLM

    from dft_lora.errors import ModelError

    monkeypatch.delenv(unsloth.SWITCH, raising=False)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ModelError, match="no hidden states"):
        unsloth.by_switch(model, input_ids=torch.tensor([[1, 2, 3]]))
    assert unsloth.SWITCH not in unsloth.os.environ
