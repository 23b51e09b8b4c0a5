"""LoRA with narrow inputs and in blocks of rows: less memory; the same bits, or sums in another order."""

import pytest
import torch

from dft_lora.config import AdapterConfig, ModelConfig
from dft_lora.model import row_blocks
from dft_lora.model.head import hidden_states
from dft_lora.model.load import add_lora, load_base, use_checkpointing
from dft_lora.model.lora_inputs import add_lora_output, keep_inputs_narrow
from dft_lora.model.memory import LiveTensors

IDS_BL = torch.arange(5, 5 + 3 * 64).view(3, 64)


def trained(
    qwen_dir, dtype: str, narrow: bool, checkpointing: bool, autocast: bool = False, quantization: str = "nf4"
):
    """(hidden states, gradients by name, bytes alive after the forward pass)."""
    base, _ = load_base(ModelConfig(name=str(qwen_dir), dtype=dtype, quantization=quantization))
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


def test_over_a_plain_base_gradients_are_as_exact_as_those_of_peft(qwen_dir):
    """There the two round differently: no further from the gradients of a float32 base."""

    def error(dtype, narrow):
        found = trained(qwen_dir, dtype, narrow, False, quantization="none")[1]
        return sum(float((found[name] - gradient).square().sum()) for name, gradient in truth.items()) ** 0.5

    truth = trained(qwen_dir, "float32", False, False, quantization="none")[1]
    assert 0 < error("bfloat16", True) <= 1.1 * error("bfloat16", False)


def lora_term(N: int, D: int, out: int):
    """(a base's output, its input, A, B), all but the output with gradients."""
    torch.manual_seed(0)
    x, A, B = torch.randn(N, D), torch.randn(8, D), torch.randn(out, 8)
    return torch.randn(N, out).bfloat16(), *(t.requires_grad_() for t in (x.bfloat16(), A, B))


def gradients(y, leaves):
    return torch.autograd.grad((y.float() * torch.arange(len(y))[:, None]).sum(), leaves)


def test_blocks_of_rows_give_the_same_output_and_gradients(monkeypatch):
    """Three blocks, the last one smaller: the output is that of whole tensors, gradients to float32."""
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 1)
    base, x, A, B = lora_term(150, 48, 40)
    y = add_lora_output(base.clone(), x, A, B, 0.7)
    naive = base + ((x.float() @ A.t()) @ B.t() * 0.7).to(base.dtype)
    assert torch.equal(y, naive)
    for found, expected in zip(gradients(y, (x, A, B)), gradients(naive, (x, A, B)), strict=True):
        assert found.dtype == expected.dtype and expected.norm() > 0
        assert (found - expected).norm() <= (
            1e-2 if found.dtype == torch.bfloat16 else 1e-5
        ) * expected.norm()


def test_no_float32_copy_of_a_whole_input_or_output():
    """Beside the low-rank product, both passes need one block and the gradient of the input."""
    base, x, A, B = lora_term(20_000, 256, 256)
    block = 4 * row_blocks.BLOCK_ELEMENTS * torch.get_num_threads()
    with LiveTensors() as memory:
        y = add_lora_output(base, x, A, B, 2.0)
        low = 4 * 20_000 * 8
        assert memory.peak() <= low + 3 * block
        g = torch.ones_like(y)
        before = memory.now()
        memory.reset()
        y.backward(g)
        assert memory.peak() - before <= x.nbytes + 4 * block


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
