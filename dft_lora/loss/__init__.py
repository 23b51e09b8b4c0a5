"""The loss engine: differentiable log-probabilities in two GEMMs, and objectives. Needs torch alone."""

from . import judged  # noqa: F401  registers its objectives
from .forward import kernel_missing
from .head import Head
from .naive import naive_token_logps
from .objectives import Objective, ObjectiveError, gradient_weights, objective, objective_names
from .token_logps import REFERENCE_NEEDS, TokenScores, chunk_rows, token_logps

__all__ = [
    "REFERENCE_NEEDS",
    "Head",
    "Objective",
    "ObjectiveError",
    "TokenScores",
    "chunk_rows",
    "gradient_weights",
    "kernel_missing",
    "naive_token_logps",
    "objective",
    "objective_names",
    "token_logps",
]
