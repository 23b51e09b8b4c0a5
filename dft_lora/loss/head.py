"""The output layer as a value: z = softcap * tanh(logit_scale * (h @ W.T + bias) / softcap).

Without a softcap there is no tanh either.

Shapes (docs/shapes.md): C rows of a chunk, N positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums, weights and log-probabilities are float32, or float64 where the model is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast on `device`. The meta device has no autocast to switch off."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class Target(NamedTuple):
    """What a chunk needs to know of its targets; float32 or float64, whatever the model's dtype."""

    row_CD: Tensor  # d z_t / d h: the target's row times the slope
    raw_C: Tensor  # logit_scale * (h . W_t + bias_t), before the softcap
    logit_C: Tensor  # z_t


@dataclass(frozen=True)
class Head:
    """Weight, bias, logit scale and soft-cap of one head."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `token_logps` beyond hidden states and targets."""
        return {
            "weight": self.weight_VD,
            "bias": self.bias_V,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """(weight, bias), None where absent."""
        return self.weight_VD, self.bias_V

    @property
    def trainable(self) -> bool:
        return any(tensor is not None and tensor.requires_grad for tensor in self.parameters)

    def cap(self, raw: Tensor) -> Tensor:
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def slope(self, raw: Tensor) -> Tensor:
        """d z / d (h @ W.T + bias): logit_scale times 1 / cosh^2, which unlike 1 - tanh^2 does not cancel."""
        return self.logit_scale * (
            torch.ones_like(raw) if self.softcap is None else (raw / self.softcap).cosh() ** -2
        )

    def targets(self, h_CD: Tensor, y_C: Tensor) -> Target:
        """The target's row and logit, from an exact row dot product instead of the GEMM's rounded entry."""
        dtype = accumulator(h_CD.dtype)
        row_CD = self.weight_rows(y_C, dtype)
        raw_C = (h_CD.to(dtype) * row_CD).sum(-1)
        if self.bias_V is not None:
            raw_C += self.bias_V[y_C]
        raw_C *= self.logit_scale
        return Target(row_CD.mul_(self.slope(raw_C)[:, None]), raw_C, self.cap(raw_C))

    def weight_rows(self, y_C: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, a new tensor [C, D]."""
        return self.weight_VD.detach()[y_C].to(dtype)

    def target_rows(self, y_C: Tensor, raw_C: Tensor) -> Tensor:
        """d z_t / d h: the target's row times the slope at its raw logit."""
        return self.weight_rows(y_C, raw_C.dtype).mul_(self.slope(raw_C)[:, None])

    def shifted_logits_(self, out_CV: Tensor, h_CD: Tensor, shift_C: Tensor) -> None:
        """out = logit_scale * h @ W.T - shift, before bias and softcap, rounded once.

        Subtracting inside the GEMM (beta = 1) rounds z - z_t instead of z: near the target's logit, where
        the probability is, a 16-bit logit keeps 3 to 5 more bits. The bias is added later, in float32:
        within the fill it would be rounded together with the large shift.
        """
        out_CV.copy_(-shift_C[:, None])
        torch.addmm(out_CV, h_CD, self.weight_VD.t(), alpha=self.logit_scale, out=out_CV)

    def mix(self, q_CV: Tensor) -> Tensor:
        """logit_scale * q @ W, the mean row under the weights q; float32 or float64 [C, D]."""
        return (q_CV @ self.weight_VD).to(accumulator(q_CV.dtype)).mul_(self.logit_scale)

    def largest_row_norm(self) -> float:
        """An upper bound of |logit_scale| * max_j ||W_j||, for the error bound of skipped rows."""
        return abs(self.logit_scale) * _largest_row_norm(self.weight_VD)

    def logits(self, h_ND: Tensor) -> Tensor:
        """Full logits [N, V] in float32, for a few rows only."""
        return self.raw_logits(h_ND).float()

    def raw_logits(self, h_ND: Tensor) -> Tensor:
        """Full logits [N, V] for a few rows; in the head's dtype, float32 with a logit scale or a softcap."""
        z_NV = torch.nn.functional.linear(h_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)
        return z_NV if self._is_linear else self.cap(z_NV.float() * self.logit_scale)

    @property
    def row_bytes(self) -> int:
        """Memory of one row of `raw_logits`, work arrays included."""
        V, size = self.weight_VD.shape[0], self.weight_VD.element_size()
        return V * size if self._is_linear else V * (size + 3 * 4)

    @property
    def _is_linear(self) -> bool:
        return self.logit_scale == 1.0 and self.softcap is None


_norms = WeakTensorKeyDictionary()  # weight -> (version, norm): a frozen head is read once, not at every step


def _largest_row_norm(weight_VD: Tensor) -> float:
    version = None if weight_VD.is_inference() else weight_VD._version
    if weight_VD not in _norms or _norms[weight_VD][0] != version:
        _norms[weight_VD] = version, float(torch.linalg.vector_norm(weight_VD.detach(), dim=1).max())
    return _norms[weight_VD][1]
