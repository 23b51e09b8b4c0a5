"""Statistics of evaluations: scores per problem, intervals, paired tests, smallest detectable differences.

Problems are independent, the samples of one problem are not, so every interval and test below takes one score
per problem. All functions are pure functions of numpy arrays; random ones have a fixed seed.

Shapes: P problems, S samples of each, Q comparisons. `correct_PS` holds 0/1, scores lie in [0, 1].
Wrong arguments raise ValueError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import gammaln

Scores = NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES = 9999


def avg_at_n(correct_PS: ArrayLike) -> Scores:
    """Share of correct samples per problem [P]. The mean over problems is avg@N, the paper's accuracy."""
    return _correct(correct_PS).mean(1)


def pass_at_k(correct_PS: ArrayLike, k: int) -> Scores:
    """Unbiased estimate, per problem, of the chance that at least one of k samples is correct [P].

    With c of N correct: 1 - C(N-c, k) / C(N, k) (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    correct_PS = _correct(correct_PS)
    n = correct_PS.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: give a number from 1 to the number of samples, {n}")
    wrong_P = n - correct_PS.sum(1)
    enough = wrong_P >= k
    none_P = np.zeros(len(wrong_P))
    none_P[enough] = np.exp(_log_choose(wrong_P[enough], k) - _log_choose(n, k))
    return 1 - none_P


def maj_at_k(answers_PS: Sequence[Sequence[Hashable]], correct_PS: ArrayLike, k: int | None = None) -> Scores:
    """Whether the most frequent of a problem's first k answers is correct [P] (arXiv 2203.11171).

    `answers_PS` are extracted answers, in a form in which equivalent ones are equal; None (no answer found)
    does not vote. Tied answers share the score, as if one were picked at random; without votes it is 0.
    """
    correct_PS = _correct(correct_PS)
    n = correct_PS.shape[1]
    k = n if k is None else k
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: give a number from 1 to the number of samples, {n}")
    if [len(row) for row in answers_PS] != [n] * len(correct_PS):
        raise ValueError(f"answers_PS does not have the shape of correct_PS, {correct_PS.shape}")
    return np.array([_majority(a[:k], c[:k]) for a, c in zip(answers_PS, correct_PS, strict=True)])


def interval(score_P: ArrayLike, level: float = 0.95) -> Interval:
    """Interval of the mean score over problems: bootstrap, BCa (Efron 1987), seed 0.

    If all P scores are equal, resampling gives no width, although an unseen problem could differ. The share
    of such problems is then at most u = 1 - ((1 - level) / 2) ** (1 / P) (Clopper and Pearson 1934), and they
    score 0 or 1 at worst. At 0 % and 100 % this is the Clopper-Pearson interval.
    """
    return _bootstrap(_scores(score_P), level, bounds=(0.0, 1.0))


def paired_interval(a_P: ArrayLike, b_P: ArrayLike, level: float = 0.95) -> Interval:
    """As `interval`, for mean(b - a) over the same problems, whose differences lie in [-1, 1]."""
    return _bootstrap(_paired(a_P, b_P), level, bounds=(-1.0, 1.0))


def unbounded_interval(value_P: ArrayLike, level: float = 0.95) -> Interval:
    """Interval of the mean of values that may be any number, such as NLLs: percentile bootstrap, seed 0.

    Token metrics use it. It gives the intervals of earlier reports, up to rounding, which BCa would not.
    Equal values have an interval of width 0.
    """
    value_P = np.asarray(value_P, dtype=float)
    if value_P.ndim != 1 or value_P.size == 0:
        raise ValueError(f"values have shape {value_P.shape}: give a list of at least one")
    return _bootstrap(value_P, level, method="percentile", resamples=2000)


def sign_flip_test(a_P: ArrayLike, b_P: ArrayLike) -> float:
    """Two-sided p-value of mean(b - a), if the sign of each problem's difference were random.

    Exact over all sign patterns if there are at most 9999 (up to 13 problems that differ). Otherwise
    estimated from 9999 random patterns with seed 0, where the smallest possible value is 0.0002. Problems
    without a difference do not matter and are left out; if none differ, the p-value is 1.
    """
    difference_P = _paired(a_P, b_P)
    difference_P = difference_P[difference_P != 0]
    if len(difference_P) < 2:  # with one, both sign patterns are as extreme as the data
        return 1.0
    result = stats.permutation_test(
        (difference_P,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",  # for a single sample: flips signs
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p_Q: ArrayLike) -> Scores:
    """p-values adjusted for M comparisons (Holm 1979), which controls the family-wise error rate."""
    p_Q = np.asarray(p_Q, dtype=float)
    if p_Q.ndim != 1 or not ((p_Q >= 0) & (p_Q <= 1)).all():
        raise ValueError("p_Q: give a list of numbers in [0, 1]")
    order = np.argsort(p_Q, kind="stable")
    stepped = p_Q[order] * np.arange(len(p_Q), 0, -1)
    adjusted_Q = np.empty_like(p_Q)
    adjusted_Q[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted_Q


def smallest_detectable(a_P: ArrayLike, b_P: ArrayLike, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true difference of means that a paired test on such data detects with this `power`.

    (z(1 - (1 - level) / 2) + z(power)) * s / sqrt(P), with s the standard deviation of b - a over problems:
    2.8 standard errors by default. It serves to plan how many problems to ask. If all differences are equal,
    s is 0 and the longer half of `paired_interval` is used instead.
    """
    difference_P = _paired(a_P, b_P)
    if np.ptp(difference_P) == 0:
        low, high = paired_interval(a_P, b_P, level)
        return float(max(high - difference_P[0], difference_P[0] - low))
    z = stats.norm.ppf(1 - (1 - level) / 2) + stats.norm.ppf(power)
    return float(z * difference_P.std(ddof=1) / np.sqrt(len(difference_P)))


@dataclass(frozen=True)
class Comparison:
    """b - a for two runs on the same problems, with interval, p-value and smallest detectable difference."""

    difference: float
    ci95: Interval
    p_value: float
    smallest_detectable: float

    @property
    def noise(self) -> bool:
        """Whether the interval contains zero."""
        return self.ci95[0] <= 0 <= self.ci95[1]


def compare(a_P: ArrayLike, b_P: ArrayLike) -> Comparison:
    """Compare two runs by their scores on the same problems in the same order."""
    return Comparison(
        difference=float(_paired(a_P, b_P).mean()),
        ci95=paired_interval(a_P, b_P),
        p_value=sign_flip_test(a_P, b_P),
        smallest_detectable=smallest_detectable(a_P, b_P),
    )


def _bootstrap(
    value_P: Scores,
    level: float,
    bounds: Interval | None = None,
    method: Literal["BCa", "percentile"] = "BCa",
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of the mean. `bounds`, the worst and best possible values, serve values that are all equal."""
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: give a number between 0 and 1")
    if np.ptp(value_P) == 0:
        value = float(value_P[0])
        if bounds is None:
            return value, value
        low, high = bounds
        share = 1 - ((1 - level) / 2) ** (1 / len(value_P))
        return (1 - share) * value + share * low, (1 - share) * value + share * high
    result = stats.bootstrap(
        (value_P,),
        np.mean,
        confidence_level=level,
        method=method,
        n_resamples=resamples,
        batch=1000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(result.low), float(result.high)


def _majority(answers: Sequence[Hashable], correct: Scores) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    right = {answer for answer, is_right in zip(answers, correct, strict=True) if is_right}
    top = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(answer in right for answer in top) / len(top)


def _log_choose(n: ArrayLike, k: int) -> Scores:
    return gammaln(np.add(n, 1)) - gammaln(k + 1) - gammaln(np.subtract(n, k) + 1)


def _correct(correct_PS: ArrayLike) -> Scores:
    correct_PS = np.asarray(correct_PS, dtype=float)
    if correct_PS.ndim != 2 or correct_PS.size == 0:
        raise ValueError(
            f"correct_PS has shape {correct_PS.shape}: give [problems, samples], at least one of each"
        )
    if not np.isin(correct_PS, (0, 1)).all():
        raise ValueError("correct_PS holds values other than 0 and 1")
    return correct_PS


def _scores(score_P: ArrayLike) -> Scores:
    score_P = np.asarray(score_P, dtype=float)
    if score_P.ndim != 1 or score_P.size == 0:
        raise ValueError(f"scores have shape {score_P.shape}: give one per problem, at least one")
    if not ((score_P >= 0) & (score_P <= 1)).all():
        raise ValueError("scores lie outside [0, 1]")
    return score_P


def _paired(a_P: ArrayLike, b_P: ArrayLike) -> Scores:
    a_P, b_P = _scores(a_P), _scores(b_P)
    if a_P.shape != b_P.shape:
        raise ValueError(f"{len(a_P)} and {len(b_P)} problems: give scores on the same ones")
    return b_P - a_P
