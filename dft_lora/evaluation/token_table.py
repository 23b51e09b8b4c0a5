"""Probabilities of the tokens of given texts under one run, as arrays and as a file in its run folder.

    evaluation/TASK.tokens.safetensors          tokens of the reference solutions
    evaluation/other-text.tokens.safetensors    tokens of a text that is unrelated to the task

Reports and the page read these files, so this file does not import torch.

Legend: M scored tokens, E examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runs.folder import RunFolder


@dataclass(frozen=True)
class TokenTable:
    """One entry per supervised token, in the order of the examples.

    `pull_M` is the norm of d log p / d h, which is the gradient at the hidden state under SFT. Under DFT the
    gradient is p times that.
    """

    ids_M: np.ndarray
    example_M: np.ndarray
    logp_M: np.ndarray
    entropy_M: np.ndarray
    pull_M: np.ndarray
    top1_M: np.ndarray | None = None
    """Whether the token was the most probable one; None in tables of earlier versions."""

    @property
    def p_M(self) -> np.ndarray:
        return np.exp(self.logp_M)

    @property
    def nll_E(self) -> np.ndarray:
        """Mean NLL of each example, in nats per token."""
        return np.bincount(self.example_M, -self.logp_M) / np.bincount(self.example_M)

    @property
    def first_E(self) -> np.ndarray:
        """Probability of the first token of each example; the tokens are in the order of the examples."""
        return self.p_M[np.flatnonzero(np.diff(self.example_M, prepend=-1))]

    @property
    def end_E(self) -> np.ndarray:
        """Probability of the last token of each example: for a solution, its end token."""
        return self.p_M[np.flatnonzero(np.diff(self.example_M, append=-1))]

    def of(self, chosen_E: np.ndarray) -> TokenTable:
        """The tokens of the chosen examples, a mask, which are numbered anew."""
        kept_M, number_E = chosen_E[self.example_M], np.cumsum(chosen_E) - 1
        arrays = {name: array[kept_M] for name, array in self._arrays().items()}
        return TokenTable(**arrays | {"example_M": number_E[arrays["example_M"]]})

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in vars(self).items() if array is not None}

    def save(self, file: Path, weights: Mapping[str, str] | None = None) -> None:
        """Write the table. `weights` identifies the adapter and the base that it was computed with."""
        from safetensors.numpy import save_file

        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays().items()}
        save_file(arrays, temporary, dict(weights or {}))
        temporary.replace(file)

    @classmethod
    def load(cls, file: Path) -> TokenTable:
        from safetensors.numpy import load_file

        return cls(**load_file(file))

    @staticmethod
    def weights(file: Path) -> dict[str, str]:
        """The weights that a saved table was computed with; empty if they were not recorded."""
        from safetensors import safe_open

        with safe_open(file, "np") as saved:
            return saved.metadata() or {}


def tokens_file(folder: RunFolder, title: str) -> Path:
    """Where the token table for a task, or for the text `title`, is saved."""
    return folder.evaluation(title).with_suffix(".tokens.safetensors")
