"""Objectives: small values that map `TokenScores` to a loss, summed over tokens.

    loss = objective("dft")(scores)             # divide by the supervised tokens of the whole step
    loss = objective("power", a=0.5)(scores)
    loss = objective(lambda s: -(s.logp * s.entropy).sum())(scores)     # any function of the scores

p is the probability of the target token, sg() stops the gradient. What an objective reads besides logp:

    needs         names of optional fields of TokenScores: pass them to `token_logps(needs=...)`
    signals       names of values that belong to examples: pass them to `token_logps(signals=...)`
    learns_from   solutions, preference pairs, or rollouts: answers of the model itself that were judged
    step_signals  where a signal depends on the other examples of the optimizer step: computes it from the
                  mean NLL of each example. This takes one more forward pass over the step, without gradients,
                  and makes the result independent of how the step is split over micro-batches and ranks.

`token_weight(logp)` is -d loss / d logp, detached, for objectives where it depends on the token's own logp
alone; for others it is None. `token_logps(skip=...)` relies on it. `gradient_weights` computes the same for
any objective from given scores.

The value of a weighted loss does not measure progress: it can fall while cross-entropy rises. Compare NLL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import expm1, isfinite, log, log1p
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .token_logps import TokenScores

STARVED = 0.005
"""A mean weight of end tokens below this is not learned from (docs/tasks.md, "Was the advice right?")."""
NEARLY_SFT = 1e-6  # the smallest exponent: p^a is 1 to float32's precision
SAME_NLL = 1e-4  # nats per token: far below the differences between examples, far above float32's rounding


class ObjectiveError(ValueError):
    """An objective that does not exist, or a number it does not have or does not allow; names the field."""


@dataclass(frozen=True)
class Objective:
    """A named loss with its own numbers. Subclasses are registered under `name`."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    divided_by: ClassVar[Literal["tokens", "sequences", "groups"]] = "tokens"
    """What the sum over the whole step is divided by, once: supervised tokens, examples, or groups."""
    token_weight: ClassVar[Callable[..., Tensor] | None] = None
    signals: ClassVar[frozenset[str]] = frozenset()
    learns_from: ClassVar[Literal["solutions", "pairs", "rollouts"]] = "solutions"
    """What its examples are; `judged.py` has the objectives that learn from pairs and rollouts."""
    least_samples: ClassVar[int] = 1
    """Answers of the model itself to one problem that it must at least compare."""
    step_signals: ClassVar[Callable[..., dict[str, Tensor]] | None] = None
    """Mean NLL of each example of an optimizer step [E] -> signals [E], for all of `signals`."""
    toward: ClassVar[Callable[..., Tensor] | None] = None
    """Where the reference is not the base: (hidden states of the model, of a teacher) -> of the reference."""

    def __call__(self, scores: TokenScores) -> Tensor:
        raise NotImplementedError

    def at(self, progress: float) -> Objective:
        """The objective of the step after this share of the run, in [0, 1); by default always itself."""
        return self


class Weighted(Objective):
    """- sum sg(w_t) log p_t."""

    def weight(self, scores: TokenScores) -> Tensor:
        """w [M]."""
        raise NotImplementedError

    def __call__(self, scores: TokenScores) -> Tensor:
        return -(self.weight(scores).detach() * scores.logp).sum()


class TokenWeighted(Weighted):
    """- sum sg(w_t) log p_t, each weight a function of its own log p_t."""

    def token_weight(self, logp: Tensor) -> Tensor:
        """w of any shape of log-probabilities."""
        raise NotImplementedError

    def weight(self, scores: TokenScores) -> Tensor:
        return self.token_weight(scores.logp)


class Sft(Weighted):
    """- log p. Cross-entropy: a policy gradient of reward 1 weighted by 1/p (arXiv 2508.05629, eq. 5).

    Weakness: the largest gradients come from the least probable tokens. It has no weight to skip tokens by.
    """

    name = "sft"

    def weight(self, scores: TokenScores) -> Tensor:
        return torch.ones_like(scores.logp)


@dataclass(frozen=True)
class Dft(Weighted):
    """- sg(p) log p. Dynamic Fine-Tuning, arXiv 2508.05629, eq. 9: SFT with its weight 1/p cancelled.

    Not in the paper: `floor`, the least weight of any token, max(p, floor), and `end`, the least weight of a
    sequence's last token; 1 is plain NLL on it.

    Weakness: where the prior is weak it does not teach new facts (Natural Questions 30.1; SFT 36.6). Without
    a floor it does not learn tokens that the base finds improbable, such as an unknown format's end token.
    """

    name = "dft"
    floor: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_number(
            self, "floor", lambda floor: 0 <= floor < 1, "must lie in [0, 1) (1 is the objective 'sft')"
        )
        check_number(
            self, "end", lambda end: 0 <= end <= 1, "must lie in [0, 1] (1 is plain NLL on the end token)"
        )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"sequence"}) if self.end else frozenset()

    @property
    def token_weight(self) -> Callable[[Tensor], Tensor] | None:  # type: ignore[override]
        return None if self.end else self._floored

    def _floored(self, logp: Tensor) -> Tensor:
        return logp.detach().exp().clamp_min(self.floor)

    def weight(self, scores: TokenScores) -> Tensor:
        weight_M = self._floored(scores.logp)
        return torch.where(scores.is_end, weight_M.clamp_min(self.end), weight_M) if self.end else weight_M


class DftSentence(Weighted):
    """- sg(product of the sequence's p) log p. The sentence-level ablation of arXiv 2508.05629.

    Weakness: weights of long sequences underflow to zero (average score 15.75; token-level 31.58).
    """

    name = "dft-sentence"
    needs = frozenset({"sequence"})

    def weight(self, scores: TokenScores) -> Tensor:
        return Sequences(scores).sum(scores.logp.detach()).exp()


class DftGeometric(Weighted):
    """- sg(geometric mean of the sequence's p) log p. The same ablation, length-normalised (score 17.21)."""

    name = "dft-geometric"
    needs = frozenset({"sequence"})

    def weight(self, scores: TokenScores) -> Tensor:
        return Sequences(scores).mean(scores.logp.detach()).exp()


@dataclass(frozen=True)
class IwSft(Weighted):
    """- sg(clamp(exp(mean_t(log p - log p_ref)), low, high)) log p. iw-SFT, arXiv 2507.12856, by sequence.

    Weakness: variance. Weights grow with the distance from the reference, up to the clamp.
    """

    name = "iw-sft"
    needs = frozenset({"sequence", "reference_logp"})
    low: float = 0.0
    high: float = 16.0

    def __post_init__(self) -> None:
        _check_clamp(self)

    def weight(self, scores: TokenScores) -> Tensor:
        log_ratio_M = scores.logp.detach() - scores.need("reference_logp")
        return Sequences(scores).mean(log_ratio_M).exp().clamp(self.low, self.high)


@dataclass(frozen=True)
class IwSftToken(Weighted):
    """- sg(clamp(p / p_ref, low, high)) log p. iw-SFT, arXiv 2507.12856, by token."""

    name = "iw-sft-token"
    needs = frozenset({"reference_logp"})
    low: float = 0.2
    high: float = 1.8

    def __post_init__(self) -> None:
        _check_clamp(self)

    def weight(self, scores: TokenScores) -> Tensor:
        return (scores.logp.detach() - scores.need("reference_logp")).exp().clamp(self.low, self.high)


@dataclass(frozen=True)
class Power(Objective):
    """(1 - p^a) / a. Beyond Log Likelihood, arXiv 2510.00526; gradient weight p^a: a -> 0 is SFT, a = 1 DFT.

    `anneal` (not in the paper): the share of the run over which the exponent rises from 0 to a.

    Weakness: a weak prior, more so for larger a (Figfont 35.2 -> 0.0 at a = 1).
    """

    name = "power"
    a: float = 1.0
    anneal: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "a", lambda a: a > 0, "must be positive (a -> 0 is the objective 'sft')")
        check_number(self, "anneal", lambda share: 0 <= share <= 1, "must lie in [0, 1], a share of the run")

    def at(self, progress: float) -> Power:
        """See Objective."""
        if progress >= self.anneal:
            return self
        return replace(self, a=max(self.a * progress / self.anneal, NEARLY_SFT), anneal=0.0)

    def token_weight(self, logp: Tensor) -> Tensor:
        return (self.a * logp.detach()).exp()

    def __call__(self, scores: TokenScores) -> Tensor:
        return -torch.expm1(self.a * scores.logp).sum() / self.a


@dataclass(frozen=True)
class Threshold(TokenWeighted):
    """- 1[sg(p) >= tau] log p. ProFit, arXiv 2601.09195, tau 0.1; arXiv 2510.00526 has 0.2.

    Weakness: it never learns a token that the base model does not already expect.
    """

    name = "threshold"
    tau: float = 0.1

    def __post_init__(self) -> None:
        check_number(
            self, "tau", lambda tau: 0 < tau < 1, "must lie between 0 and 1 (0 is the objective 'sft')"
        )

    def token_weight(self, logp: Tensor) -> Tensor:
        return (logp.detach() >= log(self.tau)).to(logp.dtype)


@dataclass(frozen=True)
class Asft(Weighted):
    """- sg(p) log p + lam * KL(base || model). ASFT, arXiv 2509.23753; lam 0.03 to 0.1.

    Costs one more pass of the backbone with the adapter off. Weakness: it stays close to the base even
    where it should not.
    """

    name = "asft"
    needs = frozenset({"reference_kl"})
    lam: float = 0.05

    def __post_init__(self) -> None:
        check_number(self, "lam", lambda lam: lam > 0, "must be positive (0 is the objective 'dft')")

    def weight(self, scores: TokenScores) -> Tensor:
        return scores.logp.detach().exp()

    def __call__(self, scores: TokenScores) -> Tensor:
        return super().__call__(scores) + self.lam * scores.need("reference_kl").sum()


class Prift(Weighted):
    """- sg(p_base) log p, p_base under the frozen base. PriFT-prob, arXiv 2606.09396.

    A training run computes p_base once per token and keeps it. Weakness: a token that the base finds
    improbable never gains weight, however well the model has learned it.
    """

    name = "prift"
    needs = frozenset({"reference_logp"})

    def weight(self, scores: TokenScores) -> Tensor:
        return scores.need("reference_logp").exp()


@dataclass(frozen=True)
class Gift(Objective):
    """- (1 - k) log p + k KL(base || model), k = 1 / (1 + (e^beta - 1) p_base). GIFT, arXiv 2601.09233.

    Up to a constant this is the paper's cross-entropy to softmax(log P_base + beta at the target): that
    distribution is a mixture of the base, of share k, and the target token.

    Costs one more pass of the backbone with the adapter off. Weakness: at the published beta it is SFT
    except for tokens with p_base below about e^-beta, which it leaves to the base.
    """

    name = "gift"
    needs = frozenset({"reference_logp", "reference_kl"})
    beta: float = 20.0

    def __post_init__(self) -> None:
        check_number(self, "beta", lambda beta: 0 < beta <= 80, "must lie in (0, 80], or exp(beta) overflows")

    def __call__(self, scores: TokenScores) -> Tensor:
        base_M = scores.need("reference_logp")
        odds_M = base_M + self.beta + log(-expm1(-self.beta))  # log((e^beta - 1) p_base)
        loss_M = -torch.sigmoid(odds_M) * scores.logp + torch.sigmoid(-odds_M) * scores.need("reference_kl")
        return loss_M.sum()


@dataclass(frozen=True)
class Psft(Objective):
    """- min(p / p_old, 1 + clip): PPO's clipped objective with advantage 1. PSFT, arXiv 2508.17784.

    clip 0.28 and batches of eight steps, with p_old from the start of each, are the official script's. Here
    p_old is the base for the whole run. Weakness: a token stops learning once it is (1 + clip) times as
    probable as under the base, so what the base finds improbable stays so.
    """

    name = "psft"
    needs = frozenset({"reference_logp"})
    clip: float = 0.28

    def __post_init__(self) -> None:
        check_number(self, "clip", lambda clip: clip > 0, "must be positive")

    def __call__(self, scores: TokenScores) -> Tensor:
        log_ratio_M = scores.logp - scores.need("reference_logp")
        return -log_ratio_M.clamp_max(log1p(self.clip)).exp().sum()  # clamped before exp can overflow


@dataclass(frozen=True)
class TargetSft(Objective):
    """- sg(p) log p + sg(1 - p) KL(q || model), q proportional to model^(1 - eta) teacher^eta, detached.

    Target-SFT, arXiv 2606.11189: up to a constant, cross-entropy to p at the target and 1 - p spread as q.
    eta 0 is DFT; 0.5 is ours. Under one linear head, q is the distribution at the hidden state
    (1 - eta) h + eta h_teacher, so the reference is scored there and no [M, V] tensor exists.

    Costs one more pass of the backbone, with the teacher's adapter, and of the loss. Weakness: on a token
    that the model finds improbable it follows the teacher alone, right or wrong.
    """

    name = "target-sft"
    needs = frozenset({"reference_kl"})
    eta: float = 0.5

    def __post_init__(self) -> None:
        check_number(self, "eta", lambda eta: 0 < eta <= 1, "must lie in (0, 1] (0 is the objective 'dft')")

    def toward(self, hidden: Tensor, teacher: Tensor) -> Tensor:  # type: ignore[override]
        """See Objective; both [..., D]."""
        return torch.lerp(hidden.detach().float(), teacher.float(), self.eta).to(hidden.dtype)

    def __call__(self, scores: TokenScores) -> Tensor:
        logp_M = scores.logp.detach()
        kl_M = scores.need("reference_kl")
        return (-torch.expm1(logp_M) * kl_M - logp_M.exp() * scores.logp).sum()


class Cadft(Weighted):
    """- sg(p * exp(-max(0, z))) log p, z the standard score of the example's mean NLL in its optimizer step.

    CADFT, arXiv 2606.11206: examples that are harder than the step's average count less.
    Costs one more forward pass over the step, without gradients. Scores without the signal are treated as the
    whole step. With a single example per step it is plain DFT.
    """

    name = "cadft"
    needs = frozenset({"sequence"})
    signals = frozenset({"difficulty"})

    def step_signals(self, nll_E: Tensor) -> dict[str, Tensor]:
        """Standard scores; they go to zero where the examples differ by less than SAME_NLL."""
        off_E = nll_E - nll_E.mean()
        return {"difficulty": off_E / off_E.square().mean().sqrt().clamp_min(SAME_NLL)}

    def weight(self, scores: TokenScores) -> Tensor:
        logp_M = scores.logp.detach()
        z_M = scores.signals.get("difficulty")
        if z_M is None:
            sequences = Sequences(scores)
            z_M = self.step_signals(-sequences.mean_E(logp_M))["difficulty"][sequences.of_M]
        return logp_M.exp() * (-z_M.clamp_min(0)).exp()


class Eaft(Weighted):
    """- sg(H_20 / 3) log p, H_20 the entropy of the 20 most probable tokens (3 is about ln 20).

    EAFT, arXiv 2601.02151: tokens that the model is sure about are left alone.
    It keeps SFT's score and forgets less. Weakness: it does not sharpen, since confident and correct
    tokens get no weight either.
    """

    name = "eaft"
    needs = frozenset({"top_k_entropy"})

    def weight(self, scores: TokenScores) -> Tensor:
        return scores.need("top_k_entropy") / 3


class Deft(Objective):
    """(1 - p^a) / a with a = sg(sum_v P_v^2) of each token.

    DEFT, arXiv 2602.11424: SFT where the model is uncertain, DFT where it is sure.
    Weakness: that of DFT, on tokens where the model is confident and wrong.
    """

    name = "deft"
    needs = frozenset({"sum_p_squared"})

    def __call__(self, scores: TokenScores) -> Tensor:
        a_M = scores.need("sum_p_squared").detach()
        return -(torch.expm1(a_M * scores.logp) / a_M).sum()


@dataclass(frozen=True)
class InfoSft(TokenWeighted):
    """- sg(p * max(0, 1 - logit(p) / logit(ceiling))) log p, where logit(p) = log(p / (1 - p)).

    InfoSFT, arXiv 2605.14967: weights tokens that are neither known nor hopeless. The paper gives
    p * (C - logit(p)) up to a constant factor, with C = logit(ceiling); the factor 1 / C is from the official
    code.
    Tokens above the ceiling get no weight.
    """

    name = "infosft"
    ceiling: float = 0.93

    def __post_init__(self) -> None:
        check_number(self, "ceiling", lambda c: 0.5 < c < 1, "must lie between 0.5 and 1")

    def token_weight(self, logp: Tensor) -> Tensor:
        logp = logp.detach()
        logit = logp - torch.log(-torch.expm1(logp))
        return logp.exp() * (1 - logit / log(self.ceiling / (1 - self.ceiling))).clamp_min(0)


class ChordPhi(TokenWeighted):
    """- sg(p (1 - p)) log p. The phi of CHORD, arXiv 2508.11408: tokens the model is undecided about.

    Designed to be mixed with RL; alone it learns slowly (the weight is at most 1/4).
    """

    name = "chord-phi"

    def token_weight(self, logp: Tensor) -> Tensor:
        return -logp.detach().exp() * torch.expm1(logp.detach())


@dataclass(frozen=True)
class Focal(Objective):
    """- (1 - p)^gamma log p, with its full gradient. Focal loss, arXiv 1708.02002.

    The opposite of DFT, kept for contrast: it focuses on the improbable tokens that DFT leaves alone.
    """

    name = "focal"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_number(self, "gamma", lambda g: g > 0, "must be positive (0 is the objective 'sft')")

    def token_weight(self, logp: Tensor) -> Tensor:
        logp = logp.detach()
        q = _complement(logp)
        return q**self.gamma - self.gamma * logp * logp.exp() * q ** (self.gamma - 1)

    def __call__(self, scores: TokenScores) -> Tensor:
        return -(_complement(scores.logp) ** self.gamma * scores.logp).sum()


@dataclass(frozen=True)
class Knee(TokenWeighted):
    """- sg(min(1, p / tau)) log p: SFT down to p = tau, DFT's slope below. From this kit's lab.

    DFT does two things at once: it mutes the least probable tokens, and it learns half-known ones more slowly
    than SFT. Only the first protects against wrong labels. This keeps SFT's full weight above tau, and unlike
    `threshold` a token below tau still learns, the more the closer it is. tau -> 0 is SFT.

    Weakness: a token that the base finds improbable starves as in DFT; its weight is 1 / tau times as large.
    """

    name = "knee"
    tau: float = 0.3

    def __post_init__(self) -> None:
        check_number(
            self, "tau", lambda tau: 0 < tau < 1, "must lie between 0 and 1 (0 is 'sft', 1 is 'dft')"
        )

    def token_weight(self, logp: Tensor) -> Tensor:
        return (logp.detach().exp() / self.tau).clamp_max(1)


class Relative(Weighted):
    """- sg(min(1, p e^H)) log p, H the entropy of the predicted distribution. From this kit's lab.

    e^-H is the probability of a typical token of that distribution. A target as probable as that is no
    surprise, even at p = 0.1: the model does not know (a new fact: ten digits, all alike), and SFT's weight
    is right. A target far below it contradicts a model that is sure (a wrong label), and DFT's caution is
    right. DFT itself cannot tell the two apart, since it looks at p alone.

    Weakness: the base may be sure and wrong. A foreign format is such a case: its tokens starve as in DFT.
    """

    name = "relative"

    def weight(self, scores: TokenScores) -> Tensor:
        return (scores.logp.detach() + scores.entropy.detach()).clamp_max(0).exp()


@dataclass(frozen=True)
class Custom(Objective):
    """Any function of the scores.

    The function may have the attributes `needs`, `signals`, `step_signals` and `divided_by` of an objective.
    """

    function: Callable[[TokenScores], Tensor]

    @property
    def name(self) -> str:  # type: ignore[override]
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(getattr(self.function, "needs", ()))

    @property
    def divided_by(self) -> str:  # type: ignore[override]
        return getattr(self.function, "divided_by", "tokens")

    @property
    def signals(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(getattr(self.function, "signals", ()))

    @property
    def step_signals(self) -> Callable[..., dict[str, Tensor]] | None:  # type: ignore[override]
        return getattr(self.function, "step_signals", None)

    def __call__(self, scores: TokenScores) -> Tensor:
        loss = self.function(scores)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError(f"objective: {self.name} must return a scalar tensor, a sum over tokens")
        return loss


_REGISTRY: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (
        Sft, Dft, DftSentence, DftGeometric, IwSft, IwSftToken, Power, Threshold, Asft, Prift, Gift, Psft,
        TargetSft, Cadft, Eaft, Deft, InfoSft, ChordPhi, Focal, Knee, Relative,
    )
}  # fmt: skip


def register(*kinds: type[Objective]) -> None:
    """Make objectives known by their names."""
    _REGISTRY.update({kind.name: kind for kind in kinds})


def objective_names() -> list[str]:
    """The names `objective` knows."""
    return list(_REGISTRY)


def objective(name: str | Callable[[TokenScores], Tensor], **numbers: Any) -> Objective:
    """An objective by name with its own numbers, or any function of the scores.

    Raises ObjectiveError naming the field: unknown objective, unknown number, or a number out of range.
    """
    if isinstance(name, Objective) and not numbers:
        return name
    if not isinstance(name, str):
        if numbers or not callable(name):
            raise ObjectiveError(
                "objective.name: must be a name, or a function of the scores without numbers"
            )
        return Custom(name)
    if name not in _REGISTRY:
        near = _did_you_mean(name, _REGISTRY) or f"; known: {', '.join(_REGISTRY)}"
        raise ObjectiveError(f"objective.name: there is no objective {name!r}{near}")
    kind = _REGISTRY[name]
    known = [field.name for field in fields(kind)]
    for key, value in numbers.items():
        if key not in known:
            owners = [other for other, k in _REGISTRY.items() if key in (f.name for f in fields(k))]
            does = "does" if len(owners) == 1 else "do"
            hint = _did_you_mean(key, known) or (f" ({', '.join(owners)} {does})" if owners else "")
            raise ObjectiveError(f"objective.{key}: {name!r} has no such number{hint}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise ObjectiveError(f"objective.{key}: must be a finite number, got {value!r}")
    return kind(**numbers)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def gradient_weights(wanted: Objective, scores: TokenScores) -> Tensor:
    """-d loss / d logp of each token, detached [M]: 1 for SFT. A KL term is not included."""
    logp_M = scores.logp.detach().requires_grad_()
    with torch.enable_grad():
        kl = None if scores.reference_kl is None else scores.reference_kl.detach()
        loss = wanted(scores.replace(logp=logp_M, reference_kl=kl))
    return -torch.autograd.grad(loss, logp_M)[0]


def starves(wanted: Objective, probability: float | Tensor) -> bool:
    """Whether tokens of these probabilities have almost no weight on average, so that they are not learned.

    False where the weight does not depend on the token's own probability alone. A token above 0.5 is known
    already, so an objective that leaves it alone does not starve it.
    """
    weight = wanted.token_weight
    if weight is None:
        return False
    logp = torch.as_tensor(probability).clamp_min(1e-30).log()
    return float(weight(logp).maximum(weight(logp.clamp_max(log(0.5)))).mean()) < STARVED


class Sequences:
    """Sums over the tokens of each sequence, E of them."""

    def __init__(self, scores: TokenScores):
        ids_E, self.of_M = scores.need("sequence").unique(return_inverse=True)
        self.count_E = torch.bincount(self.of_M, minlength=len(ids_E))

    def sum_E(self, values_M: Tensor) -> Tensor:
        return values_M.new_zeros(len(self.count_E)).index_add_(0, self.of_M, values_M)

    def mean_E(self, values_M: Tensor) -> Tensor:
        return self.sum_E(values_M) / self.count_E

    def sum(self, values_M: Tensor) -> Tensor:
        """Each token's sequence sum, [M]."""
        return self.sum_E(values_M)[self.of_M]

    def mean(self, values_M: Tensor) -> Tensor:
        """Each token's sequence mean, [M]."""
        return self.mean_E(values_M)[self.of_M]


def _complement(logp: Tensor) -> Tensor:
    """1 - p without cancellation, kept above zero: a fractional power has no derivative there."""
    return (-torch.expm1(logp)).clamp_min(torch.finfo(logp.dtype).tiny)


def check_number(value: Objective, field: str, fits: Callable[[float], bool], remedy: str) -> None:
    number = getattr(value, field)
    if not fits(number):
        raise ObjectiveError(f"objective.{field}: {remedy}, got {number}")


def _check_clamp(value: IwSft | IwSftToken) -> None:
    check_number(value, "low", lambda low: low >= 0, "must not be negative")
    check_number(value, "high", lambda high: high > value.low, f"must be larger than low = {value.low}")
