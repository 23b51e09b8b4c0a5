"""Claims about the runs of a study, each judged by differences between kinds of runs.

A difference is averaged over the seeds and has a paired 95 % interval over problems:

    confirmed    the interval and the difference in every seed lie on the claimed side of zero
    refuted      the interval lies on the other side
    not shown    anything else; the difference is too small for these runs to show it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..evaluation import statistics as st
from ..evaluation.diagnosis import diagnose
from ..evaluation.evaluate import evaluate
from ..evaluation.task_results import TaskResults
from ..evaluation.token_table import TokenTable, tokens_file
from ..runs.folder import RunFolder, read_json
from .own_samples import record_of
from .study import Runs

MAIN, RIVALS = ("sft", "dft"), ("iw-sft", "dft-sentence", "dft-geometric")
OWN = "dft on own samples"

Read = Callable[[RunFolder], np.ndarray]
"""A run's score on each problem [P]."""


def sampled(*tasks: str) -> Read:
    """Sampled accuracy per problem, the tasks one after another."""
    return lambda folder: np.concatenate(
        [st.avg_at_n(TaskResults.read(folder, task).correct_PS) for task in tasks]
    )


def probability(task: str) -> Read:
    """Geometric mean of the reference tokens' probabilities, per solution: exp(-NLL)."""
    return lambda folder: np.exp(-TokenTable.load(tokens_file(folder, task)).nll_E)


def greedy(*tasks: str) -> Read:
    """Greedy accuracy per problem."""
    return lambda folder: np.concatenate([TaskResults.read(folder, task).greedy_P for task in tasks]).astype(
        float
    )


def any_of_four(*tasks: str) -> Read:
    """pass@4 per problem."""
    return lambda folder: np.concatenate(
        [st.pass_at_k(TaskResults.read(folder, task).correct_PS, 4) for task in tasks]
    )


def contrast(
    what: str,
    a: Sequence[RunFolder],
    b: Sequence[RunFolder],
    read: Read,
) -> dict[str, Any]:
    """b - a: its mean over the seeds of both, the interval over problems, each seed, whether b is above a."""
    seeds = min(len(a), len(b))
    a_GP, b_GP = (np.array([read(folder) for folder in folders[:seeds]]) for folders in (a, b))
    return judged(what, a_GP, b_GP)


def judged(what: str, a_GP: np.ndarray, b_GP: np.ndarray) -> dict[str, Any]:
    """`contrast` of scores [seeds, problems]."""
    compared = st.compare(a_GP.mean(0), b_GP.mean(0))
    seeds = (b_GP - a_GP).mean(1).tolist()
    low, high = compared.ci95
    above = low > 0 and min(seeds) > 0
    return {
        "what": what,
        "a": float(a_GP.mean()),
        "b": float(b_GP.mean()),
        "difference": compared.difference,
        "ci95": [low, high],
        "p_value": compared.p_value,
        "smallest_detectable": compared.smallest_detectable,
        "seeds": seeds,
        "verdict": "confirmed" if above else "refuted" if high < 0 else "not shown",
    }


def finding(claim: str, *parts: dict[str, Any], verdict: str | None = None, **more: Any) -> dict[str, Any]:
    """A claim, the contrasts it is judged by, and the verdict: by default that all contrasts agree on."""
    return {"claim": claim, "parts": list(parts), "verdict": verdict or _all(parts), **more}


def above_sft(runs: Runs) -> dict[str, Any]:
    read = sampled(*runs.study.tasks)
    return finding(
        "DFT above SFT on average", contrast("DFT - SFT", runs.best("sft"), runs.best("dft"), read)
    )


def above_iw_sft(runs: Runs) -> dict[str, Any]:
    read = sampled(*runs.study.tasks)
    return finding("DFT above iw-SFT", contrast("DFT - iw-SFT", runs.best("iw-sft"), runs.best("dft"), read))


def hard_set(runs: Runs) -> dict[str, Any]:
    hard = sampled(runs.study.tasks[1])
    falls = contrast("SFT - base, harder set", runs.base, runs.best("sft"), hard)
    gains = contrast("DFT - base, harder set", runs.base, runs.best("dft"), hard)
    verdict = "refuted" if falls["verdict"] == "confirmed" else gains["verdict"]
    return finding("on the harder set SFT falls or stays while DFT gains", falls, gains, verdict=verdict)


def bimodal(runs: Runs) -> dict[str, Any]:
    parts = shares_near_the_ends(runs.base, runs.best("dft"), runs.best("sft"), runs.study.tasks[0])
    return finding("probabilities become bimodal under DFT", *parts)


def robust(runs: Runs) -> dict[str, Any]:
    read = sampled(*runs.study.tasks)
    parts = []
    for rate in runs.study.rates:
        sft, dft = (runs.at(objective, rate, seeds=runs.study.seeds_per_rate) for objective in MAIN)
        parts.append(contrast(f"DFT - SFT at {rate:g}", sft, dft, read))
    for group in (name for name in runs.study.groups if name.startswith("batch-")):
        sft, dft = (runs.best(objective, group) for objective in MAIN)
        parts.append(contrast(f"DFT - SFT in batches of {group.removeprefix('batch-')}", sft, dft, read))
    return finding("DFT above SFT at every learning rate and batch size", *parts)


def token_weights(runs: Runs) -> dict[str, Any]:
    read = sampled(*runs.study.tasks)
    return finding(
        "token weights above sentence and geometric-mean weights",
        *(contrast(f"DFT - {o}", runs.best(o), runs.best("dft"), read) for o in RIVALS[1:]),
    )


def own_answers(runs: Runs) -> dict[str, Any]:
    own = runs.at("dft", runs.rate("dft"), "own")
    return finding(
        "DFT on own verified samples above DFT on the given solutions",
        contrast("own - given", runs.best("dft"), own, sampled(*runs.study.tasks)),
        samples=read_json(record_of(runs.own_samples))["counts"],
    )


def new_facts(runs: Runs) -> dict[str, Any]:
    facts = runs.study.facts_task
    sft, dft = runs.best("sft", "facts"), runs.best("dft", "facts")
    known = contrast("SFT - DFT, probability of the code, per token", dft, sft, probability(facts))
    recalled = contrast("SFT - DFT, whole codes recalled", dft, sft, sampled(facts))
    advice = {
        name: diagnose(folders[0].recipe())
        for name, folders in ((runs.study.tasks[0], runs.best("sft")), (facts, sft))
    }
    said_before = advice[facts]["favours"] == "sft"
    return finding(
        "on new facts DFT loses to SFT, and diagnose says so before",
        recalled,
        known,
        verdict=_all([recalled, known]) if said_before else "refuted",
        diagnosis={
            name: {key: found[key] for key in ("mean_probability", "favours", "verdict")}
            for name, found in advice.items()
        },
    )


def sharpening(runs: Runs) -> dict[str, Any]:
    sft, dft, tasks = runs.best("sft"), runs.best("dft"), runs.study.tasks
    return finding(
        "the gain at temperature 1 is more than sharpening",
        contrast("DFT - SFT, greedy", sft, dft, greedy(*tasks)),
        contrast("DFT - SFT, pass@4", sft, dft, any_of_four(*tasks)),
        contrast("DFT - SFT at DFT's entropy", runs.sft_at_dft_entropy, dft, sampled(*tasks)),
        temperatures=[folder.run()["entropy_matched"]["temperature"] for folder in runs.sft_at_dft_entropy],
    )


def _all(parts: Sequence[Mapping[str, Any]]) -> str:
    """The verdict that all parts share; refuted if one is refuted; else not shown."""
    verdicts = {part["verdict"] for part in parts}
    return "refuted" if "refuted" in verdicts else verdicts.pop() if len(verdicts) == 1 else "not shown"


def shares_near_the_ends(
    base: Sequence[RunFolder], dft: Sequence[RunFolder], sft: Sequence[RunFolder], task: str
) -> list[dict[str, Any]]:
    """Do the shares of target tokens near 0 and near 1 grow under DFT, on held-out solutions?

    The shares of each solution are its scores. SFT's change is recorded too, but does not affect the verdict.
    """

    def near_zero(p_M: np.ndarray) -> np.ndarray:
        return p_M < 0.1

    def near_one(p_M: np.ndarray) -> np.ndarray:
        return p_M > 0.9

    def share(near: Callable[[np.ndarray], np.ndarray]) -> Read:
        def read(folder: RunFolder) -> np.ndarray:
            table = TokenTable.load(tokens_file(folder, task))
            return np.bincount(table.example_M, near(table.p_M)) / np.bincount(table.example_M)

        return read

    parts = [
        contrast(f"p {side}, DFT - base", base, dft, share(near))
        for side, near in (("< 0.1", near_zero), ("> 0.9", near_one))
    ]
    for part, near in zip(parts, (near_zero, near_one), strict=True):
        part["sft_instead"] = contrast("SFT - base", base, sft, share(near))["difference"]
    return parts


def peak(runs: Runs) -> dict[str, Any]:
    """Does DFT reach its best validation accuracy at an earlier checkpoint than SFT, in every seed?"""
    curves: dict[str, list[list[float]]] = {}
    read = sampled(runs.study.validation)
    for name in MAIN:
        of_runs = [folder.checkpoint_runs() for folder in runs.best(name)[: runs.count("checkpoints")]]
        checkpoints = [step.path for steps in of_runs for step in steps]
        evaluate(checkpoints, [runs.study.validation], limit=runs.study.validation_problems)
        curves[name] = [[float(read(step).mean()) for step in steps] for steps in of_runs]
        numbers = [step.run()["step"] for step in of_runs[0]]
    best = {name: [numbers[int(np.argmax(curve))] for curve in found] for name, found in curves.items()}
    earlier = [d - s for s, d in zip(best["sft"], best["dft"], strict=True)]
    verdict = "confirmed" if max(earlier) < 0 else "refuted" if min(earlier) > 0 else "not shown"
    return finding("DFT peaks in fewer steps", verdict=verdict, steps=numbers, peak=best, accuracy=curves)


FINDINGS: dict[str, Callable[[Runs], dict[str, Any]]] = {
    "above-sft": above_sft,
    "above-iw-sft": above_iw_sft,
    "hard-set": hard_set,
    "bimodal": bimodal,
    "peak": peak,
    "robust": robust,
    "token-weights": token_weights,
    "own-samples": own_answers,
    "new-facts": new_facts,
    "sharpening": sharpening,
}
"""In the paper's order. The last one asks whether a gain at temperature 1 is only sharpening."""


def kinds(runs: Runs) -> dict[str, Callable[[], list[RunFolder]]]:
    """The kinds of run whose accuracy is reported."""
    return {
        "base": lambda: runs.base,
        **{objective: partial(runs.best, objective) for objective in (*MAIN, *RIVALS)},
        OWN: lambda: runs.at("dft", runs.rate("dft"), "own"),
        "sft at the entropy of dft": lambda: runs.sft_at_dft_entropy,
    }


def accuracy(folders: Sequence[RunFolder], tasks: Sequence[str]) -> dict[str, float]:
    """Mean over seeds, task by task, sampled and greedy."""
    return {
        f"{task}{mode}": float(np.mean([getattr(TaskResults.read(f, task), field).mean() for f in folders]))
        for task in tasks
        for mode, field in (("", "correct_PS"), (" greedy", "greedy_P"))
    }
