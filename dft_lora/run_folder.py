"""The third narrow waist: a run as files.

    adapter/                 the trained adapter, peft format, safetensors (absent for a bare base)
    run.json                 resolved recipe, versions, commit, device, hashes, command, figures
    metrics.jsonl            one line a logged step
    curves.png               nll, mean probability and entropy of the training steps
    checkpoints/             where training goes on from
    evaluation/TASK.jsonl    one line a sample
    report.json

Training writes it, evaluation adds to it, reports and the page read it. JSON, YAML and
safetensors only: nothing in a run folder is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import Recipe, parse_recipe
from .errors import DataError, RequestError, RunError

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
        return (self.adapter / "adapter_config.json").is_file()

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
        """An existing run. Raises RequestError when there is none."""
        folder = cls(path)
        if not (folder.path / "run.json").is_file():
            raise RequestError(f"{folder.path}: not a run folder (no run.json)")
        return folder

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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, a full or broken disk becomes a RunError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror or error}); what was there before is untouched: "
            "make room and go on with --resume"
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
