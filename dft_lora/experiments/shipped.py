"""The demo runs that ship with the package, so that the page has runs to show before any have been trained.

`python -m dft_lora.experiments.shipped` runs the demo with seed 0 and replaces `shipped_runs/`. Run it after
a change to the tiny recipes, the embedded base, the chat template, or the files of a run folder. On the same
machine with the same versions, only dates and times change.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from ..errors import DftLoraError
from ..runs.atomic import write_folder
from ..runs.folder import RunFolder, read_json, write_json

HOME = Path(__file__).with_name("shipped_runs")
PER_RUN = ("run.json", "metrics.jsonl", "adapter")
"""The shipped files of a run. Checkpoints and the 2,400 answers are left out; they would double the size."""


def shipped_runs() -> list[RunFolder]:
    """The shipped runs base, sft and dft."""
    from .demo import runs

    return runs(HOME)


def make(home: Path = HOME, limit: int | None = None, changes: tuple[str, ...] = ()) -> None:
    """Replace the runs in `home`; `limit` and `changes` make a quick version.

    The runs are trained below a relative path, so that no path of this machine is recorded.
    """
    from .demo import evaluate_runs, train_runs

    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        made = Path("runs/demo")
        folders = train_runs(made, changes)
        for folder in folders:
            if folder.has_adapter:
                _name_base(folder)
        evaluate_runs(folders, made, limit)
        shutil.rmtree(home, ignore_errors=True)
        for folder in folders:
            for name in PER_RUN:
                _copy(folder.path / name, home / folder.name / name)
        _copy(made / "report.json", home / "report.json")


def _name_base(folder: RunFolder) -> None:
    """Replace the local path of the base, which peft records, by its name in the recipe."""
    config = folder.adapter / "adapter_config.json"
    write_json(config, read_json(config) | {"base_model_name_or_path": folder.recipe().model.name})
    files = sorted(folder.adapter.glob("adapter_*"))
    write_folder(folder.adapter, [(file.name, file.read_bytes()) for file in files])


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copyfile(source, target)


if __name__ == "__main__":
    try:
        make()
    except DftLoraError as error:
        print(f"error: {error}; the shipped runs are unchanged", file=sys.stderr)
        sys.exit(error.exit_code)
