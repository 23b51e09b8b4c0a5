"""The recipe: everything a run depends on, as YAML and as frozen values.

Every field has a default, so a recipe states only what differs. Contradictions are refused here, by field
name, before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import RecipeError, did_you_mean

RECIPES = Path(__file__).parent / "recipes"
LONGEST_FILE = 2**20  # bytes of a YAML file; a recipe has a few hundred
SEEDS = 2**32  # exclusive: all libraries accept smaller seeds, and seed * 1_000_003 + n fits torch's 64 bits

Seed = Annotated[int, Field(ge=0, lt=SEEDS)]


class Part(BaseModel):
    """A section of a recipe: numbers are finite, text can be written to a file, true is not 1."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("must not be true or false")
        check_text(value)
        return value


def check_text(value: Any) -> None:
    """Raises ValueError for text, or a list of texts, that cannot be written to a file; other values pass."""
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str) and ("\0" in text or not _encodable(text)):
            raise ValueError("must not contain a NUL character or half of a surrogate pair")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ModelConfig(Part):
    """The base model, and how it is stored in memory."""

    name: str = "tiny"
    """A folder, a .gguf file, a Hub id, or a base known by name: `tiny`, `smollm2-135m`, `gemma-3-270m`."""
    gguf: str | None = None
    """The .gguf file to use from a Hub repository or folder with several."""
    revision: str | None = None
    backend: Literal["plain", "unsloth"] = "plain"
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """nf4 and fp4: 4 bits per weight, with the quantization constants quantized too; int8: 8 bits, rows of
    weights and of activations scaled on their own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    unpack: Literal["auto"] | bool = "auto"
    """Unpack 4-bit layers once for generation: same answers, more memory; auto: on a CPU, if it fits."""

    @model_validator(mode="after")
    def _one_gguf_file(self):
        if self.gguf is not None and not self.gguf.endswith(".gguf"):
            raise ValueError(f"model.gguf: {self.gguf!r} is not a .gguf file")
        if self.gguf is not None and self.name.endswith(".gguf"):
            raise ValueError("model.gguf: model.name is already a .gguf file; set only one of the two")
        return self


class AdapterConfig(Part):
    """The LoRA adapter."""

    r: int = Field(8, ge=1, le=65_536)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    """Scale by alpha / sqrt(r), not by alpha / r: larger ranks then keep their effect."""
    dora: bool = False
    """Train the length of each weight row beside its direction."""
    init: Literal["default", "pissa", "olora", "loftq", "eva"] = "default"
    """How the adapter starts: at zero; from the base's main directions (pissa: singular vectors, olora: QR),
    which needs model.quantization none; from what 4 bits lost of the base (loftq); or at zero, with A along
    the main directions of each layer's inputs on the run's first tokens (eva)."""
    lora_plus_ratio: float | None = Field(None, ge=1)
    """LoRA+: the learning rate of B over that of A, which is train.learning_rate."""

    @model_validator(mode="after")
    def _one_start(self):
        if self.dora and self.init not in ("default", "eva"):
            raise ValueError(f"adapter.init: {self.init} does not go with adapter.dora; use default or eva")
        return self


class DataConfig(Part):
    """What the adapter is trained on, and how a problem becomes a prompt."""

    source: str = "arithmetic"
    """A task name, a path to .jsonl/.json/.parquet, or a Hub id."""
    subset: str | None = None
    """The configuration of a Hub dataset (GSM8K: main); tasks and files have none."""
    split: str = "train"
    """The split of a task or a Hub dataset; a file has none."""
    prompt: str = "problem"
    """A column, or a text with columns in braces: "{instruction}\n\n{input}" for Alpaca's rows."""
    completion: str = "solution"
    answer: str | None = None
    """The column of reference answers, by which own samples are judged; null: `answer`, if rows have it.
    A row with one is used unchanged, even if its completion ends in `#### 42`."""
    template: str = "auto"
    """A name; a text with {question}, perhaps {system}; or a file with such a text or a chat template."""
    sample: int | None = Field(None, ge=1)
    """At most this many usable rows, drawn at random (with train.seed), instead of all."""
    max_length: int = Field(2048, ge=2)
    packing: Literal["auto"] | bool = "auto"
    skip_bad_rows: float = Field(0.0, ge=0, le=1)
    """The share of unusable rows that may be skipped; with 0 a single one is refused."""


class ObjectiveConfig(BaseModel):
    """The objective's name and its own numbers; `loss.objective` checks them."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = "dft"
    teacher: str | None = None
    """A run folder over the same base, for `target-sft`."""

    @property
    def numbers(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class RolloutConfig(Part):
    """The answers that a run samples from its own model, has judged, and learns from.

    A supervised objective (`sft`, `dft`) learns from the correct ones (RFT; with several rounds, RAFT), `dpo`
    from pairs of a correct and a wrong one, the online objectives (`grpo`, `rloo`, `ppo`, `nft`) from all.
    """

    samples: int = Field(8, ge=1, le=65_536)
    """Answers to each problem."""
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(256, ge=1, le=1_000_000)
    rounds: int = Field(1, ge=1, le=1_000_000)
    """How often a run with a supervised objective, or `dpo`, samples anew; online objectives always do."""
    updates: int = Field(1, ge=1, le=1_000_000)
    """Optimizer steps that an online objective takes from one batch of answers, each from its own part."""
    truncated: Literal["wrong", "judged"] = "wrong"
    """An answer that was cut at max_new_tokens counts as wrong, or is judged like any other. A supervised
    objective and `dpo` never learn from it."""
    rows: int = Field(64, ge=1, le=65_536)
    """Answers that are decoded at a time; a fixed number, so that a resumed run decodes the same batches."""


class TrainConfig(Part):
    """The optimizer step. `batch_size` counts its examples over all ranks; for `dpo`, its pairs."""

    learning_rate: float = Field(5e-5, gt=0, le=1)
    batch_size: int = Field(256, ge=1, le=1_000_000)
    micro_batch_size: Literal["auto"] | int = "auto"
    epochs: float = Field(1, gt=0, le=1_000_000)
    max_steps: int | None = Field(None, ge=1, le=1_000_000_000)
    warmup: float = Field(0.1, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    offload_activations: bool = False
    """On a GPU, let the layers' inputs wait in the host's memory; with gradient checkpointing."""
    mlp_tile: int | None = Field(None, ge=64, le=1_000_000)
    """Tokens of a row that an MLP sees at a time, for long rows; null: all of them."""
    logging_steps: int = Field(1, ge=1)
    save_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; null: one every five minutes. The last step and a signal always save one."""
    keep_checkpoints: int = Field(2, ge=1)
    loss_chunk_mb: int | None = Field(None, ge=1, le=1_000_000)
    """Workspace of the loss; null: the loss engine's default."""
    shard: bool = False
    """Shard the frozen base over several processes (FSDP), if it is too large for a single GPU."""
    skip_rows: float = Field(0.0, ge=0, lt=1)
    """Relative budget of tokens that the loss may skip (`token_logps(skip=)`); for weighted objectives."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where each step's metrics go besides `metrics.jsonl` and `curves.png`."""
    seed: Seed = 0

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
    """How a run is evaluated."""

    tasks: tuple[str, ...] = ()
    samples: int = Field(16, ge=1, le=1_000_000)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(4096, ge=1, le=1_000_000)
    """The longest answer. At the default, a task may set a lower limit of its own; any other value, or one
    given with --set, is used unchanged."""
    template: str = "same"
    shots: int = Field(0, ge=0, le=64)
    """For base models: solved examples before each problem, drawn with `seed` from the task's training split;
    for an own test set, from the recipe's data."""
    stop: tuple[str, ...] = ()
    """For base models: texts that end an answer, which is cut before the first of them."""
    seed: Seed = 0
    engine: Literal["plain", "vllm"] = "plain"
    """What generates the answers; vllm is optional, for large evaluations on a GPU."""
    allow_code: bool = False
    """Whether tasks whose answers are programs may run them on this machine."""

    @field_validator("stop")
    @classmethod
    def _some_text(cls, value):
        if not all(value):
            raise ValueError("must not contain an empty text")
        return value


class Recipe(Part):
    """A complete run. `output` may contain NAME, which stands for the recipe's name."""

    name: str = "run"
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    rollouts: RolloutConfig | None = None
    """null: the run learns from data.source as it is, unless its objective needs judged answers."""
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    output: str = "runs/NAME"

    @model_validator(mode="after")
    def _consistent(self):
        micro, batch = self.train.micro_batch_size, self.train.batch_size
        if micro != "auto" and micro > batch:
            raise ValueError(f"train.micro_batch_size ({micro}) is larger than train.batch_size ({batch})")
        for field, used in (
            ("train.offload_activations", self.train.offload_activations),
            ("train.mlp_tile", self.train.mlp_tile),
            ("train.shard", self.train.shard),
            ("objective.teacher", self.objective.teacher),
        ):
            if used and self.model.backend != "plain":
                raise ValueError(f"{field}: not with model.backend {self.model.backend!r}; use plain")
        if self.train.offload_activations and self.train.gradient_checkpointing is False:
            raise ValueError("train.offload_activations needs train.gradient_checkpointing: true")
        if self.train.mlp_tile and self.train.shard:
            raise ValueError("train.mlp_tile: not with train.shard; leave one of them out")
        self._fitting_adapter()
        return self

    def _fitting_adapter(self) -> None:
        """Raises ValueError for an adapter that this base, or its backend, cannot have."""
        init, held = self.adapter.init, self.model.quantization
        if init in ("pissa", "olora") and held != "none":
            raise ValueError(
                f"adapter.init: {init} moves a part of the base into the adapter, which a quantized base "
                f"cannot give exactly; set model.quantization: none (it is {held}), or use loftq"
            )
        if init == "loftq" and held not in ("nf4", "fp4"):
            raise ValueError(
                f"adapter.init: loftq corrects what 4 bits lost; model.quantization is {held}, use nf4 or fp4"
            )
        unusual = {"adapter.dora": self.adapter.dora, f"adapter.init: {init}": init != "default"}
        for setting_, used in unusual.items():
            if used and self.model.backend != "plain":
                raise ValueError(f"{setting_}: not with model.backend {self.model.backend!r}; use plain")
            if used and self.train.shard:
                raise ValueError(f"{setting_}: not with train.shard; use a plain LoRA")
        if held == "int8" and (self.train.shard or self.model.backend != "plain"):
            where = "train.shard" if self.train.shard else f"model.backend {self.model.backend!r}"
            raise ValueError(f"model.quantization: int8 does not go with {where}; use nf4")
        if held == "fp4" and self.model.backend != "plain":
            raise ValueError(f"model.quantization: fp4 does not go with model.backend {self.model.backend!r}")

    @field_validator("name")
    @classmethod
    def _file_name(cls, value: str) -> str:
        if not value.strip() or value in (".", "..") or "/" in value or not value.isprintable():
            raise ValueError("must be usable as the name of a folder (no '/', not '..', not empty)")
        if len(value.encode()) > 200:
            raise ValueError("must not be longer than 200 bytes, since folders are named after it")
        return value

    @field_validator("output")
    @classmethod
    def _some_path(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a folder")
        return value

    @property
    def output_dir(self) -> Path:
        return Path(self.output.replace("NAME", self.name))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to `run.json`."""
        return self.model_dump(mode="json")

    def at_revision(self, revision: str | None) -> Recipe:
        """This recipe with this revision of its base."""
        return self.model_copy(update={"model": self.model.model_copy(update={"revision": revision})})

    def override(self, changes: Sequence[str]) -> Recipe:
        """A copy with `a.b=value` changes applied; values are parsed as YAML.

        `model_fields_set` of each section of the result names the fields that differ from their default or
        were changed here.
        """
        values = self.model_dump(mode="json", exclude_defaults=True)
        for change in changes:
            path, equals, text = change.partition("=")
            if not equals or not path.strip():
                raise RecipeError(f"--set {change!r}: write it as field.name=value")
            _assign(values, path.strip(), read_yaml(text, f"--set {_short(change)}"))
        return parse_recipe(values)


def setting(field: str, value: Any) -> str:
    """A change for `Recipe.override` that sets `field` to exactly this value, whatever its characters."""
    return f"{field}={json.dumps(value, default=str)}"


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    part: Any = Recipe
    for key in parents:
        if key not in part.model_fields:
            _unknown(path, key, part.model_fields)
        part = _section(part.model_fields[key].annotation)
        if part is None:
            raise RecipeError(f"recipe field {path!r} does not exist: {key!r} has no fields below it")
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise RecipeError(f"recipe field {key!r} must be a mapping of fields, not {values!r}")
    values[leaf] = value


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, which may be optional; None for a plain field."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _unknown(path: str, key: str, known: Mapping[str, Any]):
    raise RecipeError(f"recipe field {path!r} does not exist{_hint(key, known)}")


def _hint(key: str, known: Mapping[str, Any]) -> str:
    """` (did you mean 'x'?)`: a field here of nearly this name, this name elsewhere, or a near one."""
    elsewhere = [
        repr(f"{name}.{key}")
        for name, field in Recipe.model_fields.items()
        if (section := _section(field.annotation)) and key in section.model_fields
    ]
    if key in Recipe.model_fields:
        elsewhere.insert(0, repr(key))
    named = f" (did you mean {' or '.join(elsewhere)}?)" if elsewhere else ""
    return did_you_mean(key, known, cutoff=0.8) or named or did_you_mean(key, known)


def parse_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A Recipe from plain values. Raises RecipeError naming each wrong field and the closest valid one."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None


PLAIN = {"tuple_type": "must be a list, such as [a, b]", "model_type": "must be a mapping of fields"}
"""Clearer messages for pydantic's errors that are worded in terms of Python types."""


def _explain(error: Mapping[str, Any]) -> str:
    path = [str(key) for key in error["loc"] if not str(key).startswith(("literal[", "function-"))]
    field = ".".join(path)
    if error["type"] == "extra_forbidden":
        part: Any = Recipe
        for key in path[:-1]:
            part = _section(part.model_fields[key].annotation)
        return f"field {field!r} does not exist{_hint(path[-1], part.model_fields)}"
    message = PLAIN.get(error["type"], error["msg"]).removeprefix("Value error, ")
    if not field:
        return message
    return f"field {field!r}: {message[0].lower()}{message[1:]}, got {_short(error['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _OneOfEach(yaml.SafeLoader):
    """YAML without repeated keys, of which SafeLoader keeps the last; 1e-3 is a number, as in YAML 1.2."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        names = [key.value for key in keys]
        for i, key in enumerate(keys):
            if key.value in names[:i]:
                what = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_OneOfEach` would read as numbers."""


for _kind in (_OneOfEach, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def yaml_text(value: Any) -> str:
    """YAML that `read_yaml` reads as this value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises RecipeError, starting with `where`, for anything but plain YAML."""
    try:
        return yaml.load(text, _OneOfEach)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        reason = f"{error.problem}, line {mark.line + 1}, column {mark.column + 1}" if mark else error.problem
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-45
        reason = " ".join(str(error).split())
    quote = "; put a text with braces in quotes, 'a.b=\"{question}\"'" if where.startswith("--set") else ""
    raise RecipeError(f"{where}: not readable as YAML: {reason}{quote if '{' in text else ''}")


def read_yaml_file(path: Path, where: str) -> Any:
    """The value of a YAML file. Raises RecipeError if it cannot be read or is too large."""
    try:
        if (size := path.stat().st_size) > LONGEST_FILE:
            raise RecipeError(f"{where}: {size:,} bytes are too many for a recipe (at most {LONGEST_FILE:,})")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: not readable as YAML: it is not UTF-8 text ({error})") from None
    except OSError as error:
        raise RecipeError(f"{where}: {error.strerror}") from None
    return read_yaml(text, where)


def shipped_recipes() -> dict[str, Path]:
    """Name and file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(source: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name, and apply `a.b=value` changes.

    Raises RecipeError if the file is missing, is not YAML, or has a field that does not exist.
    """
    path = Path(source)
    shipped = shipped_recipes()
    if not os.path.isfile(path):
        if str(source) not in shipped:
            if os.path.isdir(path):
                raise RecipeError(
                    f"{_short(str(source))} is a folder; name a recipe file or a shipped recipe"
                )
            hint = did_you_mean(str(source), shipped) or " (dft-lora recipes list shows the shipped ones)"
            raise RecipeError(f"no recipe file or shipped recipe {_short(str(source))}{hint}")
        path = shipped[str(source)]
    values = read_yaml_file(path, str(path))
    if values is None:  # only comments: every field has a default
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe must be a mapping of fields, this is a {type(values).__name__}")
    return parse_recipe({"name": path.stem, **values}, where=str(path)).override(changes)


def digest(value: Any) -> str:
    """sha256 of a JSON-serializable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
