"""What can go wrong, told to the person at the keyboard.

    DftLoraError
    ├── RequestError        the request was wrong (exit 2): names the field and the remedy
    │   ├── RecipeError     a recipe field is unknown, ill-typed or contradicts another
    │   ├── DataError       a file, a column or a row is missing or unreadable
    │   ├── ModelError      a model cannot be found, or has a part we cannot train exactly
    │   └── MissingPart     an optional package or a piece of hardware is not there
    └── RunError            the run failed after it had begun (exit 1)
        └── Interrupted     a signal asked it to stop (exit 128 + signal); it can be resumed

Each message is one line. `ValueError` is kept for wrong arguments to numerical functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DftLoraError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 1


class RequestError(DftLoraError):
    """The request was wrong; nothing was loaded, nothing was written."""

    exit_code = 2


class RecipeError(RequestError):
    """A recipe field is unknown, has the wrong type, or contradicts another."""


class DataError(RequestError):
    """A data file, a column or a row is missing or unreadable."""


class ModelError(RequestError):
    """A model cannot be found or has a part that cannot be trained exactly."""


class MissingPart(RequestError):
    """An optional package, or hardware, that the request needs is missing."""


class RunError(DftLoraError):
    """The run failed after it had begun."""


class Interrupted(RunError):
    """SIGTERM or Ctrl-C; a checkpoint was kept. The exit code is a shell's: 143 or 130."""

    def __init__(self, message: str, signal_number: int | None, told: bool = False):
        super().__init__(message)
        self.told = told
        self.signal_number = signal_number
        self.exit_code = 128 + (signal_number or 0)

    def and_then(self, way_on: str) -> Interrupted:
        """The same, with how to go on: the one who was asked knows. It is said once."""
        return self if self.told else Interrupted(f"{self}; {way_on}", self.signal_number, told=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or the empty string when nothing is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
