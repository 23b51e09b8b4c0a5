"""Laws of the objectives: each equals its formula under autograd, and DFT is what its paper says it is."""

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import HEADS, Case, chunk_bytes, distance

from dft_lora.loss import (
    ObjectiveError,
    gradient_weights,
    naive_token_logps,
    objective,
    objective_names,
    token_logps,
)
from dft_lora.loss.objectives import starves

OBJECTIVES = {
    name: objective(name) for name in objective_names() if objective(name).learns_from == "solutions"
}
"""Those that learn from judged answers are in test_judged.py."""


def gradient(scores, leaves, wanted):
    return torch.autograd.grad(wanted(scores), leaves)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_plain_autograd(name, dtype):
    """Every head, chunk size and supervision; in 16 bits one chunk size, and an error of naive's order."""
    wanted = OBJECTIVES[name]
    heads = ["plain", "bias", "scale"] if "reference_kl" in wanted.needs else HEADS
    for head in heads:
        for supervised, (N, D, V) in (("all", (13, 7, 31)), ("some", (22, 9, 53)), ("none", (5, 3, 11))):
            case = Case.make(N, D, V, head, supervised).to(dtype)
            truth, leaves = case.to(torch.float64).score(naive_token_logps)
            loss, slope = wanted(truth), gradient(truth, leaves, wanted)
            naive, leaves = case.score(naive_token_logps)
            naive_error = distance(gradient(naive, leaves, wanted), slope)
            tolerance = {8: 1e-12, 4: 1e-5}.get(dtype.itemsize, 2 * naive_error + 4 * torch.finfo(dtype).eps)
            for rows in (3,) if dtype.itemsize == 2 else (1, 3, N + 1):
                scores, leaves = case.score(
                    token_logps, needs=wanted.needs, chunk_bytes=chunk_bytes(rows, V, dtype)
                )
                where = f"{head}, {supervised} of {N}, {rows} rows"
                assert distance(wanted(scores), loss) <= tolerance, where
                assert distance(gradient(scores, leaves, wanted), slope) <= tolerance, where


# Each objective against its formula, written from the logits


class Plain:
    """What the formulas are made of, from whole logits in float64: V entries of M supervised tokens."""

    def __init__(self, case, hidden):
        kept = case.targets != -100
        _, weight, bias, reference_hidden = case.tensors
        self.p_MV, self.base_MV = (
            (h[kept] @ weight.T + bias).softmax(-1) for h in (hidden, reference_hidden)
        )
        y_M1 = case.targets[kept, None]
        self.p, self.base = self.p_MV.gather(1, y_M1)[:, 0], self.base_MV.gather(1, y_M1)[:, 0]
        self.sequence = case.sequence[kept]
        self.difficulty = None

    def of_sequence(self, statistic, values_M):
        """`statistic` of all tokens of each token's sequence [M]."""
        return torch.stack([statistic(values_M[self.sequence == s]) for s in self.sequence])


def dft(x, sg, floor=0.0, end=0.0):
    last = torch.tensor(
        [i + 1 == len(x.sequence) or s != x.sequence[i + 1] for i, s in enumerate(x.sequence)]
    )
    weight = torch.where(last, x.p.clamp(min=max(floor, end)), x.p.clamp(min=floor))
    return -sg(weight) * x.p.log()


def cadft(x, sg):
    nll = torch.stack([-x.p[x.sequence == s].log().mean() for s in x.sequence.unique()])
    z = (x.of_sequence(torch.mean, -x.p.log()) - nll.mean()) / nll.std(correction=0)
    z = z if x.difficulty is None else x.difficulty
    return -sg(x.p * (-z.clamp(min=0)).exp()) * x.p.log()


def eaft(x, sg):
    top = x.p_MV.sort(descending=True).values[:, :20]
    top = top / top.sum(-1, keepdim=True)
    return -sg(-(top * top.log()).sum(-1) / 3) * x.p.log()


def deft(x, sg):
    a = sg(x.p_MV.square().sum(-1))
    return (1 - x.p**a) / a


def gift(x, sg, beta=20.0):
    """The paper's target softmax(log P_base + beta at the target); its cross-entropy, up to a constant."""
    y_M = (x.p_MV == x.p[:, None]).double().argmax(1)
    at_y_MV = torch.nn.functional.one_hot(y_M, x.p_MV.shape[1])
    target_MV = (x.base_MV.log() + beta * at_y_MV).softmax(-1)
    base_share = 1 / (1 + math.expm1(beta) * x.base)
    constant = base_share * (x.base_MV * x.base_MV.log()).sum(-1)
    return -(target_MV * x.p_MV.log()).sum(-1) + constant


def target_sft(x, sg, eta=0.5):
    """Cross-entropy to the target distribution, less its constant; q is the reference here."""
    y_M = (x.p_MV == x.p[:, None]).double().argmax(1)
    at_y_MV = torch.nn.functional.one_hot(y_M, x.p_MV.shape[1])
    p_M1 = sg(x.p)[:, None]
    target_MV = p_M1 * at_y_MV + (1 - p_M1) * x.base_MV
    constant = (1 - sg(x.p)) * (x.base_MV * x.base_MV.log()).sum(-1)
    return -(target_MV * x.p_MV.log()).sum(-1) + constant


FORMULAS = {
    "sft": lambda x, sg: -x.p.log(),
    "dft": dft,
    "dft-sentence": lambda x, sg: -sg(x.of_sequence(torch.prod, x.p)) * x.p.log(),
    "dft-geometric": lambda x, sg: -sg(x.of_sequence(lambda p: p.prod() ** (1 / len(p)), x.p)) * x.p.log(),
    "iw-sft": lambda x, sg, low=0.0, high=16.0: (
        -sg(x.of_sequence(lambda r: r.prod() ** (1 / len(r)), x.p / x.base).clamp(low, high)) * x.p.log()
    ),
    "iw-sft-token": lambda x, sg, low=0.2, high=1.8: -sg((x.p / x.base).clamp(low, high)) * x.p.log(),
    "power": lambda x, sg, a=1.0, anneal=0.0: (1 - x.p**a) / a,
    "threshold": lambda x, sg, tau=0.1: torch.where(x.p >= tau, -x.p.log(), 0.0),
    "asft": lambda x, sg, lam=0.05: (
        -sg(x.p) * x.p.log() + lam * (x.base_MV * (x.base_MV / x.p_MV).log()).sum(-1)
    ),
    "prift": lambda x, sg: -x.base * x.p.log(),
    "gift": gift,
    "psft": lambda x, sg, clip=0.28: -torch.minimum(x.p / x.base, (x.p / x.base).clamp(1 - clip, 1 + clip)),
    "target-sft": target_sft,
    "cadft": cadft,
    "eaft": eaft,
    "deft": deft,
    "infosft": lambda x, sg, ceiling=0.93: (
        -sg(x.p * (1 - torch.logit(x.p) / math.log(ceiling / (1 - ceiling))).clamp(min=0)) * x.p.log()
    ),
    "chord-phi": lambda x, sg: -sg(x.p * (1 - x.p)) * x.p.log(),
    "focal": lambda x, sg, gamma=2.0: -((1 - x.p) ** gamma) * x.p.log(),
    "knee": lambda x, sg, tau=0.3: -sg((x.p / tau).clamp(max=1)) * x.p.log(),
    "relative": lambda x, sg: -sg((x.p * (-(x.p_MV * x.p_MV.log()).sum(-1)).exp()).clamp(max=1)) * x.p.log(),
}
"""The loss of each token [M]; `sg` stops the gradient."""

NUMBERS = {
    "dft": {"floor": 0.3, "end": 0.8},
    "iw-sft": {"low": 1.1, "high": 3.0},
    "iw-sft-token": {"low": 0.6, "high": 1.5},
    "power": {"a": 0.4, "anneal": 0.3},
    "threshold": {"tau": 0.4},
    "asft": {"lam": 0.7},
    "gift": {"beta": 1.5},
    "psft": {"clip": 0.5},
    "target-sft": {"eta": 0.3},
    "infosft": {"ceiling": 0.6},
    "focal": {"gamma": 0.5},
    "knee": {"tau": 0.6},
}
REQUESTS = [(name, {}) for name in FORMULAS] + list(NUMBERS.items())


def uneven():
    """Twenty sequences of uneven length, and a reference that goes from opposed to surer than the model.

    So p and p / p_ref lie on both sides of every bound.
    """
    case = Case.make(80, 8, 53, "bias", "some", spread=4.0)
    hidden, *head, _ = case.tensors
    reference_hidden = torch.linspace(-0.5, 2, 80, dtype=torch.float64)[:, None] * hidden
    return replace(case, tensors=(hidden, *head, reference_hidden))


UNEVEN = uneven()


def by_formula(name, numbers, sg=torch.detach, difficulty=None):
    """(loss, gradient with respect to the hidden states), by plain autograd from the logits."""
    hidden = UNEVEN.tensors[0].clone().requires_grad_()
    x = Plain(UNEVEN, hidden)
    x.difficulty = difficulty
    loss = FORMULAS[name](x, sg, **numbers).sum()
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def by_objective(name, numbers, **more):
    wanted = objective(name, **numbers)
    scores, leaves = UNEVEN.score(token_logps, needs=wanted.needs, **more)
    return wanted(scores).detach(), gradient(scores, leaves, wanted)


@pytest.mark.parametrize(("name", "numbers"), REQUESTS, ids=str)
def test_value_and_gradient_are_those_of_the_formula(name, numbers):
    """With the published numbers and with others, on tokens on both sides of every bound."""
    loss, slope = by_formula(name, numbers)
    got, got_slope = by_objective(name, numbers)
    assert distance(got, loss) < 1e-12 and distance(got_slope, slope) < 1e-12


def test_every_objective_has_its_formula_and_every_number_another_value():
    assert list(FORMULAS) == list(OBJECTIVES)
    for name in FORMULAS:
        assert NUMBERS.get(name, {}).keys() == set(vars(objective(name))), name


def test_an_annealed_power_goes_from_sft_to_dft():
    """At the start it has SFT's gradient, after `anneal` of the run DFT's, and half way that of p^(a/2)."""
    wanted = objective("power", anneal=0.5)

    def slope(chosen):
        return gradient(*UNEVEN.score(token_logps), chosen)

    assert distance(slope(wanted.at(0.0)), slope(objective("sft"))) < 1e-5
    assert distance(slope(wanted.at(0.25)), slope(objective("power", a=0.5))) < 1e-12
    assert distance(slope(wanted.at(0.5)), slope(objective("dft"))) < 1e-12
    assert objective("dft").at(0.0) == objective("dft")


@pytest.mark.parametrize(
    ("request_", "starved"),
    [
        (("dft", {}), True),
        (("dft", {"floor": 0.1}), False),
        (("dft", {"end": 1}), False),
        (("sft", {}), False),
        (("threshold", {}), True),
        (("knee", {}), True),
    ],
    ids=str,
)
def test_an_improbable_token_is_starved_without_a_floor(request_, starved):
    name, numbers = request_
    assert starves(objective(name, **numbers), 1e-3) == starved
    assert starves(objective(name, **numbers), 0.0) == starved
    assert not starves(objective(name, **numbers), 0.9)


@pytest.mark.parametrize("name", objective_names())
def test_a_token_that_the_base_knows_is_not_starved(name):
    """Some objectives leave certain tokens alone: there is nothing to learn."""
    assert not starves(objective(name), 0.9997)


def test_a_steep_weight_does_not_starve_what_the_base_knows():
    assert not starves(objective("threshold", tau=0.6), 0.9997)
    assert not starves(objective("power", a=8.0), 0.9997)
    assert starves(objective("power", a=8.0), 0.3)


def test_cadft_takes_the_difficulty_of_an_example_from_its_signal():
    difficulty = torch.linspace(-1, 2, len(UNEVEN.targets), dtype=torch.float64)
    loss, slope = by_formula("cadft", {}, difficulty=difficulty[UNEVEN.targets != -100])
    got, got_slope = by_objective("cadft", {}, signals={"difficulty": difficulty})
    assert distance(got, loss) < 1e-12 and distance(got_slope, slope) < 1e-12


@pytest.mark.parametrize(("name", "numbers"), REQUESTS, ids=str)
def test_the_comparison_sees_a_missing_detach(name, numbers):
    """The same formula without sg(): the same value, another gradient, wherever the formula has an sg()."""
    loss, slope = by_formula(name, numbers)
    attached_loss, attached_slope = by_formula(name, numbers, sg=lambda weight_M: weight_M)
    assert attached_loss == loss
    has_no_weight = name in ("sft", "power", "threshold", "focal", "prift", "gift", "psft")
    assert torch.equal(attached_slope, slope) if has_no_weight else distance(attached_slope, slope) > 1e-2


def test_the_uneven_batch_meets_every_bound_on_both_sides():
    x = Plain(UNEVEN, UNEVEN.tensors[0])
    ratio = x.p / x.base
    mean_ratio = x.of_sequence(lambda r: r.log().mean().exp(), ratio)
    bounds = [(ratio, (0.2, 0.6, 1.5, 1.8)), (mean_ratio, (1.1, 3.0, 16.0)), (x.p, (0.1, 0.4, 0.6, 0.93))]
    for values, limits in bounds:
        for limit in limits:
            assert (values < limit).any() and (values > limit).any(), limit
    lengths = torch.bincount(x.sequence)
    assert len(lengths) == 20 and len(lengths.unique()) > 2


def test_relative_tells_a_new_fact_from_a_contradiction():
    """p = 0.1 has SFT's weight among ten equal digits, and about DFT's where the model is sure."""
    wanted = objective("relative")

    def weight(other):
        p_V = torch.tensor([0.1, *other], dtype=torch.float64)
        scores = token_logps(torch.ones(1, 1).double(), p_V.log()[:, None], torch.tensor([0]))
        return float(wanted.weight(scores))

    assert weight([0.1] * 9) == pytest.approx(1)
    assert weight([0.9]) == pytest.approx(0.1 * math.exp(-0.1 * math.log(0.1) - 0.9 * math.log(0.9)))


# What the paper says (arXiv 2508.05629)


def toy():
    """A toy vocabulary of uneven logits: (hidden, weight, expert token, pi, grad log pi of every token)."""
    hidden = torch.tensor([[0.9, -1.3]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[2.0, 0.1], [-1.0, 0.5], [0.3, 0.2], [0.0, -1.5], [1.0, 1.0]], dtype=torch.float64)
    every = torch.arange(5)
    scores = [token_logps(hidden, weight, token[None]) for token in every]
    pi = torch.stack([s.probability[0] for s in scores])
    slopes = torch.stack([torch.autograd.grad(s.logp.sum(), hidden)[0] for s in scores])
    return hidden, weight, pi, slopes


@pytest.mark.parametrize("expert", range(5))
def test_equation_5_sft_is_a_policy_gradient_weighted_by_one_over_pi(expert):
    """grad L_SFT = - E_{y ~ pi}[1[y = y*] / pi(y) grad log pi(y)], the expectation by enumeration."""
    hidden, weight, pi, slopes = toy()
    reward = (torch.arange(5) == expert).double()
    policy_gradient = (pi * reward / pi) @ slopes[:, 0]
    scores = token_logps(hidden, weight, torch.tensor([expert]))
    assert distance(gradient(scores, hidden, objective("sft"))[0], -policy_gradient) < 1e-12


@pytest.mark.parametrize("expert", range(5))
def test_equation_6_dft_is_the_policy_gradient_without_it(expert):
    """grad L_DFT = - E_{y ~ pi}[1[y = y*] grad log pi(y)]: a reward of one, and no weight."""
    hidden, weight, pi, slopes = toy()
    reward = (torch.arange(5) == expert).double()
    policy_gradient = (pi * reward) @ slopes[:, 0]
    scores = token_logps(hidden, weight, torch.tensor([expert]))
    assert distance(gradient(scores, hidden, objective("dft"))[0], -policy_gradient) < 1e-12


def test_the_detach_shows_in_the_gradient_only():
    """Without it the value is the same, and the gradient turns its sign for p < 1/e."""
    case = Case.make(40, 8, 20, "plain", "all")
    scores, _ = case.score(token_logps)

    def attached(s):
        return -(s.logp.exp() * s.logp).sum()

    assert distance(objective("dft")(scores), attached(scores)) < 1e-14
    assert distance(gradient_weights(objective("dft"), scores), scores.probability) < 1e-14
    wrong = gradient_weights(objective(attached), scores)
    assert torch.equal(wrong < 0, scores.probability < 1 / math.e)
    assert wrong.min() < 0 < wrong.max()
    right = gradient(*case.score(token_logps), objective("dft"))
    assert distance(gradient(*case.score(token_logps), attached), right) > 0.3


# Relations between objectives


def same(a, b, **options) -> bool:
    case = Case.make(30, 8, 40, "all", "some", **options)
    needs = a.needs | b.needs
    first, second = (gradient(*case.score(token_logps, needs=needs), wanted) for wanted in (a, b))
    return distance(first, second) < 1e-6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (objective("power", a=1.0), objective("dft")),
        (objective("power", a=1e-9), objective("sft")),
        (objective("threshold", tau=1e-12), objective("sft")),
        (objective("focal", gamma=1e-9), objective("sft")),
        (objective("iw-sft", low=1.0, high=1.0 + 1e-9), objective("sft")),
        (objective("iw-sft-token", low=1.0, high=1.0 + 1e-9), objective("sft")),
    ],
    ids=lambda value: value.name,
)
def test_limits(one, other):
    assert same(one, other)


def test_every_other_pair_differs():
    """On uneven batches no two objectives give the same gradient: none is another's copy by mistake."""
    case = Case.make(30, 8, 40, "bias", "some")
    needs = frozenset().union(*(wanted.needs for wanted in OBJECTIVES.values()))
    slopes = {name: gradient(*case.score(token_logps, needs=needs), o) for name, o in OBJECTIVES.items()}
    twins = {("dft", "power"), ("sft", "gift")}  # at beta 20, but for tokens improbable under the base
    for i, a in enumerate(slopes):
        for b in list(slopes)[i + 1 :]:
            assert (distance(slopes[a], slopes[b]) > 1e-3) != ((a, b) in twins), (a, b)


@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_target_sft_is_cross_entropy_to_its_target(eta):
    """As a training step computes it: q is proportional to model^(1 - eta) teacher^eta, with no such tensor.

    Where the teacher is the model itself, that is DFT.
    """
    wanted = objective("target-sft", eta=eta)
    hidden, weight, bias, teacher = UNEVEN.tensors
    targets, kept = UNEVEN.targets, UNEVEN.targets != -100

    def by_engine(teacher):
        h = hidden.clone().requires_grad_()
        mixture = (1 - eta) * hidden + eta * teacher
        assert distance(wanted.toward(hidden, teacher), mixture) < 1e-6
        reference = token_logps(mixture, weight, targets, bias, keep_jacobian=True)
        scores = token_logps(h, weight, targets, bias, needs=wanted.needs, reference=reference)
        return torch.autograd.grad(wanted(scores), h)[0]

    h = hidden.clone().requires_grad_()
    logp_MV = (h[kept] @ weight.T + bias).log_softmax(-1)
    teacher_MV = (teacher[kept] @ weight.T + bias).log_softmax(-1)
    q_MV = ((1 - eta) * logp_MV + eta * teacher_MV).softmax(-1).detach()
    at_y_MV = torch.nn.functional.one_hot(targets[kept], len(weight))
    p_M1 = logp_MV.detach().exp().gather(1, targets[kept, None])
    loss = -((p_M1 * at_y_MV + (1 - p_M1) * q_MV) * logp_MV).sum()
    assert distance(by_engine(teacher), torch.autograd.grad(loss, h)[0]) < 1e-12
    assert distance(by_engine(hidden), by_formula("dft", {})[1]) < 1e-12


def step_signals(wanted, case) -> dict[str, torch.Tensor]:
    """As a training loop does: each example's mean NLL, a signal per example, its value at each token [N]."""
    if wanted.step_signals is None:
        return {}
    scores, _ = case.score(naive_token_logps)
    supervised_E = scores.sequence.unique()  # a sequence without supervised tokens has no NLL
    nll_E = torch.stack([-scores.logp[scores.sequence == s].mean() for s in supervised_E]).detach()
    made = wanted.step_signals(nll_E)
    assert made.keys() == wanted.signals
    place_N = torch.searchsorted(supervised_E, case.sequence).clamp(max=len(supervised_E) - 1)
    return {name: values_E[place_N] for name, values_E in made.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_does_not_matter(name):
    """Two halves, split between sequences, with the signals of the whole, sum to the whole without them."""
    wanted = OBJECTIVES[name]
    case = Case.make(24, 8, 40, "scale", "some").to(torch.float64)
    signals = step_signals(wanted, case)
    whole = gradient(*case.score(token_logps, needs=wanted.needs), wanted)
    halves = []
    for rows in (slice(0, 8), slice(8, 24)):
        hidden, *head, reference_hidden = case.tensors
        part = Case(
            (hidden[rows], *head, reference_hidden[rows]), case.targets[rows], case.sequence[rows], case.head
        )
        theirs = {signal: values_N[rows] for signal, values_N in signals.items()}
        halves.append(gradient(*part.score(token_logps, needs=wanted.needs, signals=theirs), wanted))
    assert distance(torch.cat(halves), whole) < 1e-12


def test_cadft_is_dft_with_less_of_the_examples_that_are_harder_than_the_step():
    """Three examples of two tokens, by hand: only the one above the mean loses weight."""
    p_ET = torch.tensor([[0.9, 0.8], [0.5, 0.6], [0.1, 0.05]], dtype=torch.float64)
    nll_E = -p_ET.log().mean(1)
    z_E = (nll_E - nll_E.mean()) / nll_E.std(correction=0)
    expected_ET = p_ET * torch.where(z_E > 0, (-z_E).exp(), 1.0)[:, None]
    assert (z_E > 0).tolist() == [False, False, True]
    wanted = objective("cadft")
    assert distance(wanted.step_signals(nll_E)["difficulty"], z_E) < 1e-12
    weight = torch.zeros(2, 1, dtype=torch.float64)
    scores = token_logps(torch.zeros(6, 1, dtype=torch.float64), weight, torch.zeros(6, dtype=torch.int64))
    scores = scores.replace(logp=p_ET.log().flatten(), sequence=torch.arange(3).repeat_interleave(2))
    assert distance(gradient_weights(wanted, scores), expected_ET.flatten()) < 1e-12
    scores = scores.replace(signals={"difficulty": z_E.repeat_interleave(2)}, sequence=None)
    assert distance(gradient_weights(wanted, scores), expected_ET.flatten()) < 1e-12


def test_cadft_of_equally_hard_examples_is_dft():
    """The last bit of a mean decides nothing: a step of copies, rounded apart, has no hard examples."""
    nll_E = torch.full((4,), 1.3) + torch.tensor([0.0, 1.2e-7, -1.2e-7, 2.4e-7])
    assert objective("cadft").step_signals(nll_E)["difficulty"].abs().max() < 0.01
    assert objective("cadft").step_signals(nll_E[:1])["difficulty"] == 0


def test_infosft_weighs_a_token_by_its_own_probability():
    """p * max(0, 1 - logit p / logit P), P = 0.93, whatever else is in the batch."""
    p_M = torch.tensor([0.01, 0.3, 0.5, 0.8, 0.93, 0.99], dtype=torch.float64)
    expected_M = p_M * (1 - torch.logit(p_M) / math.log(0.93 / 0.07)).clamp_min(0)
    assert distance(objective("infosft").token_weight(p_M.log()), expected_M) < 1e-12
    assert expected_M[2] == 0.5 and expected_M[-1] == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_token_weight_is_the_gradient_weight(name):
    wanted = OBJECTIVES[name]
    case = Case.make(50, 8, 40, "bias", "all")
    scores, _ = case.score(token_logps, needs=wanted.needs)
    weights = gradient_weights(wanted, scores)
    assert not weights.requires_grad and weights.shape == scores.logp.shape
    if wanted.token_weight is not None:
        assert distance(wanted.token_weight(scores.logp), weights) < 1e-12
        assert not wanted.token_weight(scores.logp).requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_probabilities_stay_finite(name):
    """p from e^-1e5 to exactly 1, in float32."""
    wanted = OBJECTIVES[name]
    logp = torch.tensor([-1e5, -200.0, -1.0, -1e-7, 0.0]).requires_grad_()
    scores = token_logps(torch.zeros(5, 2), torch.zeros(3, 2), torch.zeros(5, dtype=torch.int64)).replace(
        logp=logp,
        sequence=torch.tensor([0, 1, 1, 2, 2]),
        reference_logp=torch.tensor([-1.0, -1e5, -1.0, 0.0, -50.0]),
        reference_kl=torch.zeros(5),
        top_k_entropy=torch.zeros(5),
        sum_p_squared=torch.tensor([1e-5, 0.2, 0.5, 1.0, 1.0]),
    )
    loss = wanted(scores)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


# Any function, and what is refused


def test_any_function_of_the_scores():
    def hinge(scores):
        return (-scores.logp - scores.top_k_entropy).clamp_min(0).sum()

    hinge.needs = ("top_k_entropy",)
    wanted = objective(hinge)
    assert wanted.name == "hinge" and wanted.needs == {"top_k_entropy"}
    case = Case.make()
    truth, leaves = case.score(naive_token_logps)
    want = gradient(truth, leaves, hinge)
    assert distance(gradient(*case.score(token_logps, needs=wanted.needs), wanted), want) < 1e-12
    assert objective(wanted) is wanted
    with pytest.raises(ValueError, match="must return a scalar"):
        objective(lambda scores: scores.logp)(truth)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"name": "dtf"}, "objective.name: there is no objective 'dtf' (did you mean 'dft'?)"),
        ({"name": "zzz"}, "objective.name: there is no objective 'zzz'; known: sft, dft"),
        ({"name": 3}, "objective.name: must be a name, or a function"),
        ({"name": "dft", "a": 1.0}, "objective.a: 'dft' has no such number (power does)"),
        (
            {"name": "threshold", "tua": 1.0},
            "objective.tua: 'threshold' has no such number (did you mean 'tau'?)",
        ),
        ({"name": "power", "a": 0}, "objective.a: must be positive"),
        ({"name": "power", "a": "1"}, "objective.a: must be a finite number, got '1'"),
        ({"name": "power", "a": True}, "objective.a: must be a finite number, got True"),
        ({"name": "power", "a": math.nan}, "objective.a: must be a finite number"),
        ({"name": "threshold", "tau": 1.0}, "objective.tau: must lie between 0 and 1"),
        ({"name": "asft", "lam": -0.1}, "objective.lam: must be positive"),
        ({"name": "infosft", "ceiling": 93}, "objective.ceiling: must lie between 0.5 and 1"),
        ({"name": "infosft", "ceiling": 0.5}, "objective.ceiling: must lie between 0.5 and 1"),
        ({"name": "focal", "gamma": 0}, "objective.gamma: must be positive"),
        ({"name": "iw-sft", "low": 3, "high": 2}, "objective.high: must be larger than low = 3"),
        ({"name": "iw-sft-token", "low": -1}, "objective.low: must not be negative"),
    ],
)
def test_wrong_requests_are_named(request_, message):
    with pytest.raises(ObjectiveError) as caught:
        objective(**request_)
    assert str(caught.value).startswith(message)
