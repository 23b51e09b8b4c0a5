"""Trains on the page: two objectives side by side, one training at a time for all visitors of a server.

A visitor's wishes are a `Setup`, checked field by field since they come from outside. A training is a folder
below the workshop's home with two recipes and two ordinary run folders; it is left by pausing, and continued
here or by `dft-lora train RECIPE --resume`.

    runs/page/3/sft.yaml  sft/  dft.yaml  dft/  rows.jsonl (an uploaded file)
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import Recipe, load_recipe, setting, yaml_text
from ..data.templates import Example
from ..errors import DataError, RecipeError, RequestError, RunError
from ..evaluation.diagnosis import diagnose
from ..loss.objectives import objective, objective_names
from ..model.cache_folder import cache_folder, is_kept
from ..model.known import KNOWN
from ..model.limits import positions
from ..runs.folder import RunFolder, make_writable, steps_in, write_text
from ..tasks import get_task
from ..training.plan import Plan, make_plan
from ..training.preflight import preflight
from ..training.side_by_side import SideBySide
from .session import TORCH_RANDOM, check_number, check_text

HOME = Path("runs/page")
ROWS = "rows.jsonl"  # an uploaded file, in the folder of its training
TASKS = {
    "arithmetic: 8 % wrong steps": ("arithmetic", "train"),
    "arithmetic: no wrong steps": ("arithmetic", "train-clean"),
    "word-problems": ("word-problems", "train"),
    "codebook: facts that no base knows": ("codebook", "train"),
}
EXAMPLE = 20  # the problem of a test set that the page proposes; the demo's runs disagree on it
MAX_UPLOAD = 2 * 2**20  # bytes
MAX_ROWS = 5_000
LONGEST_ROW = 20_000  # characters
MAX_STEPS = 1_000
KEPT = 10  # checkpoints of a training on the embedded base, for the slider over steps
KEPT_OF_LARGE = 3  # on a base whose checkpoints take tens of MB
SAID = 10  # times during a training that the runs answer the visitor's problem
SAID_BY_LARGE = 4  # the same on a base where an answer takes seconds
LIVE_TOKENS = 96  # at most in such an answer
KNOWN_COLUMNS = (
    ("problem", "question", "prompt", "instruction"),
    ("solution", "answer", "completion", "output"),
)
SCORED = 64  # examples that the diagnosis looks at


def bases() -> list[str]:
    """The bases that are here: the embedded one, and those that were fetched before."""
    return ["tiny", *(name for name in KNOWN if is_kept(cache_folder() / "bases" / name))]


def defaults(base: str) -> tuple[str, str, float]:
    """What suits a base: the choice of TASKS, a problem of that task, and the learning rate of its recipe."""
    recipe = load_recipe(f"{base}_sft")
    source = next(shown for shown, (task, _) in TASKS.items() if task == recipe.data.source)
    task = get_task(recipe.data.source)
    return source, task.problems()[EXAMPLE].question, recipe.train.learning_rate


def objective_choices() -> list[str]:
    """The objectives that need solutions alone, and DFT with the floor that ends answers on real bases."""
    known = {name: objective(name) for name in objective_names()}
    fitting = [n for n, one in known.items() if one.learns_from == "solutions" and one.toward is None]
    return ["sft", "dft", "dft floor=0.1", *(name for name in fitting if name not in ("sft", "dft"))]


@dataclass(frozen=True)
class Upload:
    """Rows that a visitor uploaded, checked but not yet read as problems."""

    name: str
    text: str = field(repr=False)
    columns: tuple[str, ...]
    """Those of the first row."""
    rows: int

    @classmethod
    def read(cls, name: str, content: bytes) -> Upload:
        """Raises RequestError for anything but lines of JSON within the limits, in one line."""
        shown = re.sub(r"[^\w .-]", "?", Path(name).name)[:60]
        if not name.endswith(".jsonl"):
            raise RequestError(f"upload: {shown} is not a .jsonl file, with one JSON object per line")
        if len(content) > MAX_UPLOAD:
            raise RequestError(f"upload: {shown} has {len(content):,} bytes; at most {MAX_UPLOAD:,}")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise RequestError(f"upload: {shown} is not UTF-8 text") from None
        rows = [line for line in text.split("\n") if line.strip()]
        if not 1 <= len(rows) <= MAX_ROWS:
            raise RequestError(f"upload: {shown} has {len(rows):,} rows; 1 to {MAX_ROWS:,} are possible")
        for number, row in enumerate(rows, start=1):
            if len(row) > LONGEST_ROW:
                raise RequestError(
                    f"upload: row {number} of {shown} has {len(row):,} characters; at most {LONGEST_ROW:,}"
                )
        try:
            first = json.loads(rows[0])
        except (ValueError, RecursionError):
            raise RequestError(f"upload: row 1 of {shown} is not JSON") from None
        if not isinstance(first, dict) or not first:
            raise RequestError(f"upload: row 1 of {shown} is not an object with named columns")
        return cls(shown, text, tuple(str(column)[:100] for column in first)[:50], len(rows))

    def guess(self) -> tuple[str, str]:
        """The columns that look like prompt and completion, else the first two."""
        found = [next((name for name in names if name in self.columns), "") for names in KNOWN_COLUMNS]
        return found[0] or self.columns[0], found[1] or self.columns[-1]


@dataclass(frozen=True)
class Setup:
    """What a visitor wants to train. Every field is checked, since it comes from outside."""

    base: str = "tiny"
    source: str = next(iter(TASKS))
    prompt: str = "problem"
    completion: str = "solution"
    first: str = "sft"
    second: str = "dft"
    steps: int = 60
    learning_rate: float = 1e-3
    upload: Upload | None = field(default=None, repr=False)

    def __post_init__(self):
        for name, value, known in (
            ("base", self.base, bases()),
            ("objective A", self.first, objective_choices()),
            ("objective B", self.second, objective_choices()),
        ):
            if value not in known:
                raise RequestError(f"{name}: {value!r:.40} is not one of {', '.join(known)}")
        if self.first == self.second:
            raise RequestError("objective B: choose another than objective A")
        if self.upload is None and self.source not in TASKS:
            raise RequestError(f"data: {self.source!r:.40} is not one of {', '.join(TASKS)}")
        for name, text in (("prompt column", self.prompt), ("completion column", self.completion)):
            check_text(name, text)
        check_number("steps", self.steps, 1, MAX_STEPS, whole=True)
        check_number("learning rate", self.learning_rate, 1e-8, 1)

    def recipes(self, home: Path, changes: Sequence[str] = ()) -> list[Recipe]:
        """The recipes of both runs below `home`: the base's shipped one with the visitor's wishes.

        The server's own `changes` come last. An upload is read from `home/ROWS`.
        """
        source, split = TASKS.get(self.source, ("", "train"))
        data = [setting("data.source", source), setting("data.split", split)]
        if self.upload is not None:
            data = [
                setting("data.source", str(home / ROWS)),
                setting("data.prompt", self.prompt),
                setting("data.completion", self.completion),
            ]
        kept = KEPT if self.base == "tiny" else KEPT_OF_LARGE
        steps = int(self.steps)
        shared = [
            *data,
            setting("train.max_steps", steps),
            setting("train.learning_rate", float(self.learning_rate)),
            setting("train.save_steps", -(-steps // kept)),
            setting("train.keep_checkpoints", kept + 2),  # and two at which it may have been paused
        ]
        names = [re.sub(r"[^a-z-]+", "-", said.split("=")[0]) for said in (self.first, self.second)]
        return [
            load_recipe(
                f"{self.base}_sft",
                [
                    *shared,
                    setting("objective", _objective(said)),
                    setting("name", name),
                    setting("output", str(home / name)),
                    *changes,
                ],
            )
            for said, name in zip((self.first, self.second), names, strict=True)
        ]

    @contextmanager
    def tried(self, changes: Sequence[str]) -> Iterator[Recipe]:
        """The second run's recipe, to look at before a training; an upload is on disk only meanwhile.

        Of the two it is the one that may not learn everything: the first is SFT, as the page proposes it.
        """
        with tempfile.TemporaryDirectory(prefix="dft-lora-") as home:
            rows = Path(home, ROWS)
            if self.upload is not None:
                rows.write_text(self.upload.text, encoding="utf-8")
            try:
                yield self.recipes(Path(home), changes)[1]
            except DataError as error:  # it names a file of ours, not of the visitor's
                shown = self.upload.name if self.upload else ""
                raise DataError(str(error).replace(str(rows), shown)) from None


def _objective(said: str) -> dict[str, Any]:
    """`dft floor=0.1` as a recipe's section."""
    name, *numbers = said.split()
    return {"name": name} | {key: float(value) for key, value in (one.split("=") for one in numbers)}


@dataclass(frozen=True)
class Inspection:
    """What can be known of a setup before it is trained."""

    plan: Plan
    diagnosis: dict[str, Any]


State = Literal["loading", "training", "paused", "stopped", "done"]


@dataclass
class Moment:
    """A training as it is now: what the page shows. `said` and `probabilities` have an entry per column."""

    number: int
    runs: tuple[str, ...]
    steps: int
    done: int = 0
    state: State = "loading"
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    probabilities: dict[str, list[float]] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    said_at: int = 0
    commands: list[str] = field(default_factory=list)
    """How the command line continues the runs."""


class Training:
    """Two runs in the folder `path`: their recipes, and whether a visitor has asked them to pause or stop."""

    def __init__(self, path: Path, recipes: Sequence[Recipe]):
        self.path, self.recipes = path, list(recipes)
        self.asked: Literal["paused", "stopped"] | None = None

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def folders(self) -> list[RunFolder]:
        return [RunFolder(recipe.output_dir) for recipe in self.recipes]

    @property
    def finished(self) -> bool:
        return all(folder.finished for folder in self.folders)

    def shown(self, stopped: bool) -> list[RunFolder]:
        """The runs as they can be compared: finished, or as they were `stopped`; else none."""
        if self.finished:
            return self.folders
        kept = [list(steps_in(folder.checkpoints).values()) for folder in self.folders]
        if not stopped or not all(kept):
            return []
        return [
            folder.checkpoint_run(paths[-1].name) for folder, paths in zip(self.folders, kept, strict=True)
        ]

    @property
    def commands(self) -> list[str]:
        """How the command line continues the two runs."""
        files = [self.path / f"{recipe.name}.yaml" for recipe in self.recipes]
        return [f"dft-lora train {shlex.quote(str(file))} --resume" for file in files]


class Workshop:
    """The trainings of a server, of which one runs at a time."""

    def __init__(self, home: Path = HOME, changes: Sequence[str] = ()):
        self.home, self.changes = home, tuple(changes)
        self._turn = threading.Lock()
        self.current: Moment | None = None
        self.running: Training | None = None

    def begin(self, setup: Setup) -> Training:
        """A new training in a folder of its own. Raises RequestError when it cannot be written."""
        make_writable(self.home, "runs of the page")
        while True:
            taken = [int(path.name) for path in self.home.iterdir() if path.name.isdigit()]
            path = self.home / str(max(taken, default=0) + 1)
            recipes = setup.recipes(path, self.changes)
            with suppress(FileExistsError):  # another server with the same home was faster
                path.mkdir()
                break
        try:
            if setup.upload is not None:
                write_text(path / ROWS, setup.upload.text)
            for recipe in recipes:
                text = yaml_text(recipe.as_dict())
                write_text(path / f"{recipe.name}.yaml", text)
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise RunError(f"{path} could not be written ({error.strerror}); free some space") from None
        return Training(path, recipes)

    def unfinished(self) -> list[Training]:
        """Trainings that were paused or stopped, or whose server ended; the newest first."""
        running = self.running and self.running.number
        found = []
        for one in self._all():
            with suppress(DataError):  # a damaged run
                if one.number != running and not one.finished:
                    found.append(one)
        return sorted(found, key=lambda training: -training.number)

    def open(self, number: int) -> Training:
        """Raises RequestError when there is no such training."""
        for training in self._all():
            if training.number == number:
                return training
        raise RequestError(f"training {number}: not in {self.home}")

    def _all(self) -> list[Training]:
        found = []
        for path in self.home.glob("[0-9]*"):
            files = sorted(path.glob("*.yaml"))
            if path.name.isdigit() and len(files) == 2:
                with suppress(RecipeError):  # a damaged folder does not hide the others
                    recipes = [load_recipe(str(file)) for file in files]
                    recipes.sort(key=lambda recipe: recipe.objective.name != "sft")  # files have no order
                    found.append(Training(path, recipes))
        return found

    def ask(self, number: int, what: Literal["paused", "stopped"]) -> None:
        """Pause or stop the training of this number after its step; another's goes on."""
        if self.running is not None and self.running.number == number:
            self.running.asked = what

    def inspect(self, setup: Setup) -> Inspection:
        """Read the data as a training would, and score some of it under the base."""
        with setup.tried(self.changes) as recipe, TORCH_RANDOM:
            return Inspection(make_plan(recipe), diagnose(recipe, SCORED))

    def measure(self, setup: Setup) -> dict[str, Any]:
        """Memory and time of one run, measured (`training/preflight.py`)."""
        with setup.tried(self.changes) as recipe, TORCH_RANDOM:
            return preflight(recipe)

    def watch(self, wanted: Setup | Training, problem: str) -> Iterator[Moment]:
        """Train until the end, or until `ask`; yields the same moment, renewed, after each step.

        A setup becomes a new training; an earlier one goes on from its newest checkpoints. Base and runs
        answer `problem` SAID times. Closing the generator saves a checkpoint too. Raises RequestError while
        another visitor trains, and like `train`.
        """
        check_text("problem", problem)
        if not self._turn.acquire(blocking=False):
            now = self.current
            at = f" (step {now.done} of {now.steps})" if now else ""
            raise RequestError(
                f"a training is running{at}, and this server has room for one; try again when it is done"
            )
        try:
            training = self.begin(wanted) if isinstance(wanted, Setup) else wanted
            training.asked, self.running = None, training
            yield from self._watched(training, problem)
        finally:
            self.current = self.running = None
            self._turn.release()

    def _watched(self, training: Training, problem: str) -> Iterator[Moment]:
        begun = any(folder.begun for folder in training.folders)
        names = tuple(recipe.name for recipe in training.recipes)
        steps = training.recipes[0].train.max_steps or 0
        self.current = now = Moment(training.number, names, steps, commands=training.commands)
        yield now
        with ExitStack() as held:
            for folder in training.folders:
                held.enter_context(folder.held())
            yield from self._held(training, begun, problem, now)

    def _held(self, training: Training, begun: bool, problem: str, now: Moment) -> Iterator[Moment]:
        try:
            with TORCH_RANDOM:
                runs = SideBySide(training.recipes, resume=begun)
        except RequestError:
            if not any(folder.begun for folder in training.folders):
                shutil.rmtree(training.path)  # nothing uploaded stays for a training that never began
            raise
        live = Live(runs, now, problem)
        live.look()
        now.state = "training"
        try:
            yield now
            while not runs.complete and not training.asked:
                with TORCH_RANDOM:
                    live.step()
                yield now
        except GeneratorExit:
            if not runs.complete:
                self._save(runs)
            raise
        if runs.complete:
            runs.finish()
            now.state = "done"
        else:
            self._save(runs)
            now.state = training.asked or "paused"
        live.answer()
        yield now

    def _save(self, runs: SideBySide) -> None:
        with TORCH_RANDOM:
            runs.save()


class Live:
    """Keeps a moment up to date: metrics, one example's tokens, answers to the visitor's problem."""

    def __init__(self, runs: SideBySide, now: Moment, problem: str):
        self.runs, self.now = runs, now
        self.example = typical(runs.plan.examples)
        renderer = runs.plan.renderer
        now.pieces = renderer.pieces(list(self.example.ids[max(1, self.example.prompt_length) :]))
        now.metrics = {name: run.folder.metrics() for name, run in runs.runs.items()}
        now.done = runs.done
        tiny = runs.plan.recipe.model.name == "tiny"
        times, self.most = (SAID, LIVE_TOKENS) if tiny else (SAID_BY_LARGE, LIVE_TOKENS // 2)
        self.every = max(1, now.steps // times)
        self.problem: tuple[int, ...] = ()
        if problem.strip():
            asked = tuple(renderer.prompt_ids([{"role": "user", "content": problem}]))
            room = positions(runs.base.config)
            if room is not None and len(asked) + self.most > room:
                now.said["base"] = f"(not asked: the problem does not fit the base's {room} positions)"
                return
            self.problem = asked
            now.said["base"] = runs.base_answer(self.problem, self.most)

    def step(self) -> None:
        """One step of both runs."""
        for name, figures in self.runs.step().items():
            self.now.metrics[name].append(figures)
        self.now.done = self.runs.done
        self.look()

    def look(self) -> None:
        """Score the example, and answer if it is time to."""
        self.now.probabilities = self.runs.probabilities(self.example)
        if self.now.done % self.every == 0:
            self.answer()

    def answer(self) -> None:
        """Let both runs answer the visitor's problem."""
        if self.problem:
            self.now.said |= self.runs.answers(self.problem, self.most)
            self.now.said_at = self.now.done


def typical(examples: Sequence[Example]) -> Example:
    """An example of middling length: long enough to have steps, short enough to read."""
    return sorted(examples, key=lambda example: (example.supervised, example.id))[2 * len(examples) // 3]
