"""`dft-lora doctor`: what this machine can do, and how to install what is missing."""

from __future__ import annotations

from importlib.util import find_spec

from .config import Recipe
from .data.doctor import findings_table
from .loss.forward import kernel_missing
from .model.hardware import RULES, choose, dtype_name
from .runs.provenance import commit, versions

OPTIONAL = {
    "unsloth": "pip install 'dft-lora[unsloth]' in an environment of its own",
    "trl": "pip install 'dft-lora[trl]'",
    "vllm": "pip install 'dft-lora[vllm]' (CUDA)",
    "triton": "comes with the CUDA build of torch",
}


def data_report(recipe: Recipe) -> dict[str, str]:
    """The counts and findings of a recipe's data, and what its base makes of a few examples.

    All bad rows are reported; none is refused.
    """
    from .evaluation.diagnosis import base_expectations
    from .training.plan import make_plan

    plan = make_plan(recipe.override(["data.skip_bad_rows=1"]))
    found = {name.replace("_", " "): f"{count:,}" for name, count in plan.counts.items()}
    found |= {
        f"finding {i}": line.strip()
        for i, line in enumerate(findings_table(plan.findings).splitlines(), start=1)
    }
    # A run that answers itself has no solutions that the base could expect.
    return found if plan.problems else found | base_expectations(plan)


def machine_report() -> dict[str, str]:
    """Each part of this machine and environment, with what was found."""
    small, large = choose(parameters=0), choose(parameters=10**10)
    found = {"commit": commit() or "installed package"}
    found |= {package: version or "missing" for package, version in versions().items()}
    found |= {
        "device": f"{small.device} ({small.name})",
        "dtype, small model": f"{dtype_name(small.dtype)} ({small.rule})",
        "dtype, large model": f"{dtype_name(large.dtype)} ({large.rule})",
        "loss row pass": f"torch operations ({why})" if (why := kernel_missing()) else "Triton kernel",
    }
    found |= {f"rule: {rule.where}": rule.consequence for rule in RULES}
    return found | {
        name: "installed" if find_spec(name) else f"missing: {how}" for name, how in OPTIONAL.items()
    }
