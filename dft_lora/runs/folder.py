"""The third narrow waist: a run as files.

    adapter/                 the trained adapter, peft format, safetensors (absent for a bare base)
    run.json                 resolved recipe, versions, commit, device, hashes, command, figures
    metrics.jsonl            one line a logged step
    curves.png               nll, mean probability and entropy of the training steps
    checkpoints/             where training goes on from
    steps/step-N/            a checkpoint that was evaluated, as a run folder
    evaluation/TASK.jsonl    one line a sample
    report.json

Training writes it, evaluation adds to it, reports and the page read it. JSON, YAML and
safetensors only: nothing in a run folder is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config import Recipe, parse_recipe
from ..errors import DataError, RequestError, RunError
from .atomic import damage

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

ALWAYS = ("recipe", "template", "template_hash")
"""What `run.json` holds from the first time it is written."""


class RunFolder:
    """One run's folder; attributes are paths and readers."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.report_file = self.path / "report.json"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def begun(self) -> bool:
        return (self.path / "run.json").is_file()

    @property
    def has_adapter(self) -> bool:
        return (self.adapter / ADAPTER_FILES[0]).is_file()

    @property
    def finished(self) -> bool:
        """Whether the adapter is that of the run's last step; true of a bare base, and of a checkpoint's run.

        `steps` is what the run is to have, `figures` is written with the final adapter: a run that is being
        extended has the adapter of fewer steps.
        """
        if not self.begun:
            return False
        facts = self.run()
        if "step" in facts or "steps" not in facts:  # a checkpoint; nothing was trained
            return self.has_adapter or "step" not in facts
        return self.has_adapter and facts.get("figures", {}).get("last", {}).get("step") == facts["steps"]

    @property
    def adapter_digest(self) -> str | None:
        """sha256 over the adapter's config and weights: which weights answer here. None for a bare base."""
        return adapter_digest(self.adapter)

    @property
    def base_fingerprint(self) -> str | None:
        """Of the base under this run, from when it was made; None where an earlier version made it."""
        facts = self.run()
        return facts.get("identity", facts).get("base")

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A new, empty folder; hidden leftovers of a run killed before it began do not count.

        Raises RequestError when it already holds anything, or cannot be written.
        """
        folder = cls(path)
        try:
            if folder.path.exists() and (
                not folder.path.is_dir() or any(not p.name.startswith(".") for p in folder.path.iterdir())
            ):
                raise RequestError(
                    f"output: {folder.path} exists; name another folder, or go on with --resume"
                )
        except OSError as error:
            raise RequestError(f"output: cannot write {folder.path}: {error.strerror}") from None
        make_writable(folder.path, "output")
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run. Raises RequestError when there is none, or its run.json is broken."""
        folder = cls(path)
        if not folder.begun:
            raise RequestError(f"{folder.path}: not a run folder (no run.json)")
        facts = folder.run()
        if missing := [key for key in ("recipe", "template", "template_hash") if key not in facts]:
            raise DataError(f"{folder.path / 'run.json'}: broken ({', '.join(missing)} missing)")
        folder.recipe()
        return folder

    def checkpoint_run(self, name: str) -> RunFolder:
        """The run folder `steps/NAME` of a checkpoint, its adapter copied: it is evaluated like any run.

        Raises RequestError where there is no whole checkpoint of that name.
        """
        checkpoint, run = self.checkpoints / name, RunFolder(self.path / "steps" / name)
        if run.begun and run.adapter_digest == adapter_digest(checkpoint / "adapter"):
            return run
        if why := damage(checkpoint):
            kept = ", ".join(sorted(path.name for path in self.checkpoints.glob("step-*"))) or "none"
            raise RequestError(f"{checkpoint}: no whole checkpoint there ({why}); kept are: {kept}")
        shutil.copytree(checkpoint / "adapter", run.adapter, dirs_exist_ok=True)
        facts = self.run()
        recipe = facts["recipe"] | {"name": name, "output": str(run.path)}
        run.write_run(**facts | {"recipe": recipe, "step": int(name.removeprefix("step-"))})
        return run

    def checkpoint_runs(self) -> list[RunFolder]:
        """`checkpoint_run` for every checkpoint that was kept, in order of steps."""
        return [self.checkpoint_run(path.name) for path in sorted(self.checkpoints.glob("step-*"))]

    def write_run(self, **facts: Any) -> None:
        """Add facts to `run.json`."""
        file = self.path / "run.json"
        before = self.run() if file.is_file() else {}
        with writing(file):
            write_json(file, before | facts)

    def run(self) -> dict[str, Any]:
        """`run.json`. Raises DataError where it cannot be read or lacks what every run has from its start."""
        file = self.path / "run.json"
        facts = read_json(file)
        missing = [key for key in ALWAYS if not isinstance(facts, dict) or key not in facts]
        if missing:
            raise DataError(f"{file}: not the record of a run ({', '.join(missing)} missing)")
        return facts

    def recipe(self) -> Recipe:
        """The recipe this run was made with."""
        return parse_recipe(self.run()["recipe"], where=str(self.path / "run.json"))

    def log(self, line: dict[str, Any]) -> None:
        """Append one step to `metrics.jsonl`."""
        with writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def flush_metrics(self) -> None:
        """Force `metrics.jsonl` to the disk."""
        if self.metrics_file.is_file():
            with writing(self.metrics_file), self.metrics_file.open("a") as file:
                os.fsync(file.fileno())

    def cut_metrics(self, step: int) -> None:
        """Forget the lines after `step`, and one that a kill cut off: those steps are done again."""
        if not self.metrics_file.is_file():
            return
        kept = []
        for text in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(text)["step"] > step:
                    break
            except ValueError:
                break
            kept.append(text + "\n")
        with writing(self.metrics_file):
            write_text(self.metrics_file, "".join(kept))

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self.metrics_file)) if self.metrics_file.is_file() else []

    def evaluation(self, task: str) -> Path:
        return self.path / "evaluation" / f"{task}.jsonl"


def open_runs(paths: Sequence[str | Path]) -> list[RunFolder]:
    """Runs to be evaluated, compared or shown; RUN_DIR/checkpoints/step-N opens as a run of its own.

    Raises RequestError when one is no run, has not finished, or is named twice.
    """
    folders = [_open_finished(Path(path)) for path in paths]
    places = [folder.path.resolve() for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise RequestError(f"RUN_DIR: {folders[i].path} is named twice")
    return folders


def _open_finished(path: Path) -> RunFolder:
    if path.parent.name == "checkpoints" and RunFolder(path.parent.parent).begun:
        return RunFolder.open(path.parent.parent).checkpoint_run(path.name)
    folder = RunFolder.open(path)
    if not folder.finished:
        newest = max(folder.checkpoints.glob("step-*"), default=None)
        named = f", or name a checkpoint: {newest}" if newest else ""
        raise RequestError(
            f"{folder.path}: the run has not finished (no adapter of step {folder.run().get('steps')}); "
            f"go on with dft-lora train RECIPE --resume{named}"
        )
    return folder


def adapter_digest(path: Path) -> str | None:
    """sha256 over the config and weights of the adapter in the folder `path`; None where there is none."""
    files = [path / name for name in ADAPTER_FILES]
    if not files[0].is_file():
        return None
    found = [(file, file.stat()) for file in files if file.is_file()]
    return _digest(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in found))


@lru_cache(256)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of (file, size, time of its last change): files are read again once one of them differs."""
    sha = hashlib.sha256()
    for file, size, _ in files:
        sha.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            while block := content.read(2**20):
                sha.update(block)
    return sha.hexdigest()


@contextmanager
def writing(path: Path, then: str = "go on with --resume") -> Iterator[None]:
    """Within it, a full or broken disk becomes a RunError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror or error}); what was there before is untouched: "
            f"make room and {then}"
        ) from None


def make_writable(path: Path, where: str) -> None:
    """Make the folder `path` if need be, and prove that files can be written there.

    Raises RequestError that opens with `where`, the flag or field that named it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RequestError(f"{where}: cannot write {path}: {error.strerror}; name another folder") from None


@contextmanager
def new_folder(path: Path, where: str) -> Iterator[None]:
    """A new folder that is there when the work within is done, and gone when it fails.

    Raises RequestError where it exists or cannot be made, RunError where the disk is full or broken.
    """
    if os.path.lexists(path):
        raise RequestError(f"{where}: {path} exists; name another folder")
    make_writable(path, where)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"{path} could not be written ({error.strerror or error}); make room") from None
        raise


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Within it, values of `path` that are missing or of another kind become a DataError that names it."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path}: not as dft-lora writes it ({type(error).__name__}: {error}); evaluate again with "
            "--overwrite, or bring it back from a copy"
        ) from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}: line {number} is broken ({error})") from None
                if not isinstance(value, dict):
                    raise DataError(f"{path}: line {number} is a {type(value).__name__}, not an object")
                yield value
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all: a temporary file, flushed to disk, then renamed over the old one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
