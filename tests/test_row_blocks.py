"""Norms in blocks of rows: the same bits, and no tensor beside the 16-bit input and output."""

import pytest
import torch

from dft_lora.model.memory import LiveTensors
from dft_lora.model.row_blocks import BLOCK_ELEMENTS, InBlocks, norms_in_blocks

D = 48


def norm_of(kind: str) -> torch.nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    norm = {"gemma3": Gemma3RMSNorm, "qwen2": Qwen2RMSNorm}[kind](D).bfloat16()
    torch.nn.init.normal_(norm.weight)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["gemma3", "qwen2"])
def test_same_bits(kind, transposed):
    torch.manual_seed(0)
    norm, rows = norm_of(kind), 2 * BLOCK_ELEMENTS * torch.get_num_threads() // D + 5
    x = torch.randn(3, rows // 3, D).bfloat16()
    x = (x.transpose(0, 1) if transposed else x).detach().requires_grad_()
    g = torch.randn(x.shape).bfloat16()
    whole, blocks = norm(x), InBlocks(norm)(x)
    assert torch.equal(whole, blocks)
    (expected,), (found,) = torch.autograd.grad(whole, x, g), torch.autograd.grad(blocks, x, g)
    assert expected.norm() > 0 and torch.equal(expected, found)


def test_keeps_its_input_alone():
    norm, x = norm_of("qwen2"), torch.randn(50_000, D).bfloat16().requires_grad_()
    block = 4 * BLOCK_ELEMENTS * torch.get_num_threads()
    with LiveTensors() as memory:
        y = InBlocks(norm)(x)
        assert memory.now() == x.nbytes
        assert memory.peak() <= x.nbytes + 4 * block
        memory.reset()
        y.backward(torch.ones_like(y))
        assert memory.peak() <= 3 * x.nbytes + 8 * block


def test_only_frozen_norms_are_wrapped(qwen_dir):
    from dft_lora.config import ModelConfig
    from dft_lora.model.load import load_base

    base, _ = load_base(ModelConfig(name=str(qwen_dir), dtype="bfloat16"))
    base.model.norm.weight.requires_grad_(True)
    norms_in_blocks(base)
    kinds = [type(layer.input_layernorm) for layer in base.model.layers]
    assert kinds == [InBlocks] * 2 and type(base.model.norm).__name__ == "Qwen2RMSNorm"
