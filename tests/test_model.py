"""The 4-bit base with LoRA over it: what is quantised, what is trained, and the traps."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dft_lora.cli import main
from dft_lora.config import AdapterConfig, ModelConfig, load_recipe, parse_recipe
from dft_lora.errors import ModelError
from dft_lora.loss import objective, token_logps
from dft_lora.model.backends import build
from dft_lora.model.head import check_head, hidden_states, refuse_adapted_head
from dft_lora.model.limits import positions, refuse_unknown_tokens
from dft_lora.model.load import add_lora, load_base, load_tokenizer
from dft_lora.model.tiny import TINY_DIR
from dft_lora.training.plan import make_plan

IDS_BL = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3]])


@pytest.fixture
def nf4(qwen_dir):
    return load_base(ModelConfig(name=str(qwen_dir)))[0]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def randomise(model):
    """LoRA's B starts at zero, which would hide the gradient of A."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)


def test_linear_layers_are_nf4_with_double_quantisation_and_the_head_is_not(nf4):
    kinds = {
        name: type(module).__name__
        for name, module in nf4.named_modules()
        if "Linear" in type(module).__name__
    }
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"Linear4bit"} and len(kinds) == 14
    weight = nf4.model.layers[0].self_attn.q_proj.weight
    assert weight.quant_type == "nf4" and weight.quant_state.nested


def test_lora_is_float32_and_alone_trainable(nf4):
    model = add_lora(nf4, AdapterConfig(r=4))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 14 and all("lora_" in n for n in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert nf4.lm_head.weight.dtype == nf4.dtype


@pytest.mark.parametrize("name", ["sft", "dft"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_naive_full_logits_path_after_an_evaluation(nf4, name, checkpointing):
    """Through the 4-bit base and the chunked loss; an evaluation before it must not cut the graph."""
    model = add_lora(nf4, AdapterConfig(r=4, dropout=0.0))
    randomise(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS_BL)
    model.train()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    targets_BL = IDS_BL.clone()
    targets_BL[:, :3] = -100
    h_BLD = hidden_states(model, input_ids=IDS_BL)[:, :-1]
    head = check_head(nf4)
    targets_N = targets_BL[:, 1:].flatten()
    scores = token_logps(
        h_BLD.flatten(0, 1), targets=targets_N, chunk_bytes=4 * 151_936 * 3, **head.arguments()
    )
    objective(name)(scores).backward()
    ours = gradients(model)
    model.zero_grad()

    logits_NV = model(input_ids=IDS_BL).logits[:, :-1].float().flatten(0, 1)
    kept_N = targets_N != -100
    nll_N = cross_entropy(logits_NV[kept_N], targets_N[kept_N], reduction="none")
    weight_N = (-nll_N).exp().detach() if name == "dft" else torch.ones_like(nll_N)
    (weight_N * nll_N).sum().backward()
    for key, theirs in gradients(model).items():
        assert theirs.norm() > 0, key
        assert (ours[key] - theirs).norm() <= 1e-5 * theirs.norm(), key


def test_the_avx512_repacking_trap_stays_closed(nf4):
    """What bitsandbytes does where the CPU has AVX512-BF16, if nobody switches it off."""
    assert all(
        not m.support_avx512bf16_for_cpu for m in nf4.modules() if hasattr(m, "support_avx512bf16_for_cpu")
    )


def test_a_missing_or_wrong_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path), "./nope", "no-such-owner/no-such-model", "one-word"):
        with pytest.raises(ModelError, match=r"model\.name"):
            load_base(ModelConfig(name=name))
        with pytest.raises(ModelError, match=r"model\.name"):
            load_tokenizer(ModelConfig(name=name))


def test_target_modules_that_match_nothing_are_named(nf4):
    with pytest.raises(ModelError, match="q_prj"):
        add_lora(nf4, AdapterConfig(target_modules=("q_prj",)))


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ".*(lm_head|q_proj)", ["embed_tokens"]], ids=str)
def test_an_adapter_on_the_head_or_its_tied_embedding_is_refused_by_name(targets):
    """The loss reads the head's weight, so an adapter there would stay as it was drawn."""
    recipe = parse_recipe({"adapter": {"target_modules": targets}})
    name = "embed_tokens" if "embed_tokens" in targets else "lm_head"
    with pytest.raises(ModelError, match=rf"adapter\.target_modules: '[a-z.]*{name}'.*take it out"):
        build(recipe, torch.device("cpu"))


def test_an_adapter_on_an_embedding_of_its_own_learns():
    model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=False)).eval()
    head = check_head(model.requires_grad_(False))
    model = add_lora(model, AdapterConfig(target_modules=("embed_tokens",)))
    refuse_adapted_head(model)
    for name, parameter in model.named_parameters():
        if "lora_embedding_A" in name:  # the one that begins at zero
            torch.nn.init.normal_(parameter, std=0.02)
    h_ND = hidden_states(model, input_ids=IDS_BL)[:, :-1].flatten(0, 1)
    scores = token_logps(h_ND, targets=IDS_BL[:, 1:].flatten(), **head.arguments())
    truth = model(input_ids=IDS_BL).logits[:, :-1].log_softmax(-1).gather(-1, IDS_BL[:, 1:, None])
    assert (scores.logp - truth.flatten()).abs().max() < 1e-4
    objective("sft")(scores).backward()
    assert all(gradient.norm() > 0 for gradient in gradients(model).values())


def tiny_config(family, vocab=97, **more):
    sizes = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return AutoConfig.for_model(family, **sizes, num_key_value_heads=2, head_dim=16, pad_token_id=0, **more)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("phi", {}),  # a head with a bias
    ],
)
def test_heads_with_a_twist_are_scored_exactly(family, more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **more)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    head = check_head(model, tolerance=1e-4)
    h_BLD = hidden_states(model, input_ids=IDS_BL)[:, :-1]
    scores = token_logps(h_BLD.flatten(0, 1), targets=IDS_BL[:, 1:].flatten(), **head.arguments())
    truth = torch.log_softmax(model(input_ids=IDS_BL).logits[:, :-1].float(), -1).gather(
        -1, IDS_BL[:, 1:, None]
    )
    assert (scores.logp - truth.flatten()).abs().max() < 1e-4
    grads = []
    for loss in (scores.logp.sum(), truth.sum()):
        model.zero_grad()
        loss.backward()
        grads.append(model.get_decoder().layers[0].self_attn.q_proj.weight.grad.clone())
    assert (grads[0] - grads[1]).norm() <= 1e-4 * grads[1].norm()


def saved(path, config):
    """A random model's config with the embedded base's tokenizer: all that is read before weights are."""
    for file in TINY_DIR.glob("*token*"):
        shutil.copy(file, path)
    config.save_pretrained(path)
    return path


def refused(path, *changes):
    """The one line with which `train` refuses a recipe for the model at `path`."""
    changes = (f"model.name={path}", f"output={path}/run", "data.sample=8", *changes)
    done = CliRunner().invoke(
        main, ["train", "tiny_dft", *(word for change in changes for word in ("--set", change))]
    )
    assert done.exit_code == 2 and not (path / "run").exists(), done.output
    (line,) = done.stderr.splitlines()
    return line


def vocabulary():
    return AutoTokenizer.from_pretrained(TINY_DIR).vocab_size


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mamba", {"state_size": 4}),
        ("mamba2", {"num_heads": 8, "head_dim": 16}),
        ("rwkv", {}),
        ("recurrent_gemma", {}),
    ],
)
def test_a_state_space_model_is_refused(tmp_path, family, more):
    config = AutoConfig.for_model(
        family, vocab_size=vocabulary(), hidden_size=64, num_hidden_layers=2, **more
    )
    line = refused(saved(tmp_path, config))
    assert line.startswith("error: model.name:") and f"a {family} model" in line and "attention" in line


def test_a_kl_to_the_base_is_refused_where_logits_are_capped(tmp_path):
    path = saved(tmp_path, tiny_config("gemma2", vocab=vocabulary(), final_logit_softcapping=30.0))
    line = refused(path, "objective.name=asft")
    assert line.startswith("error: objective.name: 'asft'") and "soft-capped" in line and "iw-sft" in line
    make_plan(load_recipe("tiny_dft", [f"model.name={path}", "data.sample=8", "objective.name=iw-sft"]))


def test_rows_longer_than_the_models_positions_are_refused(tmp_path):
    path = saved(tmp_path, tiny_config("gpt2", vocab=vocabulary(), n_positions=64))
    line = refused(path)
    assert line.startswith("error: data.max_length 2") and "data.max_length: 64 leaves" in line
    make_plan(load_recipe("tiny_dft", [f"model.name={path}", "data.sample=400", "data.max_length=64"]))


def test_positions_count_rope_scaling_and_may_have_no_limit():
    def of(family, **more):
        return positions(tiny_config(family, **more))

    assert of("llama", max_position_embeddings=64) == 64 and of("gpt2", n_positions=64) == 64
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert of("llama", max_position_embeddings=64, rope_parameters=yarn) == 256
    assert of("llama", max_position_embeddings=256, rope_parameters=yarn) == 256
    assert of("gemma3_text", max_position_embeddings=64) == 64  # parameters for each kind of layer
    assert of("bloom") is None


def test_a_tokenizer_larger_than_the_embedding_is_refused_where_its_tokens_occur(tmp_path):
    path = saved(tmp_path, tiny_config("llama", vocab=20))
    line = refused(path)
    assert line.startswith("error: model.name:") and "its embedding has 20 rows" in line
    refuse_unknown_tokens([1, 19], AutoConfig.from_pretrained(path), None)  # 20 and above do not occur


def test_a_head_that_the_config_does_not_tell_is_refused():
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    model.lm_head.register_forward_hook(lambda module, arguments, output: output * 2)
    with pytest.raises(ModelError, match="not supported"):
        check_head(model)


def test_a_torchao_that_peft_refuses_is_ignored(tmp_path):
    """Colab's image has torchao 0.10.0: peft raises for it at every layer that is not in 4 bits."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    (tmp_path / "torchao-0.10.0.dist-info").mkdir()
    (tmp_path / "torchao-0.10.0.dist-info" / "METADATA").write_text("Name: torchao\nVersion: 0.10.0\n")
    done = subprocess.run(
        [sys.executable, "-c", OLD_TORCHAO],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "added"]


OLD_TORCHAO = """
from peft.import_utils import is_torchao_available
from dft_lora.config import AdapterConfig, ModelConfig
from dft_lora.model.load import add_lora, load_base
base = load_base(ModelConfig(name="tiny", quantization="none"))[0]
try:
    is_torchao_available()
except ImportError:
    print("refused")
add_lora(base, AdapterConfig(r=4))
print("added")
"""
