"""Objectives that learn from judged answers: preference pairs (`dpo`) and rollouts (`grpo` and others).

They are functions of the same `TokenScores` as the others. What they read besides logp are signals of the
examples:

    preference, group     +1 for the chosen answer, -1 for the rejected one; its pair, by place in the step
    old_logp              per token: log p under the policy that wrote the answer; without it, the step is on
                          policy and the ratio is exactly 1
    advantage             how much better than expected the answer is, or the answer from this token on
    value                 per token: the value head's estimate of the reward, differentiable
    old_value, return     per token: that estimate when the answer was written, and what it is trained towards
    correct, correct_share    1 for a correct answer; the share of correct ones among those to its prompt

`rollout_signals` computes them from the rewards of a whole rollout, before it is split into steps. All of it
is float32.

Shapes (docs/shapes.md): M supervised tokens, W of them in wrong answers; E answers, T tokens of one; P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .objectives import Objective, Sequences, check_number, register
from .token_logps import TokenScores

SAME_REWARD = 1e-4  # added to the standard deviation of a group's rewards, as in TRL

Signals = Mapping[str, Sequence[float | Sequence[float]]]
"""Name -> one value per answer: a number, or a number per token."""


@dataclass(frozen=True)
class Dpo(Objective):
    """- log sigmoid(beta (m+ - m-)), m the log-ratio of an answer to the base. DPO, arXiv 2305.18290.

    `length` 1 divides m by the answer's tokens (0 sums over them). `ipo` 1 is the squared loss
    (m+ - m- - 1 / (2 beta))^2 of IPO, arXiv 2310.12036, whose authors use it with `length` 1; values between
    mix the two. Weakness: it can lower the probability of both answers, as long as the rejected one falls
    faster.
    """

    name = "dpo"
    learns_from = "pairs"
    least_samples = 2
    divided_by = "groups"
    needs = frozenset({"sequence", "reference_logp"})
    signals = frozenset({"preference", "group"})
    beta: float = 0.1
    length: float = 0.0
    ipo: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "beta", lambda beta: beta > 0, "must be positive")
        for share in ("length", "ipo"):
            check_number(self, share, lambda x: 0 <= x <= 1, "must lie between 0 and 1")

    def __call__(self, scores: TokenScores) -> Tensor:
        log_ratio_M = scores.logp - scores.need("reference_logp")
        sequences = Sequences(scores)
        count_M = sequences.count_E[sequences.of_M].to(log_ratio_M.dtype)
        share_M = scores.signals["preference"] * log_ratio_M / count_M**self.length
        pairs, of_M = scores.signals["group"].unique(return_inverse=True)
        margin_P = share_M.new_zeros(len(pairs)).index_add(0, of_M, share_M)
        sigmoid, squared = softplus(-self.beta * margin_P), (margin_P - 1 / (2 * self.beta)).square()
        return ((1 - self.ipo) * sigmoid + self.ipo * squared).sum()


class OnRollouts(Objective):
    """What the objectives on rollouts share: they state which signals the rewards of a rollout become."""

    learns_from = "rollouts"

    def rollout_signals(
        self, reward_E: Tensor, prompt_E: Tensor, value_ET: Sequence[Tensor] | None = None
    ) -> Signals:
        """Signals of all answers of a rollout, from their rewards and the prompts that they answer.

        prompt_E numbers the prompts from 0. value_ET: the value head's estimates, for objectives whose
        signals include `value`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class _Clipped(OnRollouts):
    """A policy gradient with a clipped ratio, and a penalty of `kl` times the KL to the base."""

    signals = frozenset({"advantage"})
    clip: float = 0.2
    kl: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "clip", lambda clip: clip > 0, "must be positive")
        check_number(self, "kl", lambda kl: kl >= 0, "must not be negative")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"sequence", *(["reference_logp"] if self.kl else [])})

    def policy_loss(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """- min(r A, clip(r, 1 - clip, 1 + clip) A), of tokens or of sequences."""
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return -torch.minimum(ratio * advantage, clipped * advantage)

    def kl_M(self, scores: TokenScores) -> Tensor | float:
        """kl * (e^d - d - 1), d = log p_ref - log p: the estimator of low variance, never negative."""
        if not self.kl:
            return 0.0
        d_M = scores.need("reference_logp") - scores.logp
        return self.kl * (torch.expm1(d_M) - d_M)


class Grpo(_Clipped):
    """- mean_t min(r_t A, clip(r_t) A), A = (R - mean R) / (std R + 1e-4) in its group; mean over answers.

    GRPO, arXiv 2402.03300, r_t = p / p_old; `kl` adds the KL to the base. A group of equal rewards gives no
    gradient. Weakness: the mean over the tokens of each answer favours short correct answers and long wrong
    ones.
    """

    name = "grpo"
    divided_by = "sequences"
    least_samples = 2

    def rollout_signals(
        self, reward_E: Tensor, prompt_E: Tensor, value_ET: Sequence[Tensor] | None = None
    ) -> Signals:
        off_E, count_E = _centred(reward_E, prompt_E)
        variance_E = _group_sum(off_E.square(), prompt_E) / (count_E - 1).clamp_min(1)
        return {"advantage": (off_E / (variance_E.sqrt() + SAME_REWARD)).tolist()}

    def __call__(self, scores: TokenScores) -> Tensor:
        loss_M = self.policy_loss(log_ratio(scores), scores.signals["advantage"])
        return Sequences(scores).mean_E(loss_M + self.kl_M(scores)).sum()


class Rloo(_Clipped):
    """- min(r A, clip(r) A), A = R - mean R of the other answers, r the ratio of whole answers; their mean.

    RLOO, arXiv 2402.14740: the answer is one action, so its ratio is the product over its tokens. `kl` adds
    the KL to the base, as a mean over tokens. A group of equal rewards gives no gradient.
    Weakness: variance, from ratios of long answers once a rollout serves several steps.
    """

    name = "rloo"
    divided_by = "sequences"
    least_samples = 2

    def rollout_signals(
        self, reward_E: Tensor, prompt_E: Tensor, value_ET: Sequence[Tensor] | None = None
    ) -> Signals:
        off_E, count_E = _centred(reward_E, prompt_E)
        return {"advantage": (off_E * count_E / (count_E - 1).clamp_min(1)).tolist()}

    def __call__(self, scores: TokenScores) -> Tensor:
        sequences = Sequences(scores)
        advantage_E = sequences.mean_E(scores.signals["advantage"])
        loss_E = self.policy_loss(sequences.sum_E(log_ratio(scores)), advantage_E)
        kl_M = self.kl_M(scores)
        return loss_E.sum() + (sequences.mean_E(kl_M).sum() if isinstance(kl_M, Tensor) else 0)


@dataclass(frozen=True)
class Ppo(_Clipped):
    """- min(r_t A_t, clip(r_t) A_t) + value loss; A_t from GAE with a value head. PPO, arXiv 1707.06347.

    The reward comes at the last token. Advantages (`gamma`, `lam`: arXiv 1506.02438) are standardised over
    the rollout. The value head is linear, float32, on the detached last hidden state; it
    learns with `value_rate` times the learning rate, its change clipped at `value_clip`. `kl` adds the KL to
    the base. Weakness: a linear value of a frozen direction is a rough baseline.
    """

    name = "ppo"
    signals = frozenset({"advantage", "value", "old_value", "return"})
    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float = 0.2
    value_rate: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "lam"):
            check_number(self, name, lambda x: 0 <= x <= 1, "must lie between 0 and 1")
        for name in ("value_clip", "value_rate"):
            check_number(self, name, lambda x: x > 0, "must be positive")

    def rollout_signals(
        self, reward_E: Tensor, prompt_E: Tensor, value_ET: Sequence[Tensor] | None = None
    ) -> Signals:
        assert value_ET is not None
        advantage_ET = []
        for reward, value_T in zip(reward_E, value_ET, strict=True):
            reward_T = torch.zeros_like(value_T)
            reward_T[-1:] = reward
            advantage_ET.append(gae(reward_T, value_T, self.gamma, self.lam))
        every = torch.cat(advantage_ET)
        mean, std = every.mean(), every.std(correction=0)
        return {
            "advantage": [((a_T - mean) / (std + 1e-8)).tolist() for a_T in advantage_ET],
            "return": [(a_T + v_T).tolist() for a_T, v_T in zip(advantage_ET, value_ET, strict=True)],
            "old_value": [value_T.tolist() for value_T in value_ET],
        }

    def __call__(self, scores: TokenScores) -> Tensor:
        policy_M = self.policy_loss(log_ratio(scores), scores.signals["advantage"])
        value_M, old_M, return_M = (scores.signals[name] for name in ("value", "old_value", "return"))
        near_M = old_M + (value_M - old_M).clamp(-self.value_clip, self.value_clip)
        error_M = torch.maximum((value_M - return_M).square(), (near_M - return_M).square())
        return (policy_M + self.kl_M(scores) + error_M / 2).sum()


@dataclass(frozen=True)
class Nft(OnRollouts):
    """- log R_t of correct answers, - log((1 - q R_t) / (1 - q)) of wrong ones; R_t = p / p_old.

    NFT, arXiv 2505.18116, q the share of correct answers to the prompt: wrong answers train the policy
    through the implicit negative one. The second argument is kept above `floor`, and its gradient passes
    through unchanged. `balance` weighs a prompt by ((1 - q) / q)^balance: 0 is RFT where all answers are
    correct, 0.5 has the gradient of GRPO on policy. Weakness: rewards other than 0 and 1 are lost.
    """

    name = "nft"
    least_samples = 2
    signals = frozenset({"correct", "correct_share"})
    floor: float = 1.0
    balance: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "floor", lambda floor: 0 < floor <= 1, "must be above 0, at most 1")
        check_number(self, "balance", lambda balance: balance >= 0, "must not be negative")

    def rollout_signals(
        self, reward_E: Tensor, prompt_E: Tensor, value_ET: Sequence[Tensor] | None = None
    ) -> Signals:
        correct_E = (reward_E > 0).double()
        share_E = _group_sum(correct_E, prompt_E) / _group_sum(torch.ones_like(correct_E), prompt_E)
        return {"correct": correct_E.tolist(), "correct_share": share_E.tolist()}

    def __call__(self, scores: TokenScores) -> Tensor:
        log_ratio_M = log_ratio(scores)
        q_M, is_correct_M = scores.signals["correct_share"], scores.signals["correct"] > 0
        # A prompt without correct answers has no positive policy: its ratio is 1 whatever the model does.
        some_M = q_M > 0
        weight_M = torch.where(some_M, ((1 - q_M) / q_M.where(some_M, 1)) ** self.balance, 0.0)
        positive_M = -log_ratio_M[is_correct_M]
        q_W = q_M[~is_correct_M]
        implicit_W = (1 - q_W * log_ratio_M[~is_correct_M].exp()) / (1 - q_W)
        # Value -log max(x, floor), gradient -grad x / max(x, floor); x + (max(x, floor) - x) would cancel.
        floored_W = implicit_W.detach().clamp_min(self.floor)
        negative_W = -(floored_W.log() + (implicit_W - implicit_W.detach()) / floored_W)
        return (weight_M[is_correct_M] * positive_M).sum() + (weight_M[~is_correct_M] * negative_W).sum()


register(Dpo, Grpo, Rloo, Ppo, Nft)


def log_ratio(scores: TokenScores) -> Tensor:
    """log p - log p_old of each token [M]; on policy exactly 0, with the gradient of log p."""
    old_M = scores.signals.get("old_logp")
    return scores.logp - (scores.logp.detach() if old_M is None else old_M)


def gae(reward_T: Tensor, value_T: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum over l of (gamma lam)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t; V is 0 at the end.

    Generalized advantage estimation, arXiv 1506.02438, eq. 16, by its recursion from the end.
    """
    advantage_T = torch.empty_like(value_T)
    later, next_value = value_T.new_zeros(()), value_T.new_zeros(())
    for t in reversed(range(len(value_T))):
        later = reward_T[t] + gamma * next_value - value_T[t] + gamma * lam * later
        advantage_T[t], next_value = later, value_T[t]
    return advantage_T


def _group_sum(values_E: Tensor, prompt_E: Tensor) -> Tensor:
    """Each answer's sum over the answers to its prompt, [E]."""
    return values_E.new_zeros(int(prompt_E.max()) + 1).index_add_(0, prompt_E, values_E)[prompt_E]


def _centred(reward_E: Tensor, prompt_E: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards less the mean of their group, exactly 0 where all are equal, and the size of each group."""
    count_E = _group_sum(torch.ones_like(reward_E), prompt_E)
    # Relative to one of the group: the mean of equal numbers need not round to them.
    first_E = torch.full_like(reward_E, torch.inf).scatter_reduce(0, prompt_E, reward_E, "amin")[prompt_E]
    above_E = reward_E - first_E
    return above_E - _group_sum(above_E, prompt_E) / count_E, count_E
