"""Laws of the objectives on judged answers: formulas, policy gradients, a bandit, groups without gradient."""

from itertools import chain

import pytest
import torch
from loss_cases import Case, chunk_bytes, distance
from torch.nn.functional import logsigmoid

from dft_lora.loss import ObjectiveError, naive_token_logps, objective, objective_names, token_logps
from dft_lora.loss.judged import gae

ONLINE = ("grpo", "rloo", "ppo", "nft")
JUDGED = ("dpo", *ONLINE)
CASE = Case.make(48, 8, 53, "bias", "some")  # twelve sequences of up to four tokens: six pairs, three prompts
KEPT = CASE.targets != -100
OF = CASE.sequence[KEPT]


def test_every_objective_that_learns_from_judged_answers_is_tested_here():
    assert [name for name in objective_names() if objective(name).learns_from != "solutions"] == list(JUDGED)


def signals(name, on_policy=False):
    """Values of every kind of signal [N]; old log-probabilities lie beyond every clip."""
    generate = torch.Generator().manual_seed(1)

    def normal(size):
        return torch.randn(size, generator=generate, dtype=torch.float64)

    N, sequence = len(CASE.targets), CASE.sequence
    logp = torch.zeros(N, dtype=torch.float64)
    scores, _ = CASE.score(naive_token_logps)
    logp[KEPT] = scores.logp.detach()
    every = {
        "preference": 1.0 - 2.0 * (sequence % 2),
        "group": (sequence // 2).double(),
        "reference_logp": logp + 0.5 * normal(N),
        "old_logp": logp + 0.4 * normal(N),
        "advantage": normal(N) if name == "ppo" else normal(12)[sequence],
        "value": 0.3 * normal(N),
        "old_value": 0.3 * normal(N),
        "return": normal(N),
        "correct": (sequence % 3 == 0).double(),
        "correct_share": torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)[sequence // 4],
    }
    if on_policy:
        del every["old_logp"]
    return every


def by_objective(name, given, **numbers):
    wanted = objective(name, **numbers)
    scores, leaves = CASE.score(token_logps, needs=wanted.needs, signals=given)
    loss = wanted(scores)
    return loss.detach(), torch.autograd.grad(loss, leaves)[0]


class Plain:
    """What the formulas are made of: log p by plain autograd from whole logits, and the signals [M]."""

    def __init__(self, given):
        hidden, weight, bias, _ = CASE.tensors
        self.hidden = hidden.clone().requires_grad_()
        logits_MV = (self.hidden[KEPT] @ weight.T + bias).log_softmax(-1)
        self.logp = logits_MV.gather(1, CASE.targets[KEPT, None])[:, 0]
        for name, values_N in given.items():
            setattr(self, name, values_N[KEPT])
        if "old_logp" not in given:
            self.old_logp = self.logp.detach()

    def by_sequence(self):
        return [s == OF for s in OF.unique()]

    def low_variance_kl(self):
        return (self.reference_logp - self.logp).exp() - (self.reference_logp - self.logp) - 1


def dpo(x, beta=0.1, length=0.0, ipo=0.0):
    loss = 0.0
    for pair in x.group.unique():
        margin = 0.0
        for side in (1, -1):
            mine = (x.group == pair) & (x.preference == side)
            log_ratio = (x.logp - x.reference_logp)[mine]
            margin = margin + side * log_ratio.sum() / max(1, len(log_ratio)) ** length
        loss = loss - (1 - ipo) * logsigmoid(beta * margin) + ipo * (margin - 1 / (2 * beta)) ** 2
    return loss


def clipped(ratio, advantage, clip):
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def grpo(x, clip=0.2, kl=0.0):
    ratio = (x.logp - x.old_logp).exp()
    loss = clipped(ratio, x.advantage, clip) + kl * x.low_variance_kl()
    return sum(loss[mine].mean() for mine in x.by_sequence())


def rloo(x, clip=0.2, kl=0.0):
    loss = 0.0
    for mine in x.by_sequence():
        ratio = (x.logp - x.old_logp)[mine].sum().exp()
        loss = loss + clipped(ratio, x.advantage[mine][0], clip) + kl * x.low_variance_kl()[mine].mean()
    return loss


def ppo(x, clip=0.2, kl=0.0, value_clip=0.2, **_):
    policy = clipped((x.logp - x.old_logp).exp(), x.advantage, clip) + kl * x.low_variance_kl()
    target, old = getattr(x, "return"), x.old_value
    near = torch.min(torch.max(x.value, old - value_clip), old + value_clip)
    return (policy + 0.5 * torch.max((x.value - target) ** 2, (near - target) ** 2)).sum()


def nft(x, floor=1.0, balance=0.0):
    ratio, q = (x.logp - x.old_logp).exp(), x.correct_share
    implicit = (1 - q * ratio) / (1 - q)
    straight_through = implicit + (implicit.clamp(min=floor) - implicit).detach()
    loss = torch.where(x.correct > 0, -ratio.log(), -straight_through.log())
    return (((1 - q) / q) ** balance * loss).sum()


FORMULAS = {"dpo": dpo, "grpo": grpo, "rloo": rloo, "ppo": ppo, "nft": nft}
NUMBERS = [
    *((name, {}) for name in JUDGED),
    ("dpo", {"beta": 0.5, "length": 1.0, "ipo": 1.0}),
    ("dpo", {"length": 1.0}),
    ("dpo", {"ipo": 0.3}),
    *((name, {"clip": 0.05, "kl": 0.3}) for name in ("grpo", "rloo", "ppo")),
    ("ppo", {"value_clip": 0.05}),
    ("nft", {"floor": 0.5, "balance": 0.5}),
]


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize(("name", "numbers"), NUMBERS, ids=str)
def test_value_and_gradient_are_those_of_the_formula(name, numbers, on_policy):
    given = signals(name, on_policy)
    x = Plain(given)
    truth = FORMULAS[name](x, **numbers)
    loss, slope = by_objective(name, given, **numbers)
    assert distance(loss, truth) < 1e-12
    assert distance(slope, torch.autograd.grad(truth, x.hidden)[0]) < 1e-12


def test_the_signals_reach_every_clip_on_both_sides():
    x = Plain(signals("ppo"))
    ratio, move = (x.logp - x.old_logp).exp(), x.value - x.old_value
    for values, low, high in ((ratio, 0.8, 1.2), (move, -0.2, 0.2)):
        for sign in (x.advantage > 0, x.advantage < 0):
            assert (values[sign] < low).any() and (values[sign] > high).any()
    x = Plain(signals("nft"))
    implicit = ((1 - x.correct_share * (x.logp - x.old_logp).exp()) / (1 - x.correct_share))[x.correct == 0]
    assert (implicit < 0.5).any() and (implicit > 1).any() and ((implicit > 0.5) & (implicit < 1)).any()


def test_the_value_is_trained_towards_the_return():
    given = signals("ppo", on_policy=True)
    value = given["value"].clone().requires_grad_()
    scores, _ = CASE.score(token_logps, needs=objective("ppo").needs, signals={**given, "value": value})
    slope = torch.autograd.grad(objective("ppo", value_clip=1e9)(scores), value)[0]
    assert distance(slope[KEPT], (value - given["return"])[KEPT]) < 1e-12 and not slope[~KEPT].any()


# --- policy gradients ---------------------------------------------------------------------------


def test_grpo_on_policy_without_clipping_is_reinforce():
    given = signals("grpo", on_policy=True)
    x = Plain(given)
    reinforce = sum(-(x.advantage * x.logp)[mine].mean() for mine in x.by_sequence())
    _, slope = by_objective("grpo", given, clip=1e9)
    assert distance(slope, torch.autograd.grad(reinforce, x.hidden)[0]) < 1e-12


def test_nft_of_correct_answers_is_rft():
    given = signals("nft", on_policy=True)
    ones = torch.ones(len(CASE.targets), dtype=torch.float64)
    _, slope = by_objective("nft", {**given, "correct": ones, "correct_share": ones})
    assert distance(slope, by_objective("sft", {})[1]) < 1e-12


def test_nft_on_policy_has_the_advantages_of_grpo():
    """With balance 1/2: sqrt((1 - q) / q) and - sqrt(q / (1 - q)), the standardised rewards of its group."""
    given = signals("nft", on_policy=True)
    x = Plain(given)
    q = x.correct_share
    advantage = torch.where(x.correct > 0, ((1 - q) / q).sqrt(), -(q / (1 - q)).sqrt())
    _, slope = by_objective("nft", given, balance=0.5)
    assert distance(slope, torch.autograd.grad(-(advantage * x.logp).sum(), x.hidden)[0]) < 1e-12


@pytest.mark.parametrize(("name", "weighted"), [("sft", True), ("dft", False)])
def test_dft_on_a_batch_is_the_policy_gradient_of_reward_one(name, weighted):
    """Eqs. 5 and 6 of arXiv 2508.05629 on a batch: - E_{y ~ pi}[1[y = y*] w grad log pi(y)], enumerated."""
    hidden, weight, bias, _ = CASE.tensors
    hidden = hidden.clone().requires_grad_()
    logp_MV = (hidden[KEPT] @ weight.T + bias).log_softmax(-1)
    reward_MV = torch.zeros_like(logp_MV).scatter(1, CASE.targets[KEPT, None], 1.0)
    weight_MV = 1 / logp_MV.detach().exp() if weighted else 1.0
    expectation = (logp_MV.detach().exp() * reward_MV * weight_MV * logp_MV).sum()
    assert distance(by_objective(name, {})[1], -torch.autograd.grad(expectation, hidden)[0]) < 1e-12


# --- from rewards to signals ----------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0), (1.0, 1.0)])
def test_gae_is_its_definition(gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_(t+l), each delta from its formula: O(T^2)."""
    generate = torch.Generator().manual_seed(0)
    r, v = (torch.randn(17, generator=generate, dtype=torch.float64) for _ in range(2))
    after = [*v.tolist(), 0.0]
    delta = [float(r[t]) + gamma * after[t + 1] - after[t] for t in range(17)]
    truth = [sum((gamma * lam) ** n * delta[t + n] for n in range(17 - t)) for t in range(17)]
    assert distance(gae(r, v, gamma, lam), torch.tensor(truth, dtype=torch.float64)) < 1e-12


def test_group_advantages_by_hand():
    reward = torch.tensor([1.0, 0, 0, 1, 0.5, 0.25], dtype=torch.float64)
    prompt = torch.tensor([0, 0, 0, 1, 1, 1])
    for name, truth in {
        "grpo": lambda r: (r - r.mean()) / (r.std() + 1e-4),
        "rloo": lambda r: torch.stack([r[i] - torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(len(r))]),
    }.items():
        got = torch.tensor(objective(name).rollout_signals(reward, prompt)["advantage"], dtype=torch.float64)
        assert distance(got, torch.cat([truth(reward[:3]), truth(reward[3:])])) < 1e-12
    found = objective("nft").rollout_signals(reward, prompt)
    assert found["correct"] == [1, 0, 0, 1, 1, 1]
    assert found["correct_share"] == pytest.approx([1 / 3] * 3 + [1] * 3)


def test_ppo_standardises_over_the_rollout_and_keeps_returns_as_they_are():
    values = [torch.tensor([0.2, 0.4, 0.1]), torch.tensor([0.0, -0.3])]
    found = objective("ppo").rollout_signals(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), values)
    raw = torch.cat(
        [gae(torch.tensor([0.0, 0, 1]), values[0], 1, 0.95), gae(torch.zeros(2), values[1], 1, 0.95)]
    )
    advantage = torch.tensor([*chain(*found["advantage"])])
    assert distance(advantage, (raw - raw.mean()) / raw.std(correction=0)) < 1e-5
    assert distance(torch.tensor([*chain(*found["return"])]), raw + torch.cat(values)) < 1e-6
    assert found["old_value"] == [v.tolist() for v in values]


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_group_of_equal_rewards_gives_exactly_no_gradient(name, reward):
    """0.1: a mean of equal numbers need not be that number."""
    rewards = torch.full((12,), reward, dtype=torch.float64)
    found = objective(name).rollout_signals(rewards, torch.arange(12) // 7)
    assert set(found["advantage"]) == {0.0}
    given = signals(name) | {"advantage": torch.tensor(found["advantage"])[CASE.sequence]}
    assert not by_objective(name, given)[1].any()


# --- a bandit with a known optimum ------------------------------------------------------------------


@pytest.mark.parametrize("name", ONLINE)
def test_a_bandit_is_solved(name):
    """Nine arms, of which the least probable one alone is worth 1; three steps per rollout of 64 answers."""
    arms, best, generate = 9, 5, torch.Generator().manual_seed(0)
    weight = torch.eye(arms)
    hidden = torch.zeros(1, arms)
    hidden[0, best] = -2.0
    hidden.requires_grad_()
    value = torch.zeros(1, requires_grad=True)
    wanted = objective(name)
    optimizer = torch.optim.Adam([hidden, value], lr=0.05)
    start = float(hidden.detach().softmax(-1)[0, best])
    for _ in range(60):
        drawn = hidden.detach().softmax(-1)[0].multinomial(64, replacement=True, generator=generate)
        made = wanted.rollout_signals(
            (drawn == best).double(), torch.arange(64) // 8, [value.detach().clone() for _ in drawn]
        )
        given = {key: torch.tensor(values).flatten() for key, values in made.items()}
        given["old_logp"] = hidden.detach().log_softmax(-1)[0, drawn]
        for _ in range(3):
            more = {"value": value.expand(64)} if "value" in wanted.signals else {}
            scores = token_logps(
                hidden.expand(64, arms),
                weight,
                drawn,
                needs=wanted.needs,
                sequence=torch.arange(64),
                signals=given | more,
            )
            optimizer.zero_grad()
            (wanted(scores) / 64).backward()
            optimizer.step()
    assert start < 0.02 and float(hidden.detach().softmax(-1)[0, best]) > 0.9


# --- memory, extremes, wrong requests ---------------------------------------------------------------


@pytest.mark.parametrize("name", JUDGED)
def test_nothing_of_tokens_times_vocabulary_is_kept(name):
    """Bytes that autograd saves: the same for ten times the vocabulary, far below [M, V]."""

    def saved(V):
        case = Case.make(48, 8, V, "plain", "all").to(torch.float32)
        wanted = objective(name)
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        given = {key: values.float() for key, values in signals(name).items()}
        hidden, weight, *_ = case.tensors
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            wanted(
                token_logps(
                    hidden.requires_grad_(),
                    weight,
                    case.targets,
                    needs=wanted.needs,
                    sequence=case.sequence,
                    signals=given,
                    chunk_bytes=chunk_bytes(5, V, torch.float32),
                )
            )
        return sum(size for size in sizes if size != weight.numel() * 4)

    small, large = saved(500), saved(5000)
    assert small == large < 48 * 500 * 4


@pytest.mark.parametrize("name", JUDGED)
def test_improbable_and_certain_tokens_stay_finite(name):
    logp = torch.tensor([-200.0, -1.0, -1e-7, 0.0]).requires_grad_()
    scores = token_logps(torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))
    given = {key: torch.zeros(4) for key in objective(name).signals}
    given |= {"old_logp": torch.tensor([-180.0, -30.0, 0.0, -5.0]), "correct_share": torch.full((4,), 0.5)}
    given |= {"preference": torch.tensor([1.0, 1, -1, -1]), "correct": torch.tensor([1.0, 0, 1, 0])}
    given["advantage"] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    base_logp = torch.tensor([-150.0, 0.0, -40.0, -1.0])
    scores = scores.replace(
        logp=logp, sequence=torch.tensor([0, 0, 1, 1]), signals=given, reference_logp=base_logp
    )
    loss = objective(name, **({"kl": 0.1} if hasattr(objective(name), "kl") else {}))(scores)
    slope = torch.autograd.grad(loss, logp)[0]
    assert loss.isfinite() and slope.isfinite().all()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"name": "dpo", "beta": 0}, "objective.beta: must be positive"),
        ({"name": "dpo", "ipo": 2}, "objective.ipo: must lie between 0 and 1"),
        ({"name": "dpo", "length": -1}, "objective.length: must lie between 0 and 1"),
        ({"name": "grpo", "clip": 0}, "objective.clip: must be positive"),
        ({"name": "rloo", "kl": -1}, "objective.kl: must not be negative"),
        ({"name": "ppo", "lam": 1.5}, "objective.lam: must lie between 0 and 1"),
        ({"name": "ppo", "gamma": -1}, "objective.gamma: must lie between 0 and 1"),
        ({"name": "ppo", "value_rate": 0}, "objective.value_rate: must be positive"),
        ({"name": "nft", "floor": 2}, "objective.floor: must be above 0"),
        ({"name": "nft", "balance": -1}, "objective.balance: must not be negative"),
        ({"name": "grpo", "lam": 0.9}, "objective.lam: 'grpo' has no such number (asft does)"),
    ],
)
def test_wrong_numbers_are_named(request_, message):
    with pytest.raises(ObjectiveError) as caught:
        objective(**request_)
    assert str(caught.value).startswith(message.partition(" (")[0])
