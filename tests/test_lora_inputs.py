"""Narrow inputs of LoRA change the memory, not one bit of loss or gradient."""

import pytest
import torch

from dft_lora.config import AdapterConfig, ModelConfig
from dft_lora.model.head import hidden_states
from dft_lora.model.load import add_lora, load_base, use_checkpointing
from dft_lora.model.lora_inputs import keep_inputs_narrow
from dft_lora.model.memory import LiveTensors

IDS_BL = torch.arange(5, 5 + 3 * 64).view(3, 64)


def trained(qwen_dir, dtype: str, narrow: bool, checkpointing: bool, autocast: bool = False):
    """(hidden states, gradients by name, bytes alive after the forward pass)."""
    base, _ = load_base(ModelConfig(name=str(qwen_dir), dtype=dtype))
    torch.manual_seed(0)
    model = add_lora(base, AdapterConfig(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if narrow:
        keep_inputs_narrow(model)
    use_checkpointing(model, checkpointing)
    model.train()
    with LiveTensors() as memory:
        with torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=autocast):
            h_BLD = hidden_states(model, input_ids=IDS_BL)
        alive = memory.now()
    h_BLD.float().square().sum().backward()
    return h_BLD.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, alive


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_same_bits_in_less_memory(qwen_dir, dtype, checkpointing):
    h_wide, gradients_wide, wide = trained(qwen_dir, dtype, False, checkpointing)
    h_narrow, gradients_narrow, narrow = trained(qwen_dir, dtype, True, checkpointing)
    assert torch.equal(h_wide, h_narrow)
    assert gradients_wide.keys() == gradients_narrow.keys()
    for name, gradient in gradients_wide.items():
        assert gradient.norm() > 0 and torch.equal(gradient, gradients_narrow[name]), name
    if dtype == "bfloat16" and not checkpointing:
        assert narrow < 0.8 * wide


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_autocast_around_the_forward_pass_leaves_lora_gradients_right(qwen_dir, dtype, checkpointing):
    """Somebody else's trainer may use it: no further from the gradients of a float32 base than without."""

    def error(found):
        return sum(float((found[name] - gradient).square().sum()) for name, gradient in truth.items()) ** 0.5

    truth = trained(qwen_dir, "float32", True, checkpointing)[1]
    without = trained(qwen_dir, dtype, True, checkpointing)[1]
    found = trained(qwen_dir, dtype, True, checkpointing, autocast=True)[1]
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    print(error(found), error(without))
    assert error(found) <= 1.2 * error(without)


def test_live_tensors_count_storages_and_not_views():
    before = torch.zeros(1000)
    with LiveTensors() as memory:
        a = torch.zeros(1000)
        views = [a.view(10, 100).t(), before[:10], before.add_(1)]
        assert memory.now() == 4000
        b = a + 1
        assert memory.now() == memory.peak() == 8000
        del b
        assert memory.now() == 4000 and memory.peak() == 8000
        memory.reset()
        assert memory.peak() == 4000
        del a
        assert memory.now() == 4000, "a view keeps the storage alive"
        del views
        assert memory.now() == 0
