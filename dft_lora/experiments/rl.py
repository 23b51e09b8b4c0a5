"""DFT beside offline and online reinforcement learning, accuracy against cost: `dft-lora experiment rl`.

The second table of arXiv 2508.05629 on small bases: every method over the same base and problems, each at the
best of the same learning rates, chosen on a validation set with the first seed. A method that learns from its
own answers samples them within its run, so the metrics of a run tell all that it cost.

A part (`--only NAME`) is one base. All methods run with the first seed, then with the second, and so on.
OUT/rl.json is written after each line, so a stopped experiment shows what it has; run it again to continue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.token_table import TokenTable, tokens_file
from ..model.fingerprint import base_fingerprint
from ..runs.folder import RunFolder, read_json, write_json
from ..runs.provenance import certificate
from .claims import accuracy, any_of_four, contrast, finding, greedy, judged, sampled
from .findings import STUDY as EMBEDDED
from .parts import check_request
from .real import real_study
from .study import Fields, Runs, Study

BASE, OWN_DFT, OWN_IW_SFT = "base", "dft on own samples", "iw-sft on own samples"


def methods(own: Fields, online: Fields) -> dict[str, Fields]:
    """Method -> its objective and settings. `own`: answers sampled once; `online`: 8 answers to a prompt.

    The order is that of the runs: those that most claims need come first.
    """
    steps, batch = online["train.max_steps"], online["train.batch_size"]
    halves = {"rollouts.updates": 2, "train.max_steps": 2 * steps, "train.batch_size": batch // 2}
    return {
        "sft": {"objective.name": "sft"},
        "dft": {"objective.name": "dft"},
        "grpo": {"objective.name": "grpo", **online},
        OWN_DFT: {"objective.name": "dft", **own},
        "rft": {"objective.name": "sft", **own},
        "dpo": {"objective.name": "dpo", **own},
        "ppo": {"objective.name": "ppo", **online, **halves, "rollouts.samples": 4},
        OWN_IW_SFT: {"objective.name": "iw-sft", **own},
        "iw-sft": {"objective.name": "iw-sft"},
        "rloo": {"objective.name": "rloo", **online},
        "nft": {"objective.name": "nft", "objective.balance": 0.5, **online},
        "raft": {"objective.name": "sft", **own, "rollouts.rounds": 3},
    }


def embedded_study() -> Study:
    """All methods on the embedded base; online ones take 20 steps of 128 answers."""
    answers = {"rollouts.max_new_tokens": 96, "rollouts.rows": 256}
    own = {"data.sample": 480, "rollouts.samples": 4, **answers}
    online = {
        "train.max_steps": 20,
        "train.batch_size": 128,
        "train.micro_batch_size": 32,
        "train.save_steps": 5,
    }
    return replace(
        EMBEDDED,
        rates=(3e-4, 1e-3, 3e-3),
        objectives=methods(own, {**online, "rollouts.samples": 8, **answers}),
    )


def real_base_study() -> Study:
    """The methods that the claims need most, on SmolLM2-135M; online ones take 10 steps of 32 answers."""
    answers = {"rollouts.max_new_tokens": 48, "rollouts.rows": 64}
    own = {"data.sample": 160, "rollouts.samples": 4, **answers}
    online = {"train.max_steps": 10, "train.batch_size": 32, "train.micro_batch_size": 8}
    every = methods(own, {**online, "rollouts.samples": 8, **answers})
    return replace(
        real_study("smollm2-135m"),
        rates=(2e-4, 5e-4),
        tasks=("word-problems", "word-problems-hard"),
        problems=60,
        objectives={kind: every[kind] for kind in ("sft", "dft", "grpo", OWN_DFT, "rft", "dpo")},
        swept=(),
    )


STUDIES: dict[str, Callable[[], Study]] = {"tiny": embedded_study, "smollm2-135m": real_base_study}

Scores = Mapping[str, np.ndarray]
"""Method -> its score on each problem, for each seed [G, P]."""


def claims(score_GP: Scores, seconds_G: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """The paper's claims, judged as in `claims.py` over the methods that ran.

    `seconds_G`: processor seconds of each method's training, for each seed.
    """
    others = [kind for kind in score_GP if kind not in (BASE, OWN_DFT)]
    return {
        "dft-against-grpo": most_of_the_gain(score_GP, seconds_G),
        "dft-above-rl": above(
            "DFT above RFT, RAFT, DPO and PPO", "dft", ("rft", "raft", "dpo", "ppo"), score_GP
        ),
        "own-samples-best": above("DFT on own samples above every other method", OWN_DFT, others, score_GP),
        "own-dft-above-own-iw-sft": above(
            "DFT on own samples above iw-SFT on own samples", OWN_DFT, (OWN_IW_SFT,), score_GP
        ),
    }


def above(claim: str, kind: str, others: Sequence[str], score_GP: Scores) -> dict[str, Any]:
    """A method against others, one by one."""
    parts = [
        judged(f"{kind} - {other}", score_GP[other], score_GP[kind])
        for other in others
        if {kind, other} <= set(score_GP)
    ]
    return finding(claim, *parts, verdict=None if parts else "not shown")


def most_of_the_gain(score_GP: Scores, seconds_G: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """DFT beyond half of the way from the base to GRPO, in less than half of GRPO's time.

    Not shown where GRPO gains nothing; refuted where DFT takes longer than that in every seed.
    """
    base, grpo, dft = (score_GP[kind] for kind in (BASE, "grpo", "dft"))
    gain = judged("GRPO - base", base, grpo)
    kept = judged("DFT - half of the way from the base to GRPO", (base + grpo) / 2, dft)
    cost = [ours / theirs for ours, theirs in zip(seconds_G["dft"], seconds_G["grpo"], strict=True)]
    cheap = "confirmed" if max(cost) < 0.5 else "refuted" if min(cost) >= 0.5 else "not shown"
    verdict = "refuted" if "refuted" in (kept["verdict"], cheap) else "not shown"
    if gain["verdict"] == kept["verdict"] == cheap == "confirmed":
        verdict = "confirmed"
    claim = "DFT gives most of GRPO's gain over the base for less than half of its time"
    return finding(claim, gain, kept, verdict=verdict, cost_ratio=cost)


def line(kind: str, runs: Runs) -> dict[str, Any]:
    """A method's line of the table, over the seeds of `runs`."""
    tasks, sft = runs.study.tasks, runs.best("sft")
    folders = runs.base if kind == BASE else runs.best(kind)
    return {
        "seeds": len(runs.seeds),
        "learning_rate": None if kind == BASE else runs.rate(kind),
        "accuracy": accuracy(folders, tasks),
        "pass_at_4": float(np.mean([any_of_four(*tasks)(folder).mean() for folder in folders])),
        "entropy": float(
            np.mean([TokenTable.load(tokens_file(f, tasks[0])).entropy_M.mean() for f in folders])
        ),
        "against_sft": contrast(f"{kind} - SFT", sft, folders, sampled(*tasks)),
        "against_sft_greedy": contrast(f"{kind} - SFT, greedy", sft, folders, greedy(*tasks)),
        "cost": None if kind == BASE else [cost(folder) for folder in folders],
    }


def cost(folder: RunFolder) -> dict[str, float]:
    """What a run took, from its metrics: tokens, seconds and memory, without loading and evaluation."""
    steps = folder.metrics()
    rollouts = {step["rollout"]: step["generated_tokens"] for step in steps if "rollout" in step}
    return {
        "generated_tokens": sum(rollouts.values()),
        "trained_tokens": sum(step["supervised_tokens"] for step in steps),
        "processor_seconds": sum(step["processor_seconds"] for step in steps),
        "seconds": sum(step["seconds"] for step in steps),
        "peak_memory_mb": max(step["peak_memory_mb"] for step in steps),
    }


def judge_all(runs: Runs) -> dict[str, Any]:
    """All claims by sampled answers, as the paper has them, and by greedy ones."""
    folders = {BASE: runs.base} | {kind: runs.best(kind) for kind in runs.study.objectives}
    seconds = {
        kind: [cost(folder)["processor_seconds"] for folder in of_kind]
        for kind, of_kind in folders.items()
        if kind != BASE
    }
    return {
        mode: claims(
            {kind: np.array([read(folder) for folder in of_kind]) for kind, of_kind in folders.items()},
            seconds,
        )
        for mode, read in (("sampled", sampled(*runs.study.tasks)), ("greedy", greedy(*runs.study.tasks)))
    }


def parts_of(runs: Runs) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The lines of the table, then the claims."""
    for kind in (BASE, *runs.study.objectives):
        yield kind, lambda kind=kind: line(kind, runs)  # type: ignore[misc]
    yield "claims", lambda: judge_all(runs)


def run(out: Path, seeds: Sequence[int], only: Sequence[str] = ()) -> Iterator[str]:
    """Write OUT/rl.json and yield a line of text for each line of the table. Parts that are done are kept.

    Raises RequestError for an unknown part.
    """
    check_request(out, only, STUDIES)
    for name in only or STUDIES:
        study = STUDIES[name]()
        for count in range(1, len(seeds) + 1):
            runs = Runs(study, out / name, seeds[:count])
            base = base_fingerprint(runs.recipe("main", "sft", study.rates[0], seeds[0]).model)
            for part, find in parts_of(runs):
                file = out / "parts" / name / f"{count}-seeds" / f"{part}.json"
                if not file.is_file() or read_json(file)["seeds"] != list(runs.seeds):
                    made = {"seeds": list(runs.seeds), "found": find(), **certificate(fingerprint=base)}
                    write_json(file, made)
                    write_report(out)
                yield f"{name:14} {_seeds(count):8} {part:24} {_said(part, read_json(file)['found'])}"


def write_report(out: Path) -> None:
    """Put all finished parts together: OUT/rl.json, for each base its settings, lines and claims.

    A line has as many seeds as its method has finished.
    """
    bases = {}
    for name, study in ((name, make()) for name, make in STUDIES.items()):
        latest: dict[str, Any] = {}
        for folder in sorted((out / "parts" / name).glob("*-seeds"), key=lambda f: int(f.name.split("-")[0])):
            latest |= {file.stem: read_json(file) for file in folder.glob("*.json")}
        if latest:
            claimed = latest.pop("claims", None)
            table = {kind: latest[kind] for kind in (BASE, *study.objectives) if kind in latest}
            bases[name] = {"settings": _settings(study), "table": table, "claims": claimed}
    write_json(out / "rl.json", {"bases": bases})


def _settings(study: Study) -> dict[str, Any]:
    return {
        "rates_tried": list(study.rates),
        "problems": study.problems,
        "samples": study.settings["evaluate.samples"],
        "tasks": list(study.tasks),
        "methods": {kind: dict(fields) for kind, fields in study.objectives.items()},
    }


def _seeds(count: int) -> str:
    return f"{count} seed" + "s" * (count > 1)


def _said(part: str, found: Any) -> str:
    if part == "claims":
        return ", ".join(f"{name}: {line['verdict']}" for name, line in found["sampled"].items())
    return ", ".join(f"{column} {100 * share:.1f}" for column, share in found["accuracy"].items())
