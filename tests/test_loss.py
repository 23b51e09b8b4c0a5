"""Laws of `token_logps`: it equals plain autograd for any head and chunk size, and saves almost nothing."""

import math

import pytest
import torch
from loss_cases import HEADS, Case, chunk_bytes, distance
from torch.utils.flop_counter import FlopCounterMode

from dft_lora.loss import naive_token_logps, objective, token_logps

FIELDS = ("logp", "lse", "entropy", "sum_p_squared", "top_k_entropy")
STATISTICS = frozenset({"sum_p_squared", "top_k_entropy"})


def through_both(scores):
    """A loss that reaches hidden through logp and through lse, unevenly."""
    slope = torch.linspace(-1, 2, len(scores.logp), dtype=scores.logp.dtype)
    return (slope * scores.logp).sum() + (slope.flip(0) * scores.lse**2).sum() / 10


def gradients(scores, leaves, loss=through_both):
    return torch.autograd.grad(loss(scores), leaves)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_field_and_gradient_equals_the_oracle(dtype, head):
    for supervised in ("all", "some", "none"):
        for N, D, V in ((13, 7, 31), (2, 33, 2), (1, 5, 252), (25, 12, 507)):
            case = Case.make(N, D, V, head, supervised).to(dtype)
            truth, leaves = case.to(torch.float64).score(naive_token_logps)
            wanted = gradients(truth, leaves)
            naive, leaves = case.score(naive_token_logps)
            naive_errors = [distance(a, b) for a, b in zip(gradients(naive, leaves), wanted, strict=True)]
            for rows in (1, 3, N, N + 5):
                where = f"{supervised} of {N}, D {D}, V {V}, {rows} rows"
                scores, leaves = case.score(
                    token_logps, chunk_bytes=chunk_bytes(rows, V, dtype), needs=STATISTICS
                )
                assert torch.equal(scores.index, truth.index)
                if dtype.itemsize >= 4:
                    tolerance = {8: 1e-13, 4: 2e-6}[dtype.itemsize]
                    assert torch.equal(scores.is_top1, truth.is_top1), where
                    for field in FIELDS:
                        error = distance(getattr(scores, field), getattr(truth, field))
                        assert error < tolerance, f"{field}: {error} ({where})"
                    errors = [tolerance]
                else:
                    errors = [2 * error + 2 * torch.finfo(dtype).eps for error in naive_errors]
                for got, want, limit in zip(gradients(scores, leaves), wanted, errors, strict=True):
                    assert got.dtype == dtype
                    assert distance(got, want) <= limit, f"gradient: {distance(got, want)} ({where})"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_the_truth_than_naive(dtype, head):
    """Logits of 20 to 30 in the model's dtype, root mean square over batches.

    For the two values, one unit of rounding of the dtype is as good as exact.
    """
    ours, theirs = torch.zeros(3), torch.zeros(3)
    for seed in range(6):
        case = Case.make(60, 64, 509, head, "all", seed, spread=6.0).to(dtype)
        truth, leaves = case.to(torch.float64).score(naive_token_logps)
        wanted = gradients(truth, leaves, objective("dft"))[0]
        for total, scorer in ((ours, token_logps), (theirs, naive_token_logps)):
            scores, leaves = case.score(scorer)
            gradient = gradients(scores, leaves, objective("dft"))[0]
            total += torch.tensor(
                [
                    distance(gradient, wanted) ** 2,
                    distance(scores.logp, truth.logp) ** 2,
                    distance(scores.entropy, truth.entropy) ** 2,
                ]
            )
    ours, theirs = (ours / 6).sqrt(), (theirs / 6).sqrt()
    limit = (1.05 * theirs).maximum(torch.tensor([0.0, 1.0, 1.0]) * torch.finfo(dtype).eps)
    assert (ours <= limit).all(), (ours, theirs)


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head):
    case = Case.make(6, 4, 11, head, "some")
    hidden, weight, bias, _ = (tensor.clone().requires_grad_() for tensor in case.tensors)
    options = {**case.head, "chunk_bytes": chunk_bytes(2, 11, torch.float64)}

    def both(hidden, weight, bias):
        options["bias"] = bias if case.head.get("bias") else None
        scores = token_logps(hidden, weight, case.targets, **options)
        return scores.logp, scores.lse

    assert torch.autograd.gradcheck(both, (hidden, weight, bias), nondet_tol=1e-12)
    frozen = [tensor.detach() for tensor in (weight, bias)]
    assert torch.autograd.gradcheck(lambda h: both(h, *frozen), (hidden,))


@pytest.mark.parametrize("trained", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("with_hidden", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_trainable_heads(dtype, with_hidden, trained):
    trained = (*trained, "hidden") if with_hidden else trained
    case = Case.make(23, 12, 57, "all").to(dtype)
    truth, leaves = case.to(torch.float64).score(naive_token_logps, trained)
    wanted = gradients(truth, leaves)
    scores, leaves = case.score(token_logps, trained, chunk_bytes=chunk_bytes(4, 57, dtype))
    tolerance = {8: 1e-13, 4: 2e-6}.get(dtype.itemsize, 3 * torch.finfo(dtype).eps)
    for got, want in zip(gradients(scores, leaves), wanted, strict=True):
        assert distance(got, want) < tolerance


def test_a_tied_embedding_collects_both_gradients():
    g = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(17, (2, 9), generator=g)
    table = torch.randn(17, 6, generator=g, dtype=torch.float64, requires_grad=True)

    def gradient(scorer):
        return torch.autograd.grad(through_both(scorer(torch.tanh(table[ids]), table, targets)), table)[0]

    assert distance(gradient(token_logps), gradient(naive_token_logps)) < 1e-13


@pytest.mark.parametrize("scorer", [token_logps, naive_token_logps])
def test_without_supervised_tokens_the_loss_is_a_connected_zero(scorer):
    for N in (0, 5):
        hidden = torch.randn(N, 4, requires_grad=True)
        loss = objective("dft")(scorer(hidden, torch.randn(9, 4), torch.full((N,), -100)))
        loss.backward()
        assert loss == 0 and torch.equal(hidden.grad, torch.zeros(N, 4))


def test_gemms():
    """One without gradients, two for a frozen head, none in its backward pass, on supervised rows only."""
    N, D, V = 40, 8, 100
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    targets = torch.randint(V, (N,))
    targets[:15] = -100
    gemm = 2 * 25 * D * V

    def flops(action):
        with FlopCounterMode(display=False) as counter:
            result = action()
        return counter.get_total_flops() / gemm, result

    def forward():
        return token_logps(hidden, weight, targets, chunk_bytes=7 * V * 4)

    with torch.no_grad():
        assert flops(forward)[0] == 1
    count, scores = flops(forward)
    assert count == 2
    assert flops(lambda: through_both(scores).backward())[0] == 0
    weight.requires_grad_()
    count, scores = flops(forward)
    assert count + flops(lambda: through_both(scores).backward())[0] == 4


def saved_bytes(action) -> int:
    """Bytes of distinct storages that autograd saves for backward."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        action()
    return sum(storages.values())


def test_saved_for_backward_is_one_row_a_token_whatever_the_vocabulary():
    M, D = 50, 16
    for V in (100, 4000):
        hidden = torch.randn(M, D, requires_grad=True)
        weight, targets = torch.randn(V, D), torch.randint(V, (M,))

        def loss(scorer, hidden=hidden, weight=weight, targets=targets, **options):
            return objective("dft")(scorer(hidden, weight, targets, **options))

        ours = saved_bytes(lambda loss=loss, V=V: loss(token_logps, chunk_bytes=4 * 7 * V))
        assert M * D * 4 <= ours <= M * D * 4 + 64 * M
        assert saved_bytes(lambda loss=loss: loss(naive_token_logps)) >= M * V * 4


def test_the_chunk_size_does_not_matter():
    case = Case.make(64, 16, 300, "all").to(torch.float32)
    results = []
    for rows in (1, 5, 17, 64):
        scores, leaves = case.score(token_logps, chunk_bytes=chunk_bytes(rows, 300, torch.float32))
        results.append((scores.logp, *gradients(scores, leaves)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert distance(a, b) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits_stay_finite(dtype):
    case = Case.make(20, 8, 40, "plain", "all", spread=1e5).to(dtype)
    scores, leaves = case.score(token_logps, needs=STATISTICS)
    for field in FIELDS:
        assert torch.isfinite(getattr(scores, field)).all(), field
    for gradient in gradients(scores, leaves, objective("sft")):
        assert torch.isfinite(gradient).all()
    hopeless = case.targets.roll(1)
    scores = token_logps(*case.tensors[:2], hopeless)
    assert torch.isfinite(scores.logp).all() and scores.logp.min() < -1e4


def test_certain_tokens_keep_their_digits():
    """1 - p of 1e-12 is lost in float32 when formed as a difference; here logp is -1e-12."""
    weight = torch.tensor([[1.0], [0.0]])
    hidden = torch.tensor([[27.631021]], requires_grad=True)
    scores = token_logps(hidden, weight, torch.tensor([0]))
    scores.logp.sum().backward()
    assert math.isclose(float(scores.logp.detach()), -1e-12, rel_tol=1e-5)
    assert math.isclose(float(hidden.grad), 1e-12, rel_tol=1e-5)


def test_autocast_changes_nothing():
    case = Case.make().to(torch.float32)
    scores, leaves = case.score(token_logps)
    wanted = gradients(scores, leaves)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, leaves = case.score(token_logps)
        assert torch.equal(gradients(scores, leaves)[0], wanted)


def test_there_is_no_second_derivative():
    scores, leaves = Case.make().score(token_logps)
    (gradient,) = torch.autograd.grad(through_both(scores), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_head_changed_before_backward_is_noticed():
    scores, leaves = Case.make().score(token_logps, ("hidden", "weight"))
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        through_both(scores).backward()


# KL to a reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kl_to_itself_is_zero_and_flat(dtype):
    case = Case.make().to(dtype)
    hidden, weight = case.tensors[:2]
    reference = token_logps(hidden, weight, case.targets, keep_jacobian=True)
    leaf = hidden.clone().requires_grad_()
    scores = token_logps(leaf, weight, case.targets, needs={"reference_kl"}, reference=reference)
    (gradient,) = torch.autograd.grad(scores.reference_kl.sum(), leaf)
    assert scores.reference_kl.abs().max() == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize("head", ["plain", "bias", "scale"])
def test_the_kl_equals_the_oracle(head):
    case = Case.make(head=head)
    wanted, wanted_leaves = case.score(naive_token_logps)
    scores, leaves = case.score(token_logps, needs={"reference_kl"})
    assert distance(scores.reference_kl, wanted.reference_kl) < 1e-13
    got = gradients(scores, leaves, lambda s: (s.reference_kl**2).sum())[0]
    want = gradients(wanted, wanted_leaves, lambda s: (s.reference_kl**2).sum())[0]
    assert distance(got, want) < 1e-13


# Skipped rows


def bimodal(dtype=torch.float32, M=400, D=32, V=211):
    """Half of the targets nearly certain, a third nearly impossible."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g) / D**0.5
    targets = torch.randint(V, (M,), generator=g)
    push = torch.tensor([16.0, -9.0, 6.0])[
        torch.multinomial(torch.tensor([3.0, 2.0, 1.0]), M, True, generator=g)
    ]
    hidden = torch.randn(M, D, generator=g) + push[:, None] * weight[targets] / weight[targets].square().sum(
        -1, True
    )
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), targets


@pytest.mark.parametrize("name", ["dft", "sft", "power", "focal", "threshold", "chord-phi"])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7, "softcap": 9.0}], ids=["linear", "capped"])
def test_skipping_stays_under_its_bound(name, options):
    hidden, weight, targets = bimodal()
    wanted = objective(name)
    exact = gradients(token_logps(hidden, weight, targets, **options), hidden, wanted)[0]
    skipped = []
    for skip in (1e-4, 1e-2, 0.2):
        scores = token_logps(
            hidden,
            weight,
            targets,
            skip=skip,
            token_weight=wanted.token_weight or torch.ones_like,
            chunk_bytes=90 * 211 * 4,
            **options,
        )
        error = float((gradients(scores, hidden, wanted)[0] - exact).norm())
        assert error <= scores.skip_bound + 1e-6 * float(exact.norm())
        assert not scores.lse.requires_grad
        skipped.append(scores.skipped_rows)
    assert skipped == sorted(skipped) and 0 < skipped[-1] < 400


def test_rows_that_are_kept_are_exact_and_scores_are_complete():
    hidden, weight, targets = bimodal()
    dft = objective("dft")
    whole = token_logps(hidden, weight, targets, needs=STATISTICS)
    scores = token_logps(hidden, weight, targets, needs=STATISTICS, skip=1e-2, token_weight=dft.token_weight)
    for field in FIELDS:
        assert torch.equal(getattr(scores, field), getattr(whole, field))
    exact, got = (gradients(s, hidden, dft)[0] for s in (whole, scores))
    dropped = (got == 0).all(-1)
    assert int(dropped.sum()) == scores.skipped_rows
    assert distance(got[~dropped], exact[~dropped]) < 1e-6
    l1 = 2 * whole.probability * (1 - whole.probability)
    assert l1[dropped].sum() <= 1e-2 * l1.sum() and l1[dropped].max() <= l1[~dropped].min()


def test_the_bound_follows_a_head_that_changes():
    hidden, weight, targets = bimodal()
    options = {"skip": 1e-2, "token_weight": objective("dft").token_weight}
    before = token_logps(hidden, weight, targets, **options).skip_bound
    after = token_logps(hidden / 2, weight.mul_(2), targets, **options).skip_bound
    assert math.isclose(after, 2 * before, rel_tol=1e-5)


# What does not fit


BAD = {
    "hidden: must be [N, D]": {"hidden": torch.zeros(2, 3, 4)},
    "hidden: must be floating point": {"hidden": torch.zeros(5, 4, dtype=torch.int64)},
    "hidden: contains NaN": {"hidden": torch.full((5, 4), math.nan)},
    "hidden: contains NaN or infinite": {"hidden": torch.full((5, 4), math.inf)},
    "weight: must be [V >= 2, 4]": {"weight": torch.zeros(9, 3)},
    "weight: must be [V >= 2, 4] to": {"weight": torch.zeros(1, 4)},
    "weight: is torch.bfloat16": {"weight": torch.zeros(9, 4, dtype=torch.bfloat16)},
    "weight: is on meta": {"weight": torch.zeros(9, 4, device="meta")},
    "targets: must be [5]": {"targets": torch.zeros(4, dtype=torch.int64)},
    "targets: must be integers": {"targets": torch.zeros(5)},
    "targets: must lie in [0, 9), got 9": {"targets": torch.tensor([0, 9, 1, 2, 3])},
    "targets: must lie in [0, 9), got -1": {"targets": torch.tensor([0, -1, 1, 2, 3])},
    "bias: must be [9]": {"bias": torch.zeros(4)},
    "bias: is torch.float64": {"bias": torch.zeros(9, dtype=torch.float64)},
    "logit_scale: ": {"logit_scale": 0.0},
    "logit_scale: must": {"logit_scale": math.nan},
    "softcap: must be positive": {"softcap": -30.0},
    "chunk_bytes: ": {"chunk_bytes": 0},
    "skip: must lie in [0, 1)": {"skip": 1.0},
    "token_weight: ": {"skip": 0.1},
    "skip: needs a frozen head": {
        "skip": 0.1,
        "token_weight": torch.exp,
        "weight": torch.zeros(9, 4, requires_grad=True),
    },
    "sequence: must be [5]": {"sequence": torch.zeros(3)},
    "sequence: the objective needs": {"needs": {"sequence"}},
    "reference: the objective needs": {"needs": {"reference_logp"}},
    "needs: 'entropie'": {"needs": {"entropie"}},
    "reference: its supervised positions": {
        "reference": token_logps(torch.zeros(5, 4), torch.zeros(9, 4), torch.tensor([0, 1, 2, 3, -100]))
    },
    "reference: score it with keep_jacobian": {
        "needs": {"reference_kl"},
        "reference": token_logps(torch.zeros(5, 4), torch.zeros(9, 4), torch.arange(5)),
    },
    "softcap: KL": {
        "needs": {"reference_kl"},
        "softcap": 30.0,
        "reference": token_logps(torch.zeros(5, 4), torch.zeros(9, 4), torch.arange(5), keep_jacobian=True),
    },
    "weight: KL": {
        "needs": {"reference_kl"},
        "weight": torch.zeros(9, 4, requires_grad=True),
        "reference": token_logps(torch.zeros(5, 4), torch.zeros(9, 4), torch.arange(5), keep_jacobian=True),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {"hidden": torch.zeros(5, 4), "weight": torch.zeros(9, 4), "targets": torch.arange(5)}
    with pytest.raises(ValueError) as caught:
        token_logps(**(good | BAD[message]))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_values_are_not_read_when_the_check_is_off():
    hidden = torch.full((2, 4), math.nan)
    scores = token_logps(hidden, torch.zeros(9, 4), torch.tensor([0, 1]), check_values=False)
    assert scores.logp.isnan().all()


def test_a_missing_field_is_named():
    scores = token_logps(torch.zeros(2, 4), torch.zeros(9, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"top_k_entropy: .*needs=objective\.needs"):
        objective("eaft")(scores)
