"""Blind votes: which answer people preferred when they did not know which run wrote it.

Each vote is one line of JSON, appended to a local file. It holds both runs' names and identities (the digests
of their adapters), so that votes on an older adapter of the same name do not count for the new one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Literal

from ..errors import RequestError
from ..runs.folder import read_lines
from .counts import wilson

Choice = Literal["left", "right", "tie"]


@dataclass(frozen=True)
class Pair:
    """Two answers shown without run names. It stays on the server until the vote is cast."""

    problem: str
    left: str
    right: str
    left_text: str
    right_text: str


@dataclass(frozen=True)
class Standing:
    """The votes on two runs; `share` and `interval` are of the decided votes that `a` won."""

    a: str
    b: str
    for_a: int
    for_b: int
    ties: int

    @property
    def share(self) -> float | None:
        return self.for_a / (self.for_a + self.for_b) if self.for_a + self.for_b else None

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.for_a, self.for_a + self.for_b)


class Ballot:
    """The votes in one file. Threads may append at the same time; each line is written in one piece."""

    def __init__(self, file: Path, identities: Mapping[str, str]):
        self.file, self.identities = file, dict(identities)
        self._lock = threading.Lock()

    def cast(self, pair: Pair, choice: Choice) -> None:
        """Record a vote. Raises RequestError when the file cannot be written."""
        vote = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "choice": choice,
            "ids": {side: self.identities[getattr(pair, side)] for side in ("left", "right")},
            **asdict(pair),
        }
        line = json.dumps(vote, ensure_ascii=False) + "\n"
        try:
            with self._lock:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(line)
        except OSError as error:
            raise RequestError(f"--votes: cannot write {self.file}: {error.strerror}") from None

    def standings(self) -> list[Standing]:
        """The votes on each pair of the page's runs that has any, in the page's order."""
        runs = {identity: name for name, identity in self.identities.items()}
        counts: dict[tuple[str, str], list[int]] = {}
        for vote in read_lines(self.file) if self.file.is_file() else ():
            sides = [runs.get(vote["ids"][side]) for side in ("left", "right")]
            winner = {"left": sides[0], "right": sides[1], "tie": None}[vote["choice"]]
            if None in sides:
                continue  # of a run that is not on this page
            for a, b in combinations(self.identities, 2):
                if {a, b} == set(sides):
                    entry = counts.setdefault((a, b), [0, 0, 0])
                    entry[2 if winner is None else int(winner == b)] += 1
        return [Standing(a, b, *entry) for (a, b), entry in counts.items()]
