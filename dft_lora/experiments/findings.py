"""The paper's claims, tested on the embedded base: `dft-lora experiment findings`.

Each claim is judged by the difference between two kinds of runs, averaged over the seeds, with a paired 95 %
interval over problems, and by the difference in each seed:

    confirmed    the interval and the difference in every seed lie on the claimed side of zero
    refuted      the interval lies on the other side
    not shown    anything else; the difference is too small for these runs to show it

Every objective runs at its own best learning rate, chosen on arithmetic-validation with the first seed and
reported on the test sets. The base was frozen beforehand; neither it nor the data were tuned to confirm a
claim.

Run folders below --out are reused, so the same command resumes a stopped experiment. The result is
OUT/findings.json with its provenance; docs/findings.md is generated from the copy in docs/results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Recipe, load_recipe
from ..errors import DataError, RequestError, did_you_mean
from ..evaluation import statistics as st
from ..evaluation.base_run import base_run
from ..evaluation.diagnosis import diagnose
from ..evaluation.evaluate import evaluate
from ..evaluation.sharpening import entropy_matched
from ..evaluation.task_results import TaskResults
from ..evaluation.token_table import TokenTable, tokens_file
from ..model.fingerprint import base_fingerprint
from ..runs.folder import RunFolder, read_json, write_json
from ..runs.provenance import certificate
from .own_samples import own_samples
from .sweep import train_once

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
GROUPS: dict[str, dict[str, Any]] = {
    "arithmetic": {},
    "codebook": CODEBOOK,
    **{f"batch-{n}": {"train.batch_size": n, "train.max_steps": EXAMPLES // n} for n in OTHER_BATCHES},
}
"""Folder of runs -> the fields they change. `own`, on the base's own samples, is not listed."""
VALIDATION, LIMIT = "arithmetic-validation", 200
TASKS = ("arithmetic", "arithmetic-long")
OWN_PROBLEMS, OWN_SAMPLES = 480, 4
OWN = "dft on own samples"


def recipe(out: Path, group: str, objective: str, rate: float, seed: int, **more: Any) -> Recipe:
    """The recipe of one run. Its seed determines the order of the data and the adapter's initial weights."""
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


class Runs:
    """The runs behind the findings; each is trained and evaluated when a finding first needs it."""

    def __init__(self, out: Path, seeds: Sequence[int]):
        self.out, self.seeds = out, seeds
        self._rates: dict[tuple[str, str], float] = {}

    def trained(self, group: str, objective: str, rate: float) -> list[RunFolder]:
        """One run per seed. `group` names a folder and further changes; see GROUPS."""
        return [self._train(group, objective, rate, seed) for seed in self.seeds]

    def rate(self, objective: str, group: str = "arithmetic") -> float:
        """The learning rate with the best sampled accuracy for the first seed; the lower one of a tie."""
        if (objective, group) in self._rates:
            return self._rates[objective, group]
        task = "codebook" if group == "codebook" else VALIDATION
        first = {rate: self._train(group, objective, rate, self.seeds[0]) for rate in RATES}
        evaluate([folder.path for folder in first.values()], [task])
        accuracy = {r: float(TaskResults.read(folder, task).correct_PS.mean()) for r, folder in first.items()}
        self._rates[objective, group] = max(accuracy, key=lambda rate: (accuracy[rate], -rate))
        return self._rates[objective, group]

    def best(self, objective: str, group: str = "arithmetic") -> list[RunFolder]:
        """One evaluated run per seed, at the objective's best learning rate on the group's data."""
        rates_from = "codebook" if group == "codebook" else "arithmetic"
        return self.at(objective, self.rate(objective, rates_from), group)

    def at(self, objective: str, rate: float, group: str = "arithmetic") -> list[RunFolder]:
        """One evaluated run per seed at this learning rate."""
        return evaluated(self.trained(group, objective, rate), ["codebook"] if group == "codebook" else TASKS)

    @cached_property
    def base(self) -> list[RunFolder]:
        """The untrained base, repeated once per seed."""
        folder = RunFolder(self.out / "arithmetic" / "base")
        if not folder.begun:
            base_run(recipe(self.out, "arithmetic", "dft", RATES[0], self.seeds[0]), folder.path)
        return evaluated([folder]) * len(self.seeds)

    @cached_property
    def own_samples(self) -> Path:
        """The base's own verified answers to its training problems."""
        problems = {"data.sample": OWN_PROBLEMS}
        return own_samples(
            recipe(self.out, "own", "dft", self.rate("dft"), self.seeds[0], **problems),
            self.out / "own-samples.jsonl",
            samples=OWN_SAMPLES,
            max_new_tokens=96,
        )

    @cached_property
    def sft_at_dft_entropy(self) -> list[RunFolder]:
        """SFT's runs, each at the temperature at which it has the entropy of DFT's run of that seed."""
        matched = [
            entropy_matched(sft, dft, self.out / "entropy-matched" / f"seed-{seed}" / "sft", TASKS[0])
            for seed, sft, dft in zip(self.seeds, self.best("sft"), self.best("dft"), strict=True)
        ]
        for folder in matched:  # one at a time, since each has its own temperature
            evaluated([folder])
        return matched

    def _train(self, group: str, objective: str, rate: float, seed: int) -> RunFolder:
        more = {"data.source": self.own_samples} if group == "own" else GROUPS[group]
        return train_once(recipe(self.out, group, objective, rate, seed, **more))


def evaluated(folders: list[RunFolder], tasks: Sequence[str] = TASKS) -> list[RunFolder]:
    """The same folders, after they have been evaluated on the tasks."""
    evaluate([folder.path for folder in folders], tasks, limit=None if "codebook" in tasks else LIMIT)
    return folders


# --- the findings -----------------------------------------------------------------------------


def scores(folder: RunFolder, tasks: Sequence[str] = TASKS) -> np.ndarray:
    """Sampled accuracy per problem, the tasks one after another [P]."""
    return np.concatenate([st.avg_at_n(TaskResults.read(folder, task).correct_PS) for task in tasks])


def probability(folder: RunFolder) -> np.ndarray:
    """Geometric mean of the reference tokens' probabilities, per code: exp(-NLL) [P]."""
    return np.exp(-TokenTable.load(tokens_file(folder, "codebook")).nll_E)


def greedy(folder: RunFolder) -> np.ndarray:
    """Greedy accuracy per problem [P]."""
    return np.concatenate([TaskResults.read(folder, task).greedy_P for task in TASKS]).astype(float)


def any_of_four(folder: RunFolder) -> np.ndarray:
    """pass@4 per problem [P]."""
    return np.concatenate([st.pass_at_k(TaskResults.read(folder, task).correct_PS, 4) for task in TASKS])


def contrast(
    what: str,
    a: Sequence[RunFolder],
    b: Sequence[RunFolder],
    read: Callable[[RunFolder], np.ndarray] = scores,
) -> dict[str, Any]:
    """b - a: its mean over seeds, the interval over problems, each seed, and whether b is above a."""
    a_GP, b_GP = (np.array([read(folder) for folder in folders]) for folders in (a, b))
    return _judged(what, a_GP, b_GP)


def _judged(what: str, a_GP: np.ndarray, b_GP: np.ndarray) -> dict[str, Any]:
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
    return finding("DFT above SFT on average", contrast("DFT - SFT", runs.best("sft"), runs.best("dft")))


def above_iw_sft(runs: Runs) -> dict[str, Any]:
    return finding("DFT above iw-SFT", contrast("DFT - iw-SFT", runs.best("iw-sft"), runs.best("dft")))


def hard_set(runs: Runs) -> dict[str, Any]:
    def only_long(folder: RunFolder) -> np.ndarray:
        return scores(folder, TASKS[1:])

    falls = contrast("SFT - base, long set", runs.base, runs.best("sft"), only_long)
    gains = contrast("DFT - base, long set", runs.base, runs.best("dft"), only_long)
    verdict = "refuted" if falls["verdict"] == "confirmed" else gains["verdict"]
    return finding("on the long set SFT falls or stays while DFT gains", falls, gains, verdict=verdict)


def bimodal(runs: Runs) -> dict[str, Any]:
    parts = shares_near_the_ends(runs.base, runs.best("dft"), runs.best("sft"))
    return finding("probabilities become bimodal under DFT", *parts)


def robust(runs: Runs) -> dict[str, Any]:
    parts = [contrast(f"DFT - SFT at {r:g}", runs.at("sft", r), runs.at("dft", r)) for r in RATES]
    for size in OTHER_BATCHES:
        sft, dft = (runs.best(objective, f"batch-{size}") for objective in MAIN)
        parts.append(contrast(f"DFT - SFT in batches of {size}", sft, dft))
    return finding("DFT above SFT at every learning rate and batch size", *parts)


def token_weights(runs: Runs) -> dict[str, Any]:
    return finding(
        "token weights above sentence and geometric-mean weights",
        *(contrast(f"DFT - {o}", runs.best(o), runs.best("dft")) for o in RIVALS[1:]),
    )


def own_answers(runs: Runs) -> dict[str, Any]:
    own = runs.at("dft", runs.rate("dft"), "own")
    return finding(
        "DFT on own verified samples above DFT on the given solutions",
        contrast("own - given", runs.best("dft"), own),
        samples=read_json(runs.own_samples.with_suffix(".json"))["counts"],
    )


def new_facts(runs: Runs) -> dict[str, Any]:
    sft, dft = runs.best("sft", "codebook"), runs.best("dft", "codebook")
    known = contrast("SFT - DFT, probability of the code, per token", dft, sft, probability)
    recalled = contrast("SFT - DFT, whole codes recalled", dft, sft, lambda f: scores(f, ["codebook"]))
    advice = {
        name: diagnose(folders[0].recipe())
        for name, folders in (("arithmetic", runs.best("sft")), ("codebook", sft))
    }
    as_expected = all(
        found["favours"] == right for found, right in zip(advice.values(), ("dft", "sft"), strict=True)
    )
    return finding(
        "on new facts DFT loses to SFT, and diagnose says so before",
        recalled,
        known,
        verdict=_all([recalled, known]) if as_expected else "refuted",
        diagnosis={
            name: {key: found[key] for key in ("mean_probability", "favours", "verdict")}
            for name, found in advice.items()
        },
    )


def sharpening(runs: Runs) -> dict[str, Any]:
    sft, dft = runs.best("sft"), runs.best("dft")
    return finding(
        "the gain at temperature 1 is more than sharpening",
        contrast("DFT - SFT, greedy", sft, dft, greedy),
        contrast("DFT - SFT, pass@4", sft, dft, any_of_four),
        contrast("DFT - SFT at DFT's entropy", runs.sft_at_dft_entropy, dft),
        temperatures=[folder.run()["entropy_matched"]["temperature"] for folder in runs.sft_at_dft_entropy],
    )


def _all(parts: Sequence[Mapping[str, Any]]) -> str:
    """The verdict that all parts share; refuted if one is refuted; else not shown."""
    verdicts = {part["verdict"] for part in parts}
    return "refuted" if "refuted" in verdicts else verdicts.pop() if len(verdicts) == 1 else "not shown"


def shares_near_the_ends(
    base: Sequence[RunFolder], dft: Sequence[RunFolder], sft: Sequence[RunFolder]
) -> list[dict[str, Any]]:
    """Do the shares of target tokens near 0 and near 1 grow under DFT, on held-out solutions?

    The shares of each solution are its scores. SFT's change is recorded too, but does not affect the verdict.
    """

    def near_zero(p_M: np.ndarray) -> np.ndarray:
        return p_M < 0.1

    def near_one(p_M: np.ndarray) -> np.ndarray:
        return p_M > 0.9

    def share(near: Callable[[np.ndarray], np.ndarray]) -> Callable[[RunFolder], np.ndarray]:
        def read(folder: RunFolder) -> np.ndarray:
            table = TokenTable.load(tokens_file(folder, TASKS[0]))
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
    for name in MAIN:
        of_runs = [folder.checkpoint_runs() for folder in runs.best(name)]
        evaluate([step.path for steps in of_runs for step in steps], [VALIDATION])
        curves[name] = [[float(scores(step, [VALIDATION]).mean()) for step in steps] for steps in of_runs]
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


def accuracy(folders: Sequence[RunFolder]) -> dict[str, float]:
    """Mean over seeds, task by task, sampled and greedy."""
    return {
        f"{task}{mode}": float(np.mean([getattr(TaskResults.read(f, task), field).mean() for f in folders]))
        for task in TASKS
        for mode, field in (("", "correct_PS"), (" greedy", "greedy_P"))
    }


def settings(runs: Runs) -> dict[str, Any]:
    """The settings that the generated text of docs/findings.md states."""
    return {
        "seeds": len(runs.seeds),
        "examples": EXAMPLES,
        "batch": BATCH,
        "codebook_steps": CODEBOOK["train.max_steps"],
        "problems": LIMIT,
        "samples": SETTINGS["evaluate.samples"],
        "rates_tried": list(RATES),
        "rates": {objective: runs.rate(objective) for objective in (*MAIN, *RIVALS)},
        "codebook_rates": {objective: runs.rate(objective, "codebook") for objective in MAIN},
    }


def _recorded(file: Path) -> dict[str, Any]:
    """A findings.json, its lines by name. Raises RequestError when it cannot be completed."""
    try:
        found = read_json(file)
        return found | {"lines": {line["name"]: line for line in found["lines"]}}
    except (DataError, KeyError, TypeError) as error:
        raise RequestError(f"--only: {file} is not a recorded result ({error}); leave --only out") from None


def run(out: Path, seeds: Sequence[int], only: Sequence[str] = ()) -> Iterator[str]:
    """Write OUT/findings.json and yield the verdicts, one line each.

    `only` renews the named findings and keeps the others in an existing findings.json, which was made with
    the same settings. Each finding records its own commit and date. Raises RequestError for an unknown name.
    """
    for name in only:
        if name not in FINDINGS:
            raise RequestError(f"--only {name!r}: no such finding{did_you_mean(name, FINDINGS)}")
    file, runs = out / "findings.json", Runs(out, seeds)
    before = _recorded(file) if only else {}
    made = certificate(base=base_fingerprint(recipe(out, "arithmetic", "dft", RATES[0], seeds[0]).model))
    lines = before.get("lines", {})
    for name, find in FINDINGS.items():
        if not only or name in only:
            lines[name] = {"name": name, **find(runs), "date": made["date"], "commit": made["commit"]}
    of_kind = kinds(runs)
    renewed = [OWN] if "own-samples" in only else [] if only else list(of_kind)
    accuracies = before.get("accuracy", {}) | {kind: accuracy(of_kind[kind]()) for kind in renewed}
    if not only:
        before = {"settings": settings(runs), "provenance": made}
    write_json(file, before | {"accuracy": accuracies, "lines": [lines[name] for name in FINDINGS]})
    for number, line in enumerate(lines.values(), start=1):
        yield f"{number:2}  {line['verdict']:10}  {line['claim']}"
