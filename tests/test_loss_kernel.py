"""The Triton row kernel: equal to the torch pass in the interpreter, compiled for GPUs, run on one."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from loss_cases import HEADS, Case, distance

from dft_lora.loss import kernel_missing, naive_token_logps, objective, token_logps

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(bool(kernel_missing()), reason=kernel_missing() or "runs")


@needs_triton
def test_where_triton_does_not_start_torch_operations_run(monkeypatch, caplog):
    """As on a machine without a C compiler; here it finds no driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "triton does not start" in kernel_missing.__wrapped__()
    assert "the loss runs in torch operations" in caplog.text


def run(script: str, **environment: str) -> str:
    """The script in a process of its own: Triton reads TRITON_INTERPRET once, when it is imported."""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


INTERPRETED = """
import torch
from dft_lora.loss import row_kernel, row_statistics
from dft_lora.loss.head import Head

g = torch.Generator().manual_seed(0)
row_kernel.BLOCK = 32
OPTIONS = (False, None, True), (True, 5, True), (True, None, False), (False, 5, False)
for V in (2, 33, 90):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias, softcap, write in OPTIONS:
            bias_V = torch.randn(V, generator=g).to(dtype) if bias else None
            head = Head(torch.empty(V, 3), bias_V, 0.5, softcap)
            u_CV = (6 * torch.randn(4, V, generator=g)).to(dtype)
            shift_C = torch.randn(4, generator=g).to(dtype)
            y_C = torch.tensor([0, V - 1, V // 2, 1])
            a_CV, b_CV = u_CV.clone(), u_CV.clone()
            arguments = (shift_C, y_C, head)
            needs = frozenset({"sum_p_squared"})
            a = row_statistics.torch_row_sums_(a_CV, *arguments, write=write, needs=needs)
            b = row_kernel.row_sums_(b_CV, *arguments, write=write, needs=needs)
            for name in ("max_C", "sum_C", "dot_C", "square_C"):
                torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=2e-6)
            if write:
                torch.testing.assert_close(a_CV, b_CV, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
                assert (b_CV[range(4), y_C] == 0).all()
            print(V, dtype, bias, softcap, write)
"""


@needs_triton
def test_the_kernel_equals_the_torch_pass():
    """Vocabularies of one block and several, the last one partial; targets at both ends."""
    assert len(run(INTERPRETED, TRITON_INTERPRET="1").splitlines()) == 3 * 3 * 4


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dft_lora.loss.row_kernel import BLOCK, _rows

for capability in (75, 80, 89, 90, 120):
    element = "fp16" if capability < 80 else "bf16"
    types = {"u_ptr": f"*{element}", "shift_ptr": f"*{element}", "y_ptr": "*i64"}
    types |= {"stride": "i64", "V": "i32", "cap": "fp32", "gain": "fp32"}
    flags = {"BIAS": True, "CAP": True, "WRITE": True, "GAIN": capability < 80, "BLOCK": BLOCK}
    signature = {n: "constexpr" if n in flags else types.get(n, "*fp32") for n in _rows.arg_names}
    constants = {(_rows.arg_names.index(n),): value for n, value in flags.items()}
    source = ASTSource(fn=_rows, signature=signature, constexprs=constants)
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    print(len(kernel.asm["cubin"]))
"""


@needs_triton
@pytest.mark.slow
def test_the_kernel_compiles_ahead_of_time():
    """Triton's compiler needs no GPU to build for one: T4, A100, RTX 4090, H100, RTX 5090."""
    sizes = run(COMPILED).split()
    assert len(sizes) == 5 and all(int(size) > 1000 for size in sizes)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_no_further_from_the_truth_than_naive(dtype, head):
    case = Case.make(300, 64, 9001, head, "some", spread=6.0).to(dtype)
    dft = objective("dft")

    def gradient(case, scorer):
        scores, leaves = case.score(scorer)
        return torch.autograd.grad(dft(scores), leaves)[0].cpu()

    wanted = gradient(case.to(torch.float64), naive_token_logps)
    case = case.on("cuda")
    assert distance(gradient(case, token_logps), wanted) <= 1.05 * distance(
        gradient(case, naive_token_logps), wanted
    )
