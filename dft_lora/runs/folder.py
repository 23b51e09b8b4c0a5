"""A run on disk.

    adapter/                 the trained adapter in peft format, safetensors (absent for a bare base)
    run.json                 resolved recipe, versions, commit, device, hashes, command, final metrics
    metrics.jsonl            one line per logged step
    curves.png               NLL, mean probability and entropy over the training steps
    checkpoints/             from which training resumes
    steps/step-N/            a checkpoint that was evaluated, as a run folder
    evaluation/TASK.jsonl    one line per answer
    report.json

Training writes it, evaluation adds to it, reports and the page read it. It contains only JSON and
safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..config import Recipe, parse_recipe
from ..errors import DataError, RequestError, RunError, one_line
from .atomic import damage, write_folder
from .files_hash import files_hash

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

ALWAYS = ("recipe", "template", "template_hash")
"""The keys of `run.json` that are there from the first time it is written."""


class RunFolder:
    """The folder of one run: its paths, and methods that read and write them."""

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
    def whole(self) -> RunFolder:
        """The run that a checkpoint's run folder belongs to; a whole run itself."""
        above = RunFolder(self.path.parent.parent)
        return above if self.path.parent.name == "steps" and above.begun else self

    @property
    def full_name(self) -> str:
        """The name of a run; a checkpoint's follows that of its run."""
        return self.name if self.whole is self else f"{self.whole.name}-{self.name}"

    @property
    def begun(self) -> bool:
        return (self.path / "run.json").is_file()

    @property
    def has_adapter(self) -> bool:
        return (self.adapter / ADAPTER_FILES[0]).is_file()

    @property
    def finished(self) -> bool:
        """Whether the adapter is that of the run's last step; also true of a bare base and of a checkpoint.

        `steps` is the planned number of steps; `figures` is written with the final adapter. While a run is
        being extended, its adapter is that of fewer steps than planned.
        """
        if not self.begun:
            return False
        metadata = self.run()
        if "step" in metadata or "steps" not in metadata:  # a checkpoint, or a bare base
            return self.has_adapter or "step" not in metadata
        trained = metadata.get("figures", {}).get("last", {}).get("step")
        return self.has_adapter and trained == metadata["steps"]

    @property
    def adapter_digest(self) -> str | None:
        """sha256 over the adapter's config and weights; None for a bare base."""
        return adapter_digest(self.adapter)

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the base when the run was made; None if an earlier version did not record it."""
        metadata = self.run()
        base = metadata.get("identity", metadata).get("base")
        return None if base is None or "@" in base else base  # name@None was recorded for a base from the Hub

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Create a new folder. Hidden files, which a run killed before it starts leaves, may be in it.

        Raises RequestError when it contains anything else, or cannot be written.
        """
        folder = cls(path)
        try:
            if folder.path.exists() and (
                not folder.path.is_dir() or any(not p.name.startswith(".") for p in folder.path.iterdir())
            ):
                raise RequestError(
                    f"output: {folder.path} exists; name another folder, or continue the run with --resume"
                )
        except OSError as error:
            raise RequestError(f"output: cannot write {folder.path}: {error.strerror}") from None
        make_writable(folder.path, "output")
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run. Raises RequestError when there is none or its run.json is broken."""
        folder = cls(path)
        if not folder.begun:
            raise RequestError(f"{folder.path}: not a run folder (no run.json)")
        folder.recipe()
        return folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """While open, no other process trains or evaluates this run. Of several ranks the first one holds it.

        A folder that cannot be written, or a file system without locks, is not held. Raises RequestError when
        another process holds it.
        """
        from filelock import FileLock, Timeout

        if int(os.environ.get("RANK", 0)):
            yield
            return
        new = not os.path.exists(self.path)
        # No soft lock where the file system has none: its file stays when the process is killed.
        lock = FileLock(self.path / ".lock", thread_local=False, fallback_to_soft=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            raise RequestError(
                f"{self.path}: another process is training or evaluating this run; wait until it has finished"
            ) from None
        except (OSError, NotImplementedError):
            pass
        if lock.is_locked:
            self._remove_leftovers()
        try:
            yield
        finally:
            with suppress(OSError):
                if lock.is_locked:
                    (self.path / ".lock").unlink()  # while it is held: filelock notices that it is gone
                if new and not self.begun:
                    self.path.rmdir()
            lock.release()

    def _remove_leftovers(self) -> None:
        """Remove what a process left that was killed in `write_text`; only for the holder of the run."""
        for pattern in (".*.tmp", "evaluation/.*.tmp"):
            for leftover in self.path.glob(pattern):
                with suppress(OSError):
                    leftover.unlink()

    def checkpoint_run(self, name: str) -> RunFolder:
        """The run folder `steps/NAME` of a checkpoint, with a copy of its adapter, ready to be evaluated.

        Raises RequestError when there is no complete checkpoint of that name.
        """
        checkpoint, run = self.checkpoints / name, RunFolder(self.path / "steps" / name)
        if run.begun and run.adapter_digest == adapter_digest(checkpoint / "adapter"):
            return run
        if why := damage(checkpoint):
            kept = ", ".join(path.name for path in steps_in(self.checkpoints).values()) or "none"
            raise RequestError(f"{checkpoint}: no complete checkpoint there ({why}); available: {kept}")
        with writing(run.path, "try again"):
            files = sorted((checkpoint / "adapter").iterdir())
            write_folder(run.adapter, ((file.name, file.read_bytes()) for file in files))
        metadata = self.run()
        recipe = metadata["recipe"] | {"name": name, "output": str(run.path)}
        step = int(name.removeprefix("step-"))
        last: dict[str, Any] = {}
        with suppress(DataError):  # a run that was killed may have left half a line, after these
            for line in read_lines(self.metrics_file) if self.metrics_file.is_file() else ():
                last = line if line["step"] <= step else last
        if last:
            seconds = read_json(checkpoint / "state.json")["progress"]["seconds"]
            metadata["figures"] = {"seconds": seconds, "last": last}
        run.write_run(**metadata | {"recipe": recipe, "step": step})
        return run

    def checkpoint_runs(self) -> list[RunFolder]:
        """The run folders of all kept checkpoints (see `checkpoint_run`), in order of steps."""
        return [self.checkpoint_run(path.name) for path in steps_in(self.checkpoints).values()]

    def write_run(self, **metadata: Any) -> None:
        """Add or replace keys of `run.json`."""
        file = self.path / "run.json"
        before = self.run() if file.is_file() else {}
        with writing(file):
            write_json(file, before | metadata)

    def run(self) -> dict[str, Any]:
        """The content of `run.json`. Raises DataError when it cannot be read or lacks a key of ALWAYS."""
        file = self.path / "run.json"
        metadata = read_json(file)
        missing = [key for key in ALWAYS if not isinstance(metadata, dict) or key not in metadata]
        if missing:
            raise DataError(f"{file}: not the record of a run ({', '.join(missing)} missing)")
        return metadata

    def recipe(self) -> Recipe:
        """The recipe this run was made with. A base from the Hub has its commit as revision."""
        return parse_recipe(self.run()["recipe"], where=str(self.path / "run.json"))

    def log(self, line: dict[str, Any]) -> None:
        """Append the line of one step to `metrics.jsonl`."""
        with writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def flush_metrics(self) -> None:
        """Flush `metrics.jsonl` to disk."""
        if self.metrics_file.is_file():
            with writing(self.metrics_file), self.metrics_file.open("a") as file:
                os.fsync(file.fileno())

    def cut_metrics(self, step: int) -> None:
        """Remove the lines after `step` and an incomplete last line; those steps will be repeated."""
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
    """Open finished runs to evaluate, compare or show; RUN_DIR/checkpoints/step-N opens that checkpoint.

    Raises RequestError when a path is not a run, is named twice, or when the run has not finished.
    """
    folders = [_open_finished(Path(path)) for path in paths]
    places = [folder.path.resolve() for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise RequestError(f"RUN_DIR: {folders[i].path} is named twice")
    return folders


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:06d}"


def steps_in(folder: Path) -> dict[int, Path]:
    """Step -> its folder in `checkpoints/` or `steps/`, in order of steps."""
    names = (path.name for path in folder.glob("step-*"))
    steps = sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{6,}", name))
    return {step: folder / step_name(step) for step in steps}


def _open_finished(path: Path) -> RunFolder:
    if path.resolve().parent.name == "checkpoints":
        path = path.resolve()
    if path.parent.name == "checkpoints" and RunFolder(path.parent.parent).begun:
        return RunFolder.open(path.parent.parent).checkpoint_run(path.name)
    folder = RunFolder.open(path)
    if not folder.finished:
        checkpoints = list(steps_in(folder.checkpoints).values())
        named = f", or name a checkpoint: {checkpoints[-1]}" if checkpoints else ""
        raise RequestError(
            f"{folder.path}: the run has not finished (no adapter of step {folder.run().get('steps')}); "
            f"continue it with dft-lora train RECIPE --resume{named}"
        )
    return folder


def run_names(folders: Sequence[RunFolder]) -> list[str]:
    """The folder names; equal ones follow the name of their parent, a checkpoint's that of its run."""
    names = [folder.name for folder in folders]
    places = [folder.path.resolve() for folder in folders]
    parents = [place.parent.parent if place.parent.name == "steps" else place.parent for place in places]
    longer = [
        name if names.count(name) == 1 else f"{parent.name}/{name}"
        for name, parent in zip(names, parents, strict=True)
    ]
    return longer if len({*longer}) == len(longer) else list(map(str, places))


def adapter_digest(path: Path) -> str | None:
    """sha256 over the config and weights of the adapter in the folder `path`; None if there is none."""
    files = [path / name for name in ADAPTER_FILES]
    if not files[0].is_file():
        return None
    return files_hash(file for file in files if file.is_file())


@contextmanager
def writing(path: Path, then: str = "continue with --resume") -> Iterator[None]:
    """Turn an OSError, such as a full disk, into a RunError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise RunError(
            f"{path} could not be written ({reason}); what was there before is unchanged; "
            f"free some space and {then}"
        ) from None


def make_writable(path: Path, where: str) -> None:
    """Create the folder `path` if needed, and check that files can be written to it.

    Raises RequestError starting with `where`, the flag or field that named the folder.
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
    """Create a folder and remove it again if the body fails.

    Raises RequestError when it exists or cannot be created, RunError when the disk is full or broken.
    """
    if os.path.lexists(path):
        raise RequestError(f"{where}: {path} exists; name another folder")
    make_writable(path, where)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(
                f"{path} could not be written ({error.strerror or error}); free some space"
            ) from None
        raise


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn errors from missing or wrongly typed values of `path` into a DataError that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path}: not in the format that dft-lora writes ({type(error).__name__}: {error}); evaluate "
            "again with --overwrite, or restore it from a backup"
        ) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError naming the file when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def read_lines(path: Path, partial: bool = True) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file; `partial`: also a last line that has no end yet.

    Raises DataError naming the file and the line.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not partial and not line.endswith(b"\n"):
                    return
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
    """Write a JSON file atomically (see `write_text`)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a temporary file is flushed to disk and renamed over the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk does not name the file
        raise
