"""`make demo`: the whole way on the embedded base and the embedded task.

base, sft and dft are three run folders over one 4-bit base: the two adapters see the same data
in the same order from the same initial weights and differ in the objective alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Recipe, load_recipe, setting
from ..errors import RequestError
from ..evaluation.report import write_own_report, write_report
from ..evaluation.sampling import base_run, evaluate
from ..runs.folder import RunFolder, make_writable, read_json, write_json
from ..training.loop import train

RUNS = ("base", "sft", "dft")
MARK = "demo.json"  # lists what a demo wrote, so that the next one replaces that and nothing else
QUICK = ("train.max_steps=6", "evaluate.samples=1")
QUICK_LIMIT = 12
CLEAN = ("data.split=train-clean",)  # without the 8 % of wrong steps in "train"


def run_demo(out: Path, seed: int = 0, quick: bool = False, clean: bool = False) -> dict[str, Any]:
    """Train SFT and DFT adapters on the embedded base, evaluate base, SFT and DFT, write the report.

    Raises RequestError when `out` holds files that no demo wrote, or cannot be written.
    """
    changes = (
        f"train.seed={seed}",
        f"evaluate.seed={seed}",
        *(QUICK if quick else ()),
        *(CLEAN if clean else ()),
    )
    recipes = {name: demo_recipe(name, out, changes) for name in ("sft", "dft")}
    clear(out)
    make_writable(out, "--out")
    keep_mark(out)
    folders = [base_run(recipes["sft"], out / "base"), *(train(recipe) for recipe in recipes.values())]
    evaluate([folder.path for folder in folders], limit=QUICK_LIMIT if quick else None)
    report = write_report(folders, out)
    for folder in folders:
        write_own_report(folder)
    return report


def demo_recipe(name: str, out: Path, changes: Sequence[str] = ()) -> Recipe:
    """The shipped recipe tiny_NAME with its output below `out`."""
    return load_recipe(f"tiny_{name}", (*changes, setting("name", name), setting("output", str(out / name))))


def clear(out: Path) -> None:
    """Remove what an earlier demo wrote to `out`; refuse when anything else lies there."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise RequestError(f"--out: {out} is not a folder")
    mark = read_json(out / MARK) if (out / MARK).is_file() else {"wrote": []}
    wrote = mark.get("wrote") if isinstance(mark, dict) else None
    ours = [*wrote, MARK] if isinstance(wrote, list) else []
    entries = sorted(out.iterdir())
    if strange := [entry.name for entry in entries if entry.name not in ours]:
        raise RequestError(
            f"--out: {out} holds what the demo did not write ({', '.join(strange[:3])}); name another"
        )
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()


def keep_mark(out: Path) -> None:
    """Note what this demo writes: the three runs, and the report's files."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARK, {"wrote": [*RUNS, "report.json", "report.md", "plots"]})


def runs(out: Path) -> list[RunFolder]:
    """The demo's run folders. Raises RequestError when there is none."""
    return [RunFolder.open(out / name) for name in RUNS]
