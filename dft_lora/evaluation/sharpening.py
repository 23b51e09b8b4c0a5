"""Is a gain at temperature 1 more than a sharper distribution?

`entropy_matched` gives a run the sampling temperature at which its mean entropy on held-out solutions equals
that of another run. If the other run still scores higher, its lead is not sharpening alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..data.templates import Renderer
from ..model.head import check_head
from ..model.load import load_adapters, load_base, load_tokenizer
from ..runs.folder import RunFolder
from ..tasks import get_task
from .tokens import entropy, states, temperature_for

SOLUTIONS = 100  # over which the entropies are averaged


def entropy_matched(run: RunFolder, other: RunFolder, out: Path, task: str) -> RunFolder:
    """A run folder `out` with the adapter of `run` and the temperature that matches `other`'s entropy.

    Both entropies are means over the tokens of the first SOLUTIONS reference solutions of `task`. The result
    is evaluated like any run and compared with `report.build(..., free={"temperature"})`. An existing folder
    is reused if it was made from the same two adapters.
    """
    folder = RunFolder(out)
    made_from = {"adapter": run.adapter_digest, "entropy_of_adapter": other.adapter_digest}
    if folder.begun and made_from.items() <= folder.run().get("entropy_matched", {}).items():
        return folder
    recipe = run.recipe()
    renderer = Renderer(load_tokenizer(recipe.model), run.run()["template"])
    problems = [p for p in get_task(task).problems() if p.solution is not None][:SOLUTIONS]
    examples = renderer.render_all(problems)
    model = load_adapters(load_base(recipe.model)[0], {"run": run.adapter, "other": other.adapter})
    head = check_head(model)
    h_MD, other_MD = (
        torch.cat([h for _, h, _ in states(model, examples, pad_id=renderer.pad_id, adapter=name)])
        for name in ("run", "other")
    )
    wanted = entropy(head, other_MD)
    temperature = temperature_for(head, h_MD, wanted)
    shutil.copytree(run.adapter, folder.adapter, dirs_exist_ok=True)
    changed = recipe.override([f"evaluate.temperature={temperature:.4f}", f"output={out}"])
    match = {"entropy_of": str(other.path), "entropy": wanted, "temperature": temperature, **made_from}
    folder.write_run(**run.run() | {"recipe": changed.as_dict(), "entropy_matched": match})
    return folder
