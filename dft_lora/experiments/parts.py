"""An experiment in parts: each finding is written as soon as it is made, and kept for the same seeds.

OUT/parts/BASE PART.json     one finding, with its own provenance
OUT/NAME.json                all of them: base -> part -> finding
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..model.fingerprint import base_fingerprint
from ..runs.folder import make_writable, read_json, write_json
from ..runs.provenance import certificate
from .study import Runs, Study

Parts = Iterable[tuple[str, Callable[[], Any]]]
"""(name of a part, what finds it out)."""


def in_parts(
    report: str,
    out: Path,
    seeds: Sequence[int],
    only: Sequence[str],
    studies: Mapping[str, Callable[[], Study]],
    parts_of: Callable[[str, Any], Parts],
    runs_of: Callable[[Study, Path, Sequence[int]], Runs] = Runs,
) -> Iterator[str]:
    """Write OUT/`report`.json and yield the verdicts, one line each. `only` names studies; default: all.

    Raises RequestError for an unknown study, or where `out` cannot be written.
    """
    check_request(out, only, studies)
    for name in only or studies:
        study = studies[name]()
        runs = runs_of(study, out / name.replace(", ", "-").replace(" ", "-"), seeds)
        base = base_fingerprint(runs.recipe("main", "sft", study.rates[0], seeds[0]).model)
        for part, find in parts_of(name, runs):
            file = out / "parts" / f"{name} {part}.json".replace("/", " ")
            if not file.is_file() or read_json(file)["seeds"] != list(seeds):
                made = {"base": name, "part": part, "seeds": list(seeds), "problems": study.problems}
                write_json(file, {**made, "found": find(), **certificate(fingerprint=base)})
                write_together(out, report)
            yield f"{name:22} {part:24} {_verdict(read_json(file)['found'])}"


def check_request(out: Path, only: Sequence[str], studies: Collection[str]) -> None:
    """Raises RequestError for a name in `only` that is no study, or where `out` cannot be written."""
    for name in only:
        if name not in studies:
            raise RequestError(f"--only {name!r}: not one of {', '.join(map(repr, studies))}")
    make_writable(out, "--out")


def write_together(out: Path, report: str) -> None:
    """Put all finished parts together: OUT/`report`.json, base -> part -> what was found."""
    bases: dict[str, Any] = {}
    for file in sorted((out / "parts").glob("*.json")):
        entry = read_json(file)
        bases.setdefault(entry.pop("base"), {})[entry.pop("part")] = entry
    write_json(out / f"{report}.json", {"bases": bases})


def _verdict(found: Any) -> str:
    return found.get("verdict", "done") if isinstance(found, dict) else "done"
