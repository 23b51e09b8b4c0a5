"""The paper's claims, tested on the embedded base: `dft-lora experiment findings`.

How a claim is judged stands in `claims.py`. The base was frozen beforehand; neither it nor the data were
tuned to confirm a claim.

Run folders below --out are reused, so the same command resumes a stopped experiment. The result is
OUT/findings.json with its provenance; docs/findings.md is generated from the copy in docs/results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, RequestError, did_you_mean
from ..model.fingerprint import base_fingerprint
from ..runs.folder import make_writable, read_json, write_json
from ..runs.provenance import certificate
from .claims import FINDINGS, MAIN, OWN, RIVALS, accuracy, kinds
from .study import Runs, Study

EXAMPLES, BATCH, OTHER_BATCHES = 960, 16, (8, 32)
STUDY = Study(
    recipe="tiny_dft",
    settings={
        "train.batch_size": BATCH,
        "train.micro_batch_size": 8,
        "train.max_steps": EXAMPLES // BATCH,
        "train.save_steps": 15,
        "train.keep_checkpoints": 8,
        "evaluate.samples": 4,
    },
    rates=(3e-4, 1e-3, 3e-3, 1e-2),
    tasks=("arithmetic", "arithmetic-long"),
    validation="arithmetic-validation",
    problems=200,
    groups={
        "main": {},
        "facts": {"data.source": "codebook", "train.max_steps": 480, "train.save_steps": 240},
        **{f"batch-{n}": {"train.batch_size": n, "train.max_steps": EXAMPLES // n} for n in OTHER_BATCHES},
    },
    own_problems=480,
)


def settings(runs: Runs) -> dict[str, Any]:
    """The settings that the generated text of docs/findings.md states."""
    return {
        "seeds": len(runs.seeds),
        "seed_list": list(runs.seeds),
        "examples": EXAMPLES,
        "batch": BATCH,
        "codebook_steps": STUDY.groups["facts"]["train.max_steps"],
        "problems": STUDY.problems,
        "samples": STUDY.settings["evaluate.samples"],
        "rates_tried": list(STUDY.rates),
        "rates": {objective: runs.rate(objective) for objective in (*MAIN, *RIVALS)},
        "codebook_rates": {objective: runs.rate(objective, "facts") for objective in MAIN},
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
    file, runs = out / "findings.json", Runs(STUDY, out, seeds)
    before = _recorded(file) if only else {}
    if only and (made_with := before["settings"].get("seed_list", [0, 1, 2])) != list(seeds):
        raise RequestError(f"--seeds: {file} was made with seeds {', '.join(map(str, made_with))}")
    made = certificate(base=base_fingerprint(runs.recipe("main", "dft", STUDY.rates[0], seeds[0]).model))
    make_writable(out, "--out")
    lines = before.get("lines", {})
    for name, find in FINDINGS.items():
        if not only or name in only:
            lines[name] = {"name": name, **find(runs), "date": made["date"], "commit": made["commit"]}
    of_kind = kinds(runs)
    renewed = [OWN] if "own-samples" in only else [] if only else list(of_kind)
    accuracies = before.get("accuracy", {}) | {
        kind: accuracy(of_kind[kind](), STUDY.tasks) for kind in renewed
    }
    if not only:
        before = {"settings": settings(runs), "provenance": made}
    write_json(file, before | {"accuracy": accuracies, "lines": [lines[name] for name in FINDINGS]})
    for number, line in enumerate(lines.values(), start=1):
        yield f"{number:2}  {line['verdict']:10}  {line['claim']}"
