"""The recipe: everything a run depends on, as YAML and as frozen values.

Every field has a default, so a recipe states only what is its own. Contradictions are
refused here, by field name, before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import RecipeError, did_you_mean

RECIPES = Path(__file__).parent / "recipes"


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class ModelConfig(Part):
    """Which base model, and how it is held in memory."""

    name: str = "tiny"
    """A path, a Hub id, or `tiny`, the embedded base."""
    revision: str | None = None
    backend: Literal["plain", "unsloth"] = "plain"
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class AdapterConfig(Part):
    """The LoRA adapter."""

    r: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"


class DataConfig(Part):
    """What the adapter is trained on, and how a problem becomes a prompt."""

    source: str = "arithmetic"
    """A task name, a path to .jsonl/.json/.parquet, or a Hub id."""
    subset: str | None = None
    """The configuration of a Hub dataset (GSM8K: main); tasks and files have none."""
    split: str = "train"
    """The split of a task or a Hub dataset; a file has none."""
    prompt: str = "problem"
    completion: str = "solution"
    answer: str | None = None
    """The column of reference answers; null: `answer`, where the rows have it. The model's own samples are
    judged by it. A row that has one is used as it stands, even if its completion ends in `#### 42`."""
    template: str = "auto"
    sample: int | None = Field(None, ge=1)
    """At most so many usable rows, drawn at random (with train.seed), instead of all."""
    max_length: int = Field(2048, ge=2)
    packing: Literal["auto"] | bool = "auto"
    skip_bad_rows: float = Field(0.0, ge=0, le=1)
    """The share of unreadable rows that may be skipped; 0 refuses the first one."""


class ObjectiveConfig(BaseModel):
    """The objective's name and its own numbers; `loss.objective` knows which are right."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = "dft"

    @property
    def numbers(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class TrainConfig(Part):
    """The optimizer step. `batch_size` counts examples of one step over all ranks."""

    learning_rate: float = Field(5e-5, gt=0)
    batch_size: int = Field(256, ge=1)
    micro_batch_size: Literal["auto"] | int = "auto"
    epochs: float = Field(1, gt=0)
    max_steps: int | None = Field(None, ge=1)
    warmup: float = Field(0.1, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    logging_steps: int = Field(1, ge=1)
    save_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; null: one every five minutes. The end and a signal always bring one."""
    keep_checkpoints: int = Field(2, ge=1)
    loss_chunk_mb: int | None = Field(None, ge=1)
    """Workspace of the loss; null: the loss engine's own choice."""
    shard: bool = False
    """Share the frozen base among several processes (FSDP), for one too large for a single GPU."""
    skip_rows: float = Field(0.0, ge=0, lt=1)
    """Relative budget of loss rows to drop (`token_logps(skip=)`); only with a weighted objective."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where each step's figures go beside `metrics.jsonl` and `curves.png`."""
    seed: int = Field(0, ge=0)

    @field_validator("micro_batch_size")
    @classmethod
    def _positive(cls, value):
        if value != "auto" and value < 1:
            raise ValueError("must be 'auto' or at least 1")
        return value

    @field_validator("betas")
    @classmethod
    def _unit_interval(cls, value):
        if not all(0 <= b < 1 for b in value):
            raise ValueError("must lie in [0, 1)")
        return value


class EvaluateConfig(Part):
    """How a run is judged."""

    tasks: tuple[str, ...] = ()
    samples: int = Field(16, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(4096, ge=1)
    template: str = "same"
    seed: int = Field(0, ge=0)
    engine: Literal["plain", "vllm"] = "plain"
    """What generates the answers; vllm is an optional part, for large runs on a GPU."""


class Recipe(Part):
    """One run, whole. `output` may hold NAME, the recipe's own name."""

    name: str = "run"
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    output: str = "runs/NAME"

    @model_validator(mode="after")
    def _consistent(self):
        micro, batch = self.train.micro_batch_size, self.train.batch_size
        if micro != "auto" and micro > batch:
            raise ValueError(f"train.micro_batch_size ({micro}) is larger than train.batch_size ({batch})")
        if self.train.shard and self.model.backend != "plain":
            raise ValueError(f"train.shard: not with model.backend {self.model.backend!r}; plain has it")
        return self

    @property
    def output_dir(self) -> Path:
        return Path(self.output.replace("NAME", self.name))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to `run.json`."""
        return self.model_dump(mode="json")

    def override(self, changes: Sequence[str]) -> Recipe:
        """A copy with `a.b=value` changes applied; values are read as YAML."""
        values = self.as_dict()
        for change in changes:
            path, equals, text = change.partition("=")
            if not equals:
                raise RecipeError(f"--set {change!r}: write it as field.name=value")
            _assign(values, path.strip().split("."), yaml.safe_load(text) if text else None, path)
        return parse_recipe(values)


def _assign(values: dict[str, Any], keys: list[str], value: Any, path: str) -> None:
    *parents, leaf = keys
    for key in parents:
        values = values.get(key, {}) if key in values else _unknown(path, key, values)
        if not isinstance(values, dict):
            raise RecipeError(f"recipe field {path!r} does not exist: {key!r} has no fields below it")
    values[leaf] = value


def _unknown(path: str, key: str, known: Mapping[str, Any]):
    raise RecipeError(f"recipe field {path!r} does not exist{did_you_mean(key, known)}")


def parse_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A Recipe from plain values. Raises RecipeError naming each wrong field and the nearest right one."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _explain(error: Mapping[str, Any]) -> str:
    path = [str(key) for key in error["loc"] if not str(key).startswith(("literal[", "function-"))]
    field = ".".join(path)
    if error["type"] == "extra_forbidden":
        part: Any = Recipe
        for key in path[:-1]:
            part = part.model_fields[key].annotation
        return f"field {field!r} does not exist{did_you_mean(path[-1], part.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    if not field:
        return message
    return f"field {field!r}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def shipped_recipes() -> dict[str, Path]:
    """Name and file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(source: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name, and apply `a.b=value` changes.

    Raises RecipeError when the file is missing, is not YAML, or holds a field that does not exist.
    """
    path = Path(source)
    shipped = shipped_recipes()
    if not path.is_file():
        if str(source) not in shipped:
            hint = did_you_mean(str(source), shipped) or f" (shipped: {', '.join(shipped)})"
            raise RecipeError(f"no recipe file or shipped recipe {str(source)!r}{hint}")
        path = shipped[str(source)]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields, this is a {type(values).__name__}")
    return parse_recipe({"name": path.stem, **values}, where=str(path)).override(changes)


def digest(value: Any) -> str:
    """sha256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
