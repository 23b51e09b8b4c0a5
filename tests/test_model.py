"""The 4-bit base with LoRA over it: what is quantised, what is trained, and the traps."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from dft_lora.config import AdapterConfig, ModelConfig
from dft_lora.errors import ModelError
from dft_lora.loss import objective, token_logps
from dft_lora.model.head import check_head, hidden_states
from dft_lora.model.load import add_lora, load_base, load_tokenizer

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


def test_an_adapter_on_the_head_is_refused_by_name(nf4):
    model = add_lora(nf4, AdapterConfig(target_modules=("lm_head", "q_proj")))
    with pytest.raises(ModelError, match="lm_head"):
        check_head(model)


def tiny_config(family, **more):
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 97,
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
    from transformers import AutoModelForCausalLM

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


def test_a_head_that_the_config_does_not_tell_is_refused():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    model.lm_head.register_forward_hook(lambda module, arguments, output: output * 2)
    with pytest.raises(ModelError, match="not supported"):
        check_head(model)
