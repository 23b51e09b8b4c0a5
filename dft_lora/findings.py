"""The paper's claims, tried on the embedded base: `python -m dft_lora.findings`.

Each line is judged by a paired interval over problems, of the mean of three seeds, and by the seeds alone:

    confirmed    the interval lies on the claimed side of zero, and so does every seed
    refuted      the interval lies on the other side
    not shown    anything else: the difference is smaller than what these runs can show

Every objective runs at its own best learning rate, chosen on arithmetic-validation with seed 0 and reported
on the test sets. The base was frozen before; neither it nor the data are tuned until a line comes true.

What is made lies below --out and is used again, so a command that was stopped goes on. The result is one JSON
file with its birth certificate; docs/findings.md is generated from it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import Recipe, load_recipe
from .errors import DftLoraError, Interrupted
from .evaluation import statistics as st
from .evaluation.answered import Answered
from .evaluation.diagnosis import diagnose
from .evaluation.sampling import base_run, checkpoint_runs, evaluate, tokens_file
from .evaluation.sharpening import cooled
from .evaluation.tokens import TokenTable
from .model.fingerprint import base_fingerprint
from .provenance import certificate
from .rejection import own_samples
from .run_folder import RunFolder, read_json, write_json
from .sweep import GO_ON, train_once

SEEDS = (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
EXAMPLES, BATCH, OTHER_BATCHES = 960, 16, (8, 32)
MAIN, RIVALS = ("sft", "dft"), ("iw-sft", "dft-sentence", "dft-geometric")
SETTINGS = {
    "train.batch_size": BATCH,
    "train.micro_batch_size": 8,
    "train.max_steps": EXAMPLES // BATCH,
    "train.save_steps": 15,
    "train.keep_checkpoints": 8,
    "evaluate.samples": 4,
}
CODEBOOK = {"data.source": "codebook", "train.max_steps": 480, "train.save_steps": 240}
VALIDATION, LIMIT = "arithmetic-validation", 200
TASKS = ("arithmetic", "arithmetic-long")
OWN_PROBLEMS, OWN_SAMPLES = 480, 4
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "findings.json"


def recipe(out: Path, group: str, objective: str, rate: float, seed: int, **more: Any) -> Recipe:
    """One run of the findings. Its seed draws the order of the data and the adapter's first weights."""
    name = f"{objective}-{rate:g}"
    fields = {
        **SETTINGS,
        **more,
        "objective.name": objective,
        "train.learning_rate": rate,
        "train.seed": seed,
        "name": name,
        "output": out / group / f"seed-{seed}" / name,
    }
    return load_recipe("tiny_dft", [f"{field}={value}" for field, value in fields.items()])


@dataclass(frozen=True)
class Runs:
    """The finished, evaluated runs: `[objective]` gives one run a seed, at the objective's best rate."""

    base: RunFolder
    grid: Mapping[tuple[str, float], list[RunFolder]]
    """SFT and DFT at every learning rate."""
    best: Mapping[str, list[RunFolder]]
    rate: Mapping[str, float]
    batches: Mapping[tuple[str, int], list[RunFolder]]
    """SFT and DFT in smaller and larger batches, of the same examples in the same order."""
    own: list[RunFolder]
    """DFT on the base's own verified samples."""
    cooled: list[RunFolder]
    """SFT at DFT's entropy."""
    codebook: Mapping[str, list[RunFolder]]
    codebook_rate: Mapping[str, float]


def make(out: Path) -> Runs:
    """Train and evaluate all that is not there yet."""

    def runs(group: str, objective: str, rate: float, seeds: Sequence[int] = SEEDS, **more: Any):
        return [train_once(recipe(out, group, objective, rate, seed, **more)) for seed in seeds]

    grid = {(o, r): runs("arithmetic", o, r) for o in MAIN for r in RATES}
    tried = {(o, r): runs("arithmetic", o, r, SEEDS[:1]) for o in RIVALS for r in RATES}
    first = {key: folders[0] for key, folders in (grid | tried).items()}
    rate = _choose(first, VALIDATION)
    best = {o: grid[o, rate[o]] for o in MAIN} | {o: runs("arithmetic", o, rate[o]) for o in RIVALS}
    batches = {
        (o, size): runs(
            f"batch-{size}",
            o,
            rate[o],
            **{"train.batch_size": size, "train.max_steps": EXAMPLES // size},
        )
        for o in MAIN
        for size in OTHER_BATCHES
    }
    written = own_samples(
        recipe(out, "own", "dft", rate["dft"], 0, **{"data.sample": OWN_PROBLEMS}),
        out / "own-samples.jsonl",
        samples=OWN_SAMPLES,
        max_new_tokens=96,
    )
    own = runs("own", "dft", rate["dft"], **{"data.source": written})
    base = RunFolder(out / "arithmetic" / "base")
    if not base.begun:
        base_run(best["dft"][0].recipe(), base.path)

    everything = [base, *_flat(grid), *_flat({o: best[o] for o in RIVALS}), *_flat(batches), *own]
    evaluate([folder.path for folder in everything], TASKS, limit=LIMIT)
    steps = [step for o in MAIN for folder in best[o] for step in checkpoint_runs(folder)]
    evaluate([step.path for step in steps], [VALIDATION])
    twins = [
        cooled(sft, dft, out / "cooled" / f"seed-{seed}" / "sft", TASKS[0])
        for seed, sft, dft in zip(SEEDS, best["sft"], best["dft"], strict=True)
    ]
    for twin in twins:
        evaluate([twin.path], TASKS, limit=LIMIT)

    facts = {(o, r): runs("codebook", o, r, **CODEBOOK) for o in MAIN for r in RATES}
    for folders in facts.values():
        evaluate([folder.path for folder in folders], ["codebook"])
    facts_rate = _choose({key: folders[0] for key, folders in facts.items()}, "codebook")
    codebook = {o: facts[o, facts_rate[o]] for o in MAIN}
    return Runs(base, grid, best, rate, batches, own, twins, codebook, facts_rate)


def _choose(first: Mapping[tuple[str, float], RunFolder], task: str) -> dict[str, float]:
    """Each objective's learning rate with the best sampled accuracy on `task`; the lower one of equals."""
    evaluate([folder.path for folder in first.values()], [task])
    found: dict[str, tuple[float, float]] = {}
    for (objective, rate), folder in first.items():
        accuracy = float(Answered.read(folder, task).correct_PN.mean())
        if objective not in found or accuracy > found[objective][0]:
            found[objective] = (accuracy, rate)
    return {objective: rate for objective, (_, rate) in found.items()}


# --- the lines --------------------------------------------------------------------------------


def scores(folder: RunFolder, tasks: Sequence[str] = TASKS) -> np.ndarray:
    """Sampled accuracy of each problem, task after task [P]."""
    return np.concatenate([st.avg_at_n(Answered.read(folder, task).correct_PN) for task in tasks])


def probability(folder: RunFolder) -> np.ndarray:
    """Geometric mean of the reference tokens' probability, code by code: exp(- plain NLL)."""
    return np.exp(-TokenTable.load(tokens_file(folder, "codebook")).nll_E)


def greedy(folder: RunFolder) -> np.ndarray:
    return np.concatenate([Answered.read(folder, task).greedy_P for task in TASKS]).astype(float)


def any_of_four(folder: RunFolder) -> np.ndarray:
    return np.concatenate([st.pass_at_k(Answered.read(folder, task).correct_PN, 4) for task in TASKS])


def contrast(
    what: str,
    a: Sequence[RunFolder],
    b: Sequence[RunFolder],
    read: Callable[[RunFolder], np.ndarray] = scores,
) -> dict[str, Any]:
    """b - a: mean over seeds, its interval over problems, the seeds one by one, and whether b is above."""
    a_SP, b_SP = (np.array([read(folder) for folder in folders]) for folders in (a, b))
    return _judged(what, a_SP, b_SP)


def _judged(what: str, a_SP: np.ndarray, b_SP: np.ndarray) -> dict[str, Any]:
    compared = st.compare(a_SP.mean(0), b_SP.mean(0))
    seeds = (b_SP - a_SP).mean(1).tolist()
    low, high = compared.ci95
    above = low > 0 and min(seeds) > 0
    return {
        "what": what,
        "a": float(a_SP.mean()),
        "b": float(b_SP.mean()),
        "difference": compared.difference,
        "ci95": [low, high],
        "p_value": compared.p_value,
        "smallest_detectable": compared.smallest_detectable,
        "seeds": seeds,
        "verdict": "confirmed" if above else "refuted" if high < 0 else "not shown",
    }


def lines(runs: Runs) -> list[dict[str, Any]]:
    """The findings, in the paper's order; each with the contrasts it rests on."""
    sft, dft, base = runs.best["sft"], runs.best["dft"], [runs.base] * len(SEEDS)

    def line(claim: str, *parts: dict[str, Any], verdict: str | None = None, **more: Any) -> dict[str, Any]:
        return {"claim": claim, "parts": list(parts), "verdict": verdict or _all(parts), **more}

    def only_long(folder: RunFolder) -> np.ndarray:
        return scores(folder, TASKS[1:])

    falls = contrast("SFT - base, long set", base, sft, only_long)
    gains = contrast("DFT - base, long set", base, dft, only_long)
    hard = "refuted" if falls["verdict"] == "confirmed" else gains["verdict"]
    robust = [contrast(f"DFT - SFT at {r:g}", runs.grid["sft", r], runs.grid["dft", r]) for r in RATES]
    robust += [
        contrast(f"DFT - SFT in batches of {size}", runs.batches["sft", size], runs.batches["dft", size])
        for size in OTHER_BATCHES
    ]
    codes = runs.codebook["dft"], runs.codebook["sft"]
    known = contrast("SFT - DFT, probability of the code, a token", *codes, probability)
    recalled = contrast("SFT - DFT, whole codes recalled", *codes, lambda f: scores(f, ["codebook"]))
    advice = {
        name: diagnose(folders[0].recipe())
        for name, folders in (("arithmetic", sft), ("codebook", runs.codebook["sft"]))
    }
    said = all(
        found["favours"] == right for found, right in zip(advice.values(), ("dft", "sft"), strict=True)
    )
    return [
        line("DFT above SFT on average", contrast("DFT - SFT", sft, dft)),
        line("DFT above iw-SFT", contrast("DFT - iw-SFT", runs.best["iw-sft"], dft)),
        line("on the long set SFT falls or stays while DFT gains", falls, gains, verdict=hard),
        line("probabilities become bimodal under DFT", *bimodal(base, dft, sft)),
        peaks(sft, dft),
        line("DFT above SFT at every learning rate and batch size", *robust),
        line(
            "token weights above sentence and geometric-mean weights",
            *(contrast(f"DFT - {o}", runs.best[o], dft) for o in RIVALS[1:]),
        ),
        line(
            "DFT on own verified samples above DFT on the given solutions",
            contrast("own - given", dft, runs.own),
        ),
        line(
            "on new facts DFT loses to SFT, and diagnose says so before",
            recalled,
            known,
            verdict=_all([recalled, known]) if said else "refuted",
            diagnosis={
                name: {key: found[key] for key in ("mean_probability", "favours", "verdict")}
                for name, found in advice.items()
            },
        ),
        line(
            "the gain at temperature 1 is more than sharpening",
            contrast("DFT - SFT, greedy", sft, dft, greedy),
            contrast("DFT - SFT, pass@4", sft, dft, any_of_four),
            contrast("DFT - SFT at DFT's entropy", runs.cooled, dft),
            temperatures=[twin.run()["cooled"]["temperature"] for twin in runs.cooled],
        ),
    ]


def _all(parts: Sequence[Mapping[str, Any]]) -> str:
    """Confirmed when all parts are, refuted when one is."""
    verdicts = {part["verdict"] for part in parts}
    return "refuted" if "refuted" in verdicts else verdicts.pop() if len(verdicts) == 1 else "not shown"


def bimodal(
    base: Sequence[RunFolder], dft: Sequence[RunFolder], sft: Sequence[RunFolder]
) -> list[dict[str, Any]]:
    """Shares of target tokens near 0 and near 1 on held-out solutions: they grow under DFT.

    The shares of each solution are its scores. SFT's stand beside them as a note, without a say.
    """

    def near_zero(p_T: np.ndarray) -> np.ndarray:
        return p_T < 0.1

    def near_one(p_T: np.ndarray) -> np.ndarray:
        return p_T > 0.9

    def share(near: Callable[[np.ndarray], np.ndarray]) -> Callable[[RunFolder], np.ndarray]:
        def read(folder: RunFolder) -> np.ndarray:
            table = TokenTable.load(tokens_file(folder, TASKS[0]))
            return np.bincount(table.example_T, near(table.p_T)) / np.bincount(table.example_T)

        return read

    parts = [
        contrast(f"p {side}, DFT - base", base, dft, share(near))
        for side, near in (("< 0.1", near_zero), ("> 0.9", near_one))
    ]
    for part, near in zip(parts, (near_zero, near_one), strict=True):
        part["sft_instead"] = contrast("SFT - base", base, sft, share(near))["difference"]
    return parts


def peaks(sft: Sequence[RunFolder], dft: Sequence[RunFolder]) -> dict[str, Any]:
    """The checkpoint with the best validation accuracy, run by run: earlier for DFT in every seed?"""
    curves = {
        name: [
            [float(scores(step, [VALIDATION]).mean()) for step in checkpoint_runs(folder)]
            for folder in folders
        ]
        for name, folders in (("sft", sft), ("dft", dft))
    }
    steps = [step.run()["step"] for step in checkpoint_runs(dft[0])]
    best = {name: [steps[int(np.argmax(curve))] for curve in found] for name, found in curves.items()}
    earlier = [d - s for s, d in zip(best["sft"], best["dft"], strict=True)]
    verdict = "confirmed" if max(earlier) < 0 else "refuted" if min(earlier) > 0 else "not shown"
    return {
        "claim": "DFT peaks in fewer steps",
        "parts": [],
        "verdict": verdict,
        "steps": steps,
        "peak": best,
        "accuracy": curves,
    }


def accuracy(runs: Runs) -> dict[str, dict[str, float]]:
    """Mean over seeds of every kind of run, task by task, sampled and greedy."""
    kinds = {"base": [runs.base], **runs.best, "dft on own samples": runs.own, "sft, cooled": runs.cooled}
    return {
        name: {
            f"{task}{mode}": float(np.mean([getattr(Answered.read(f, task), field).mean() for f in folders]))
            for task in TASKS
            for mode, field in (("", "correct_PN"), (" greedy", "greedy_P"))
        }
        for name, folders in kinds.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dft_lora.findings", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/findings"), help="where the runs lie")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file that is written")
    chosen = parser.parse_args(arguments)
    try:
        runs = make(chosen.out)
    except (DftLoraError, KeyboardInterrupt) as error:
        stop = Interrupted("stopped", signal.SIGINT) if isinstance(error, KeyboardInterrupt) else error
        stop = stop.and_then(GO_ON) if isinstance(stop, Interrupted) else stop
        print(f"error: {stop}", file=sys.stderr)
        return stop.exit_code
    found = lines(runs)
    counts = read_json(chosen.out / "own-samples.json")["counts"]
    result = {
        "lines": found,
        "accuracy": accuracy(runs),
        "settings": {
            "seeds": len(SEEDS),
            "examples": EXAMPLES,
            "batch": BATCH,
            "codebook_steps": CODEBOOK["train.max_steps"],
            "problems": LIMIT,
            "samples": SETTINGS["evaluate.samples"],
            "rates_tried": list(RATES),
            "rates": dict(runs.rate),
            "codebook_rates": dict(runs.codebook_rate),
            "own_samples": counts,
        },
        "provenance": certificate(base=base_fingerprint(runs.base.recipe().model)),
    }
    write_json(chosen.results, result)
    for number, entry in enumerate(found, start=1):
        print(f"{number:2}  {entry['verdict']:10}  {entry['claim']}")
    return 0


def _flat(groups: Mapping[Any, list[RunFolder]]) -> list[RunFolder]:
    return [folder for folders in groups.values() for folder in folders]


if __name__ == "__main__":
    sys.exit(main())
