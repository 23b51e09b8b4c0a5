"""Statistics against enumeration, scipy and simulated truth."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from scipy import stats

from dft_lora.evaluation.statistics import (
    avg_at_n,
    compare,
    holm,
    interval,
    maj_at_k,
    paired_interval,
    pass_at_k,
    sign_flip_test,
    smallest_detectable,
    unbounded_interval,
)


def random_correct(problems: int, samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.binomial(1, rng.beta(0.8, 0.8, (problems, 1)), (problems, samples))


def test_avg_is_the_share_of_correct_samples():
    assert avg_at_n([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).tolist() == [0.5, 0, 0.75]


@pytest.mark.parametrize("k", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets_of_k(k):
    correct = random_correct(40, 7)
    subsets = [correct[:, list(columns)].any(1) for columns in combinations(range(7), k)]
    assert pass_at_k(correct, k) == pytest.approx(np.mean(subsets, 0), abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples():
    correct = np.zeros((3, 400))
    correct[1, :1] = correct[2, :7] = 1
    assert pass_at_k(correct, 100) == pytest.approx(
        [0, 1 - comb(399, 100) / comb(400, 100), 1 - comb(393, 100) / comb(400, 100)]
    )
    assert pass_at_k(correct, 1) == pytest.approx(avg_at_n(correct), abs=1e-12)
    assert pass_at_k(correct, 400) == pytest.approx([0, 1, 1])


def test_majority_votes():
    answers = [
        ["3", "3", "4", "5"],  # right answer wins
        ["4", "4", "3", "5"],  # wrong answer wins
        ["3", "4", "3", "4"],  # a tie is a coin
        [None, None, None, "3"],  # nothing found has no vote
        [None] * 4,
    ]
    correct = [[a == "3" for a in row] for row in answers]
    assert maj_at_k(answers, correct).tolist() == [1, 0, 0.5, 1, 0]
    assert maj_at_k(answers, correct, k=1).tolist() == [1, 0, 1, 0, 0]
    assert maj_at_k(answers, correct, k=3).tolist() == [1, 0, 1, 0, 0]


def test_majority_of_one_sample_is_that_sample():
    correct = random_correct(50, 1)
    answers = [["right" if c else "wrong" for c in row] for row in correct]
    assert maj_at_k(answers, correct).tolist() == avg_at_n(correct).tolist()


@pytest.mark.parametrize("count", [2, 7, 128, 300])
def test_an_unbounded_interval_is_the_plain_percentile_bootstrap(count):
    """Recorded reports hold intervals that were computed by the two lines below."""
    values = np.random.default_rng(1).gamma(2.0, 0.5, count)
    drawn = np.random.default_rng(0).integers(count, size=(2000, count))
    expected = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    assert unbounded_interval(values) == pytest.approx(expected, rel=1e-13)


def test_equal_unbounded_values_have_an_interval_without_width():
    assert unbounded_interval([1.5]) == unbounded_interval([1.5, 1.5]) == (1.5, 1.5)
    for values in ([], [[1.0]]):
        with pytest.raises(ValueError, match="shape"):
            unbounded_interval(values)


def test_interval_is_scipys_bca_bootstrap_and_repeats_exactly():
    scores = avg_at_n(random_correct(80, 16))
    theirs = stats.bootstrap((scores,), np.mean, rng=np.random.default_rng(0), batch=1000).confidence_interval
    assert interval(scores) == interval(scores) == (theirs.low, theirs.high)
    assert interval(scores)[0] < scores.mean() < interval(scores)[1]


def test_intervals_narrow_with_problems_and_widen_with_the_level():
    def width(scores, level=0.95):
        low, high = interval(scores, level)
        return high - low

    scores = avg_at_n(random_correct(50, 4))
    assert width(scores, 0.5) < width(scores, 0.9) < width(scores, 0.99)
    assert width(np.tile(scores, 16)) == pytest.approx(width(scores) / 4, rel=0.1)


@pytest.mark.parametrize("problems", [1, 5, 30, 500])
def test_interval_at_0_and_100_percent_is_clopper_pearson(problems):
    for value in (0, 1):
        exact = stats.binomtest(value * problems, problems).proportion_ci(0.95, method="exact")
        assert interval(np.full(problems, value)) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_interval_of_one_value_in_between_reaches_to_both_sides():
    low, high = interval(np.full(30, 0.5))
    assert 0 < low < 0.5 < high < 1
    assert 0.5 - low == pytest.approx(high - 0.5)


def test_paired_interval_depends_on_the_differences_alone_and_turns_with_the_sign():
    a, b = (avg_at_n(random_correct(60, 8, seed)) for seed in (1, 2))
    low, high = paired_interval(a, b)
    assert low < (b - a).mean() < high
    assert paired_interval(b, a) == pytest.approx((-high, -low), abs=0.01)
    assert paired_interval((a - b + 1) / 2, np.full(60, 0.5)) == pytest.approx((low / 2, high / 2), abs=1e-12)


def test_equal_runs_are_no_evidence_and_not_a_certainty():
    scores = avg_at_n(random_correct(100, 4))
    result = compare(scores, scores)
    low, high = result.ci95
    assert result.difference == 0 and result.p_value == 1 and result.noise
    assert low == -high and 0.01 < high < 0.05
    assert result.smallest_detectable == high


@pytest.mark.parametrize("problems", [2, 5, 10])
def test_sign_flips_are_exact_for_few_problems(problems):
    rng = np.random.default_rng(problems)
    a, b = rng.random(problems), rng.random(problems)
    means = [np.mean((b - a) * signs) for signs in product((-1, 1), repeat=problems)]
    exact = np.mean(np.abs(means) >= abs(np.mean(b - a)) - 1e-12)
    assert sign_flip_test(a, b) == pytest.approx(exact, abs=1e-12)


def test_sign_flips_of_one_size_are_the_sign_test():
    """17 of 20 problems that differ go up: the binomial test; 30 that do not differ change nothing."""
    a, b = np.zeros(50), np.zeros(50)
    a[:3], b[3:20] = 1, 1
    assert sign_flip_test(a, b) == pytest.approx(stats.binomtest(17, 20).pvalue, abs=0.002)
    assert sign_flip_test(b, a) == pytest.approx(sign_flip_test(a, b), abs=0.002)
    assert sign_flip_test(a[:20], b[:20]) == sign_flip_test(a, b)


def test_sign_flip_test_on_many_problems_is_near_the_t_test():
    rng = np.random.default_rng(0)
    a = rng.random(400) * 0.8
    b = a + rng.normal(0.01, 0.1, 400).clip(-a, 0.2)
    assert sign_flip_test(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.01)
    assert sign_flip_test(a, np.minimum(a + 0.1 + 0.1 * rng.random(400), 1)) == pytest.approx(2e-4)


def test_holm_by_hand_and_against_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1, 1]
    assert holm([]).tolist() == []
    p = np.random.default_rng(0).random(7) ** 3
    for alpha in (0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for step, i in enumerate(np.argsort(p)):
            if p[i] > alpha / (7 - step):
                break
            rejected.add(i)
        assert set(np.flatnonzero(holm(p) <= alpha)) == rejected


def test_smallest_detectable_difference_is_found_with_its_power():
    """Simulated: a paired t-test finds a true difference of exactly that size in 80 % of trials."""
    rng = np.random.default_rng(0)
    a, b = 0.3 + 0.1 * rng.random(200), 0.3 + 0.4 * rng.random(200)
    size = smallest_detectable(a, b)
    assert size == pytest.approx((1.959964 + 0.841621) * (b - a).std(ddof=1) / np.sqrt(200), rel=1e-6)
    trials = rng.normal(size, (b - a).std(ddof=1), (4000, 200))
    found = np.mean(stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05)
    assert found == pytest.approx(0.8, abs=0.03)
    assert smallest_detectable(a, b, power=0.9) > size
    assert smallest_detectable(np.tile(a, 4), np.tile(b, 4)) == pytest.approx(size / 2, rel=0.01)


def test_a_difference_whose_interval_contains_zero_is_noise():
    a, b = (avg_at_n(random_correct(40, 4, seed)) for seed in (5, 6))
    low, high = compare(a, b).ci95
    assert compare(a, b).noise is True and low < 0 < high
    assert compare(a, a + 0.9 * (1 - a)).noise is False
    small = compare(np.zeros(400), np.arange(400) % 60 == 0)  # 1.75 points, with p = 0.016
    assert small.noise is False and small.difference < small.smallest_detectable


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: avg_at_n([1, 0]), "shape"),
        (lambda: avg_at_n(np.zeros((0, 4))), "at least one"),
        (lambda: avg_at_n([[0.5, 1]]), "0 and 1"),
        (lambda: avg_at_n([[np.nan, 1]]), "0 and 1"),
        (lambda: pass_at_k([[0, 1]], 3), "k = 3"),
        (lambda: pass_at_k([[0, 1]], 0), "k = 0"),
        (lambda: maj_at_k([["1"]], [[1, 0]]), "answers_PS"),
        (lambda: interval([]), "at least one"),
        (lambda: interval([2.0]), "outside"),
        (lambda: interval([0.5, np.nan]), "outside"),
        (lambda: interval([0.5, 0.6], level=95), "level"),
        (lambda: compare([0.5], [0.5, 0.1]), "same ones"),
        (lambda: holm([1.2]), "p_Q"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
@pytest.mark.parametrize(("problems", "samples"), [(30, 16), (100, 16), (100, 1)])
@pytest.mark.parametrize("shape", [(0.3, 1.5), (1, 1), (4, 1)])
def test_intervals_cover_the_truth(problems, samples, shape):
    """500 simulated evaluations each: the interval holds the true mean in 95 %, give or take 3 points."""
    rng = np.random.default_rng(1)
    truth, hits = shape[0] / sum(shape), []
    for _ in range(500):
        low, high = interval(rng.binomial(samples, rng.beta(*shape, problems)) / samples)
        hits.append(low <= truth <= high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.03)


@pytest.mark.slow
def test_paired_intervals_cover_and_p_values_are_uniform_without_a_difference():
    rng = np.random.default_rng(2)
    hits, p_values = [], []
    for _ in range(500):
        skill = rng.beta(1, 1, 60)
        a, b = (rng.binomial(16, skill) / 16 for _ in range(2))
        result = compare(a, b)
        hits.append(result.ci95[0] <= 0 <= result.ci95[1])
        p_values.append(result.p_value)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.03)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
