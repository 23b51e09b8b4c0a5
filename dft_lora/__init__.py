"""Dynamic Fine-Tuning (DFT) with 4-bit bases and LoRA adapters, on hardware that people have.

The public names; each is loaded when first used, so that `import dft_lora` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Recipe, load_recipe
    from .errors import DftLoraError, RequestError, RunError
    from .evaluation.evaluate import evaluate
    from .loss import TokenScores, objective, objective_names, token_logps
    from .runs.folder import RunFolder
    from .tasks import get_task, task_names
    from .tasks.judge import judge
    from .training.loop import train
    from .training.patch import patch

__version__ = "0.2.0.dev0"

_HOMES = {
    "DftLoraError": ".errors",
    "Recipe": ".config",
    "RequestError": ".errors",
    "RunError": ".errors",
    "RunFolder": ".runs.folder",
    "TokenScores": ".loss",
    "evaluate": ".evaluation.evaluate",
    "get_task": ".tasks",
    "judge": ".tasks.judge",
    "load_recipe": ".config",
    "objective": ".loss",
    "objective_names": ".loss",
    "patch": ".training.patch",
    "task_names": ".tasks",
    "token_logps": ".loss",
    "train": ".training.loop",
}

__all__ = [
    "DftLoraError",
    "Recipe",
    "RequestError",
    "RunError",
    "RunFolder",
    "TokenScores",
    "evaluate",
    "get_task",
    "judge",
    "load_recipe",
    "objective",
    "objective_names",
    "patch",
    "task_names",
    "token_logps",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
