"""Recipes of real shape take one step on a random-weight model of the same architecture at reduced depth."""

import json
import math
import shutil

import pytest
import torch

from dft_lora.bench.memory import GPUS, SHAPES
from dft_lora.bench.table import RESULTS
from dft_lora.config import load_recipe, shipped_recipes
from dft_lora.data.templates import TEMPLATES
from dft_lora.loss import objective
from dft_lora.model.known import KNOWN
from dft_lora.model.load import resolve
from dft_lora.model.tiny import TINY_DIR
from dft_lora.tasks import task_names
from dft_lora.training.loop import train

TOKENIZERS = {"qwen2": "qwen2.5", "llama": "phi-3-mini"}
REAL = [name for name in shipped_recipes() if load_recipe(name).model.name in KNOWN]
OWN = [name for name in shipped_recipes() if load_recipe(name).rollouts]  # a random model answers nothing
HUB = sorted(name for name in shipped_recipes() if not name.startswith("tiny") and name not in REAL + OWN)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_names_things_that_exist(name):
    recipe = load_recipe(name)
    objective(recipe.objective.name, **recipe.objective.numbers)
    assert set(recipe.evaluate.tasks) <= set(task_names()) and recipe.evaluate.tasks
    assert recipe.data.template in {*TEMPLATES, "auto"}
    assert name in REAL or resolve(recipe.model)  # `pytest -m real` fetches the others
    head = shipped_recipes()[name].read_text().splitlines()[:4]
    launch = "dft-lora"
    if recipe.train.shard:
        launch = "accelerate launch --multi_gpu --num_processes 2 -m dft_lora"
    assert head[1].startswith(f"#   {launch} train {name}")
    assert any(line.startswith("# Hardware:") for line in head)


@pytest.mark.parametrize("name", HUB)
def test_a_large_recipe_states_its_traced_peak(name):
    traced = json.loads((RESULTS / "memory-recipes.json").read_text())["recipes"]
    assert traced.keys() == GPUS.keys()
    found = traced[f"{name.rpartition('_')[0]}_dft"]
    recipe, path = load_recipe(name), shipped_recipes()[name]
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("# Hardware:"))
    assert f"traced peak {found['one_row'] / 2**30:.1f} GB" in line
    assert found["model"] == recipe.model.name and found["r"] == recipe.adapter.r
    assert found["max_length"] == recipe.data.max_length and found["optimizer"] == recipe.train.optimizer
    assert all(gpu["rows"] >= 1 for gpu in found["gpus"]), "it fits the GPUs it is for"


@pytest.fixture(autouse=True)
def benchmarks_from_local_files(monkeypatch, data_dir):
    monkeypatch.setenv("DFT_LORA_DATA", str(data_dir))


def one_step(name, tmp_path, data_dir, narrow):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SHAPES[load_recipe(name).model.name] | {"num_hidden_layers": 1}
    family = sizes.pop("model_type")
    if narrow:  # the same family, head layout and tying, narrow
        by = sizes["hidden_size"] // sizes["num_attention_heads"] // 16
        sizes |= {"hidden_size": sizes["hidden_size"] // by, "intermediate_size": 128, "vocab_size": 2048}
    base = tmp_path / "base"
    config = AutoConfig.for_model(family, **sizes, bos_token_id=None, eos_token_id=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    if narrow:
        files = [f for f in TINY_DIR.iterdir() if f.name.startswith(("tokenizer", "chat_template"))]
    else:
        files = list((data_dir / "tokenizers" / TOKENIZERS[family]).iterdir())
    for file in files:
        shutil.copyfile(file, base / file.name)
    rows = (data_dir / "train" / "math_train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(json.loads(row)) for row in rows))
    changes = [f"model.name={base}", f"data.source={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'run'}"]
    changes += ["train.shard=false"]  # one process; tests/test_fsdp.py has two
    changes += ["data.subset=null", "data.prompt=problem", "data.completion=solution"]
    changes += ["data.sample=null", "train.max_steps=1", "train.batch_size=4", "train.micro_batch_size=2"]
    run = train(load_recipe(name, changes))
    (line,) = run.metrics()
    assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
    assert line["nll"] == pytest.approx(math.log(config.vocab_size), rel=0.2)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n.endswith("_dft") else [pytest.mark.slow]) for n in HUB]
)
def test_one_step_of_the_same_architecture_narrow(name, tmp_path, data_dir):
    one_step(name, tmp_path, data_dir, narrow=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HUB if name.endswith("_dft")])
def test_one_step_at_full_width(name, tmp_path, data_dir):
    one_step(name, tmp_path, data_dir, narrow=False)
