"""The errors of this package, reported to the person at the keyboard.

    DftLoraError
    ├── RequestError        the request was wrong (exit 2); names the field and the remedy
    │   ├── RecipeError     a recipe field is unknown, ill-typed or contradicts another
    │   ├── DataError       a file, a column or a row is missing or unreadable
    │   ├── ModelError      a model cannot be found, or has a part that cannot be trained exactly
    │   └── MissingPart     an optional package or a piece of hardware is missing
    └── RunError            the run failed after it had started (exit 1)
        └── Interrupted     a signal stopped it (exit 128 + signal); it can be resumed

Each message is one line. Numerical functions raise `ValueError` for wrong arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DftLoraError(Exception):
    """Base class of all errors that this package raises on purpose."""

    exit_code = 1


class RequestError(DftLoraError):
    """The request was wrong; the message names the field and the remedy."""

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
    """The run failed after it had started."""


class Interrupted(RunError):
    """SIGTERM or Ctrl-C; progress was saved. The exit code is that of a shell: 143 or 130."""

    def __init__(self, message: str, signal_number: int | None, hinted: bool = False):
        super().__init__(message)
        self.hinted = hinted
        self.signal_number = signal_number
        self.exit_code = 128 + (signal_number or 0)

    def and_then(self, hint: str) -> Interrupted:
        """The same with the way to continue, which the caller knows. The first caller's hint is kept."""
        return self if self.hinted else Interrupted(f"{self}; {hint}", self.signal_number, hinted=True)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """` (did you mean 'x'?)`, or the empty string if no known name is close."""
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_line(error: BaseException) -> str:
    """The text of an error of another library, for a message of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__
