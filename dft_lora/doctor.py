"""`dft-lora doctor`: what this machine can do, and what a missing part would need."""

from __future__ import annotations

from importlib.util import find_spec

from .model.hardware import choose
from .provenance import commit, versions

OPTIONAL = {
    "unsloth": "pip install 'dft-lora[unsloth]' in an environment of its own",
    "trl": "pip install 'dft-lora[trl]'",
    "vllm": "pip install 'dft-lora[vllm]' (CUDA)",
    "triton": "comes with the CUDA build of torch",
}


def examine() -> dict[str, str]:
    """Part and finding, one line each."""
    small, large = choose(parameters=0), choose(parameters=10**10)
    found = {"commit": commit() or "installed package"}
    found |= {package: version or "missing" for package, version in versions().items()}
    found |= {
        "device": f"{small.device} ({small.name})",
        "dtype, small model": f"{small.dtype} ({small.rule})".replace("torch.", ""),
        "dtype, large model": f"{large.dtype} ({large.rule})".replace("torch.", ""),
    }
    return found | {
        name: "installed" if find_spec(name) else f"missing: {how}" for name, how in OPTIONAL.items()
    }
