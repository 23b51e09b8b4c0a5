"""`make demo` and `make real`: train, evaluate and compare on the embedded base, or on a real one.

base, sft and dft are three run folders over one 4-bit base. The two adapters start from the same weights, see
the same data in the same order, and differ only in the objective.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Recipe, load_recipe, setting
from ..errors import RequestError
from ..evaluation.base_run import base_run
from ..evaluation.evaluate import evaluate
from ..evaluation.report import write_own_report, write_report
from ..model.known import KNOWN
from ..model.load import resolve
from ..runs.folder import RunFolder, make_writable, read_json, write_json
from ..tasks import available
from ..training.loop import train

RUNS = ("base", "sft", "dft")
MARK = "demo.json"  # lists what a demo wrote; the next demo replaces nothing else
QUICK = ("train.max_steps=6", "evaluate.samples=1")
QUICK_LIMIT = 12
BASES = ("tiny", *KNOWN)
REAL = ("evaluate.samples=2", 'evaluate.tasks=["word-problems"]')
REAL_LIMIT = 60  # problems of each task; with REAL a real base takes under 15 minutes on two cores
HUMAN = "school-problems"  # a set that people wrote, for real bases, where it can be had
CLEAN = ("data.split=train-clean",)  # without the 8 % of wrong steps in "train"


def run_demo(
    out: Path, seed: int = 0, quick: bool = False, clean: bool = False, base: str = "tiny"
) -> dict[str, Any]:
    """Train SFT and DFT adapters on a base of BASES, evaluate them and the base, and write the report.

    Raises RequestError when `out` contains files that no demo wrote, or cannot be written, and for `clean` on
    a real base.
    """
    if clean and base != "tiny":
        raise RequestError(f"--clean: the demonstrations for {base} have no errors; leave it out")
    changes = (
        f"train.seed={seed}",
        f"evaluate.seed={seed}",
        *(QUICK if quick else REAL if base != "tiny" else ()),
        *(CLEAN if clean else ()),
    )
    for name in RUNS[1:]:
        recipe = demo_recipe(name, out, changes, base)  # a wrong value is an error before anything is removed
    resolve(recipe.model)  # a real base is fetched before anything is removed
    clear(out)
    make_writable(out, "--out")
    keep_mark(out)
    tasks = list(recipe.evaluate.tasks)
    if base != "tiny" and available(HUMAN):
        tasks.append(HUMAN)
    limit = QUICK_LIMIT if quick else REAL_LIMIT if base != "tiny" else None
    report = evaluate_runs(train_runs(out, changes, base), out, limit, tasks)
    keep_mark(out, finished=True)
    return report


def train_runs(out: Path, changes: Sequence[str] = (), base: str = "tiny") -> list[RunFolder]:
    """The runs of RUNS below `out`: the bare base and one adapter per objective."""
    recipes = [demo_recipe(name, out, changes, base) for name in RUNS[1:]]
    return [base_run(recipes[0], out / RUNS[0]), *map(train, recipes)]


def evaluate_runs(
    folders: Sequence[RunFolder], out: Path, limit: int | None = None, tasks: Sequence[str] = ()
) -> dict[str, Any]:
    """Evaluate the runs; write a report on each to its folder and the report that compares them to `out`."""
    evaluate([folder.path for folder in folders], tasks, limit=limit)
    report = write_report(folders, out)
    for folder in folders:
        write_own_report(folder)
    return report


def demo_recipe(name: str, out: Path, changes: Sequence[str] = (), base: str = "tiny") -> Recipe:
    """The shipped recipe BASE_NAME with its output below `out`."""
    return load_recipe(
        f"{base}_{name}", (*changes, setting("name", name), setting("output", str(out / name)))
    )


def clear(out: Path) -> None:
    """Remove what an earlier demo wrote to `out`. Raises RequestError when `out` contains anything else."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise RequestError(f"--out: {out} is not a folder")
    mark = read_json(out / MARK) if (out / MARK).is_file() else {"wrote": []}
    mark = mark if isinstance(mark, dict) else {}
    wrote = mark.get("wrote")
    ours = [*wrote, MARK] if isinstance(wrote, list) else []
    entries = sorted(out.iterdir())
    foreign = [entry.name for entry in entries if entry.name not in ours]
    if isinstance(mark.get("files"), list):  # the demo finished: what lies in its runs since then is kept
        foreign += sorted({*_files(out)} - {*mark["files"], MARK})
    if foreign:
        raise RequestError(
            f"--out: {out} contains files that the demo did not write ({', '.join(foreign[:3])}); "
            "move them, or name another folder"
        )
    for path in entries:
        if RunFolder(path).begun:
            with RunFolder(path).held():  # refuses a run that another demo is training
                pass
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()


def keep_mark(out: Path, finished: bool = False) -> None:
    """Record what the demo writes: the three runs and the report's files, and at its end each file."""
    out.mkdir(parents=True, exist_ok=True)
    files = {"files": _files(out)} if finished else {}
    write_json(out / MARK, {"wrote": [*RUNS, "report.json", "report.md", "plots"], **files})


def _files(out: Path) -> list[str]:
    """The files below `out`, without plots, and without the copies of checkpoints that the page makes."""
    files = (path.relative_to(out) for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    kept = (file for file in files if "plots" not in file.parts)
    return sorted(str(file) for file in kept if "steps" not in file.parts or "evaluation" in file.parts)


def runs(out: Path) -> list[RunFolder]:
    """The demo's run folders below `out`. Raises RequestError when one is missing."""
    return [RunFolder.open(out / name) for name in RUNS]
