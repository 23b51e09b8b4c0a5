"""One GRPO step and one DPO step of ours beside TRL's: `python -m dft_lora.bench rl`.

All sides train the same LoRA over the same 4-bit base, on the same prompts or pairs, without gradient
checkpointing. A random base ends no answer, so all have the same length. Each side runs in a process of its
own, the rounds in turn. Processor seconds stand beside the seconds: on a machine that others use they are the
steadier clock.

    rollout      sampling the answers
    reward       judging them
    reference    log-probabilities under the base; TRL: all else that it prepares of a rollout
    loss         forward and backward passes of the policy
    update       clipping, AdamW, and whatever is left of the step

On a CPU one more step of ours, which is not timed, tells the floor: its matrix products alone.

transformers hands its head a strided slice while it decodes, which a CPU copies once per row: 10 GB for 64
rows here. TRL's head gets a dense copy instead (`decode.py`), which flatters it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from ..config import Recipe, load_recipe, parse_recipe
from ..model.accelerator import accelerator, default_device
from ..model.hardware import choose, dtype_name
from ..model.load import load_base, load_tokenizer
from ..model.memory import MIB, memory_of
from ..runs.provenance import certificate, versions
from ..tasks import get_task
from ..tasks.base import Judge, Problem
from ..tasks.judge import Verdict
from ..training.plan import Plan, make_plan
from ..training.ranks import Ranks
from ..training.rollouts import Answer, Rollouts
from ..training.trainer import Trainer
from .decode import dense_head
from .products import products_of
from .train import PEERS, Shape, gsm8k, lora_config, write_qwen2

STAGES = ("rollout", "reward", "reference", "loss", "update")
KL = 0.001


@dataclass(frozen=True)
class Work:
    """What is measured. `base`: a base by name, instead of a random Qwen2 of `shape`."""

    shape: Shape
    base: str | None = None
    prompts: int = 8
    answers: int = 8
    tokens: int = 128
    micro_batch: int = 8
    """Answers that are trained on at a time: at most so many, and such that TRL can split the step alike."""
    rounds: int = 3
    threads: int = 2
    dtype: str = "auto"


class Stopwatch:
    """Wall and processor seconds of each stage of a step, and the memory above the loaded model.

    A stage within another is taken off the outer one.
    """

    def __init__(self) -> None:
        self.memory = memory_of(choose().device)
        self.empty = self.memory.now()
        self.steps: list[dict[str, tuple[float, float]]] = []
        self.products: float | None = None

    def ready(self) -> None:
        """The model is loaded; the first step begins."""
        self.loaded = self.memory.now()
        self.memory.reset()
        self._begin()

    def _begin(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.inner = [[0.0, 0.0]]
        self.started = self._now()

    def step_done(self) -> None:
        """What no stage had is left to `update`."""
        whole = [now - then for now, then in zip(self._now(), self.started, strict=True)]
        rest = [a - b for a, b in zip(whole, self.inner[0], strict=True)]
        self.spent["update"] = [a + b for a, b in zip(self.spent["update"], rest, strict=True)]
        self.steps.append({stage: tuple(self.spent[stage]) for stage in STAGES} | {"whole": tuple(whole)})  # type: ignore[misc]
        self.peak = self.memory.peak()
        self._begin()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = self._now()
        self.inner.append([0.0, 0.0])
        try:
            yield
        finally:
            inner, outer = self.inner.pop(), self.inner[-1]
            for clock, (now, then) in enumerate(zip(self._now(), started, strict=True)):
                outer[clock] += now - then
                self.spent[name][clock] += now - then - inner[clock]

    def around(self, owner: Any, method: str, stage: str, when: Callable[[], bool] = lambda: True) -> None:
        """Time this object's `method` as a stage."""
        bare = getattr(owner, method)

        def timed(*args: Any, **more: Any) -> Any:
            if not when():
                return bare(*args, **more)
            with self.stage(stage):
                return bare(*args, **more)

        setattr(owner, method, timed)

    @staticmethod
    def _now() -> tuple[float, float]:
        accelerator(default_device()).synchronize()
        return time.perf_counter(), time.process_time()

    def figures(self) -> dict[str, Any]:
        """All steps but the first, which pays for what is set up once."""
        return {
            "steps": self.steps[1:],
            "loaded_mb": (self.loaded - self.empty) / MIB,
            "above_loaded_mb": (self.peak - self.loaded) / MIB,
            "products_cpu_seconds": self.products,
        }


def reward_of(text: str) -> float:
    """A coin that the answer's text tosses: a random base solves nothing."""
    return float(crc32(text.encode()) % 2)


class Coin(Judge):
    """Judges by `reward_of`."""

    def judge_many(self, pairs: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        return [Verdict("correct" if reward_of(text) else "wrong") for text, _ in pairs]


class FullLength(Rollouts):
    """Rollouts whose answers count as finished, although all of them reach the limit."""

    def _answers(self, problems: Sequence[Problem], rollout: int) -> list[list[Answer]]:
        return [
            [replace(answer, truncated=False) for answer in some]
            for some in super()._answers(problems, rollout)
        ]


def run_ours(plan: Plan, watch: Stopwatch) -> None:
    trainer = Trainer(plan, Ranks(plan.recipe))
    learner = trainer.learner
    if plan.problems:
        source = FullLength(plan, learner)
        source.judge = Coin()
        watch.around(source, "_answers", "rollout")
        watch.around(source.judge, "judge_many", "reward")
        trainer.source = source
    watch.around(learner, "with_reference", "reference")
    watch.around(learner, "accumulate", "loss")
    watch.ready()
    for step in range(plan.steps):
        trainer.step(step)
        watch.step_done()
    if default_device().type == "cpu":  # of a step with new rows: a row is scored under the base once
        watch.products = products_of(lambda: trainer.step(plan.steps)).cpu_seconds(repeats=1)


def run_trl_grpo(plan: Plan, watch: Stopwatch) -> None:
    """TRL's GRPOTrainer with `loss_type="grpo"` and a KL to the base, over a base loaded by us."""
    from trl import GRPOConfig, GRPOTrainer

    train, rollouts = plan.recipe.train, plan.rollouts
    model, hardware = load_base(plan.recipe.model)
    decode = plan.renderer.tokenizer.decode
    prompts = [decode(plan.renderer.prompt_ids(p.messages)) for p in plan.problems]
    settings = {
        "loss_type": "grpo",
        "beta": KL,
        "num_generations": rollouts.samples,
        "max_completion_length": rollouts.max_new_tokens,
        "temperature": 1.0,
    }
    with tempfile.TemporaryDirectory() as folder, dense_head(model):
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [reward_of(text) for text in completions],
            args=GRPOConfig(folder, **settings, **_settings(plan, hardware.device)),
            train_dataset=_dataset([{"prompt": prompt} for prompt in prompts]),
            processing_class=plan.renderer.tokenizer,
            peft_config=lora_config(plan),
            callbacks=[_laps(watch)],
        )
        assert trainer.args.per_device_train_batch_size == train.micro_batch_size
        watch.around(trainer, "_generate", "rollout")
        watch.around(trainer, "_calculate_rewards", "reward")
        watch.around(trainer, "_prepare_inputs", "reference")
        watch.around(trainer, "training_step", "loss")
        trainer.train()


def run_trl_dpo(plan: Plan, watch: Stopwatch) -> None:
    """TRL's DPOTrainer with its sigmoid loss; the reference is the adapter switched off, as here."""
    from trl import DPOConfig, DPOTrainer

    model, hardware = load_base(plan.recipe.model)
    rows = [json.loads(line) for line in Path(plan.recipe.data.source).read_text().splitlines()]
    decode = plan.renderer.tokenizer.decode
    asked = [decode(plan.renderer.prompt_ids(Problem.ask("", row["prompt"]).messages)) for row in rows]
    pairs = [
        {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
        for prompt, row in zip(asked, rows, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(folder, beta=0.1, max_length=None, **_settings(plan, hardware.device)),
            train_dataset=_dataset(pairs),
            processing_class=plan.renderer.tokenizer,
            peft_config=lora_config(plan),
            callbacks=[_laps(watch)],
        )
        watch.around(trainer.model, "forward", "reference", when=lambda: not torch.is_grad_enabled())
        watch.around(trainer, "training_step", "loss")
        trainer.train()


def _settings(plan: Plan, device: torch.device) -> dict[str, Any]:
    """What both of TRL's trainers take from the recipe."""
    train = plan.recipe.train
    size = train.micro_batch_size
    assert isinstance(size, int)
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": train.batch_size // size,
        "gradient_checkpointing": False,
        "learning_rate": train.learning_rate,
        "max_steps": plan.steps,
        "use_cpu": device.type == "cpu",
        "bf16": dtype_name(choose(plan.recipe.model.dtype, parameters=10**9).dtype) == "bfloat16",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _dataset(rows: list[dict[str, str]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _laps(watch: Stopwatch) -> Any:
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.ready()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step_done()

    return Laps()


@dataclass(frozen=True)
class Side:
    """One method in one trainer."""

    method: str
    who: str
    run: Callable[[Plan, Stopwatch], None]
    package: str | None = None

    @property
    def name(self) -> str:
        return f"{self.method}, {self.who}"

    @property
    def missing(self) -> str:
        absent = self.package and find_spec(self.package) is None
        return f"{self.package} is not installed" if absent else ""


SIDES = (
    Side("grpo", "ours", run_ours),
    Side("grpo", "TRL", run_trl_grpo, "trl"),
    Side("dpo", "ours", run_ours),
    Side("dpo", "TRL", run_trl_dpo, "trl"),
)


def recipe_of(method: str, folder: Path, work: Work) -> Recipe:
    """Two steps of a method: the first one pays for what is set up once."""
    rl = method == "grpo"
    pairs_file = {"source": str(folder / "pairs.jsonl"), "prompt": "prompt"}
    data = {"source": "arithmetic", "sample": 2 * work.prompts} if rl else pairs_file
    objective = {"name": "grpo", "kl": KL} if rl else {"name": "dpo", "beta": 0.1}
    answers = {"samples": work.answers, "max_new_tokens": work.tokens, "truncated": "judged"}
    rows, pairs = work.prompts * work.answers, work.prompts
    return parse_recipe(
        {
            "name": f"bench-{method}",
            "model": {"name": work.base or str(folder / "base"), "dtype": work.dtype},
            "data": data | {"template": "auto" if work.base else "plain", "max_length": 2048},
            "objective": objective,
            "rollouts": {**answers, "rows": rows} if rl else None,
            "train": {
                "batch_size": rows if rl else pairs,
                "micro_batch_size": gcd(work.micro_batch, rows) if rl else gcd(work.micro_batch // 2, pairs),
                "max_steps": 2,
                "gradient_checkpointing": False,
            },
            "output": str(folder / "run"),
        }
    )


def write_inputs(folder: Path, work: Work) -> None:
    """The base, pairs for three DPO steps with answers of `tokens` tokens, and both recipes."""
    if work.base is None:
        write_qwen2(folder / "base", work.shape, gsm8k()[1])
    tokenizer = load_tokenizer(recipe_of("grpo", folder, work).model)
    problems = get_task("arithmetic").problems("train")
    ids = tokenizer("\n".join(p.solution or "" for p in problems[:400]), add_special_tokens=False)[
        "input_ids"
    ]

    def text(number: int) -> str:
        start = number * work.tokens % (len(ids) - work.tokens)
        return tokenizer.decode(ids[start : start + work.tokens - 1])

    rows = [
        {"prompt": problem.question, "chosen": text(2 * i), "rejected": text(2 * i + 1)}
        for i, problem in enumerate(problems[: 3 * work.prompts])
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in ("grpo", "dpo"):
        recipe = recipe_of(method, folder, work)
        (folder / f"{method}.json").write_text(json.dumps(recipe.as_dict()))


def measure(work: Work, only: str = "") -> dict[str, Any]:
    """All sides whose name contains `only`, as a JSON value with its provenance; missing ones by name."""
    sides = [side for side in SIDES if only in side.name]
    runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, work)
        for round_ in range(work.rounds):
            for side in (side for side in sides if not side.missing):
                command = [sys.executable, "-m", __spec__.name, side.name, name, str(work.threads)]
                child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                figures = json.loads(child.stdout.splitlines()[-1])
                runs[side.name].append(figures)
                seconds = figures["steps"][0]["whole"][0]
                print(f"round {round_}  {side.name:12} {seconds:8.2f} s", file=sys.stderr, flush=True)
    hardware = choose(work.dtype, parameters=0 if work.base else 10**9)
    return {
        "kind": "rl",
        "work": asdict(work),
        "dtype": dtype_name(hardware.dtype),
        "device": hardware.name,
        "sides": {
            side.name: {"missing": side.missing, "runs": runs[side.name], **medians(runs[side.name])}
            for side in sides
        },
        "provenance": certificate(peers=versions(PEERS)),
    }


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians: over all steps, each stage's [seconds, processor seconds]; over all rounds, memory, floor."""
    if not runs:
        return {}
    steps = [step for run in runs for step in run["steps"]]
    stages = {
        stage: [statistics.median(step[stage][clock] for step in steps) for clock in (0, 1)]
        for stage in (*STAGES, "whole")
    }
    once = ("loaded_mb", "above_loaded_mb", "products_cpu_seconds")
    found = {key: [run[key] for run in runs] for key in once}
    medians_of = {key: None if None in some else statistics.median(some) for key, some in found.items()}
    return {"stages": stages, **medians_of}


def _child(name: str, folder: str, threads: str) -> dict[str, Any]:
    torch.set_num_threads(int(threads))
    (side,) = (side for side in SIDES if side.name == name)
    plan = make_plan(load_recipe(Path(folder) / f"{side.method}.json"))
    watch = Stopwatch()
    side.run(plan, watch)
    return watch.figures()


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:])))
