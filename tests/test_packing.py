"""Packing changes where tokens lie, nothing else: logits, gradients, labels and counts stay."""

from dataclasses import replace

import pytest
import torch
from test_model import tiny_config

from dft_lora.config import AdapterConfig, DataConfig, ModelConfig
from dft_lora.data.batches import IGNORE, collate, examples_of, micro_batches, ungrouped
from dft_lora.data.packing import CheapestPacking, Packed, collate_packed, fill
from dft_lora.data.templates import Example
from dft_lora.errors import ModelError
from dft_lora.loss import objective, token_logps
from dft_lora.model.attention import choose_arrangement, crossover_length, keeps_examples_apart
from dft_lora.model.head import check_head, hidden_states
from dft_lora.model.load import add_lora, load_base

PAD = EOS = 9


def example(name: str, length: int, prompt: int) -> Example:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(10, 90, (length - 1,), generator=generator).tolist()
    return Example(name, (*ids, EOS), prompt)


EXAMPLES = [example(f"e{n}", n, p) for n, p in [(7, 3), (2, 1), (12, 5), (5, 0), (9, 8), (3, 2), (11, 1)]]


def causal_lm(family: str, **more):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **more)).eval()


def score(model, batch):
    """DFT's sum over a batch, and logp by (example, place)."""
    head = check_head(model)
    h_BLD = hidden_states(model, **batch.inputs(torch.device("cpu")))[:, :-1]
    scores = token_logps(h_BLD.flatten(0, 1), targets=batch.labels_BL[:, 1:].flatten(), **head.arguments())
    owner = batch.examples_BL[:, 1:].flatten()[scores.index]
    by_example = {name: scores.logp[owner == i].detach() for i, name in enumerate(batch.ids)}
    return objective("dft")(scores), by_example


def of_all(model, batches):
    model.zero_grad()
    logps = {}
    for batch in batches:
        loss, found = score(model, batch)
        loss.backward()
        logps |= found
    return logps, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


FAMILIES = [
    ("llama", {}),
    ("qwen2", {}),
    ("mistral", {"sliding_window": 4}),
    ("gemma2", {"sliding_window": 4}),
]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("family", "more"), FAMILIES)
def test_packed_logits_and_gradients_are_those_of_rows_alone(family, more, flat):
    """The last two have sliding windows: a window must not reach back over a boundary, nor be lost."""
    model = causal_lm(family, **more)
    assert keeps_examples_apart(model)
    alone, gradients = of_all(model, [collate([e], PAD) for e in EXAMPLES])
    packed, packed_gradients = of_all(model, Packed(20, flat)(ungrouped(EXAMPLES), 2, PAD))
    assert packed.keys() == alone.keys()
    for name, logp in alone.items():
        assert (packed[name] - logp).abs().max() <= 1e-5, name
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_packed_gradients_through_nf4_and_lora_equal_padded_ones(qwen_dir):
    base, _ = load_base(ModelConfig(name=str(qwen_dir)))
    model = add_lora(base, AdapterConfig(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    _, padded = of_all(model, micro_batches(ungrouped(EXAMPLES), 3, PAD))
    _, packed = of_all(model, Packed(20)(ungrouped(EXAMPLES), 2, PAD))
    for name, gradient in padded.items():
        assert gradient.norm() > 0 and (packed[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_without_positions_a_row_would_leak():
    """The law above is not empty: what it forbids happens when the boundaries are taken away."""
    model, (batch,) = causal_lm("llama"), Packed(60, flat=True)(ungrouped(EXAMPLES), 9, PAD)
    with torch.no_grad():
        apart = hidden_states(model, input_ids=batch.input_ids_BL, position_ids=batch.positions_BL)
        mixed = hidden_states(model, input_ids=batch.input_ids_BL)
    assert (apart - mixed).abs().max() > 1e-3


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_nothing_is_predicted_across_a_boundary_and_counts_stay(size, flat):
    batches = Packed(20, flat)(ungrouped(EXAMPLES), size, PAD)
    assert sum(batch.supervised for batch in batches) == sum(e.supervised for e in EXAMPLES)
    assert sum(batch.tokens for batch in batches) == sum(len(e.ids) for e in EXAMPLES)
    assert sorted(name for batch in batches for name in batch.ids) == sorted(e.id for e in EXAMPLES)
    by_name = {e.id: e for e in EXAMPLES}
    for batch in batches:
        assert (batch.labels_BL[batch.positions_BL == 0] == IGNORE).all()
        assert (batch.labels_BL[batch.attention_mask_BL == 0] == IGNORE).all()
        for i, name in enumerate(batch.ids):
            mine = (batch.examples_BL == i) & (batch.attention_mask_BL == 1)
            assert batch.input_ids_BL[mine].tolist() == list(by_name[name].ids)
            assert batch.positions_BL[mine].tolist() == list(range(len(by_name[name].ids)))
            labels = batch.labels_BL[mine]
            assert (labels != IGNORE).sum() == by_name[name].supervised and labels[-1] == EOS
        assert not flat or batch.positions == batch.tokens


def test_rows_hold_their_capacity():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 300, (256,), generator=generator).tolist()
    blocks = fill(ungrouped(Example(str(i), (1,) * n, 1) for i, n in enumerate(lengths)), 2048)
    rows = [row for (row,) in blocks]
    loads = [sum(len(e.ids) for e in row) for row in rows]
    assert max(loads) <= 2048 and len(rows) <= -(-sum(lengths) // 2048) + 1
    assert max(loads) - min(loads) <= max(lengths)


@pytest.mark.parametrize("flat", [False, True])
def test_an_answer_that_exceeds_the_longest_prompt_has_room(flat):
    """`data.max_length`, the capacity, limits the prompts of a rollout, not their answers."""
    sizes = {"a": 4, "b": 30, "c": 9, "d": 17}
    examples = [Example(name, (1,) * n, 1) for name, n in sizes.items()]
    batches = Packed(9, flat)(ungrouped(examples), 1, PAD)
    assert sorted(name for batch in batches for name in batch.ids) == list("abcd")
    assert sum(batch.tokens for batch in batches) == 60 and len(batches) == 2
    assert Packed(9, flat)([], 1, PAD) == []  # a rank without rows


@pytest.mark.parametrize("flat", [False, True])
def test_a_pair_that_exceeds_a_row_counts_as_two(flat):
    long, short = ([Example(name, (1,) * n, 1) for name in "ab"] for n in (9, 5))
    assert Packed(10, flat).most_rows([short, long]) == 2
    assert Packed(10, flat).most_rows([short]) == 1


@pytest.mark.parametrize("size", [1, 4])
def test_padding_waste_on_gsm8k_is_under_three_percent(data_dir, size):
    """Steps of 256 examples, rows of 2048 tokens, over the whole training set in Qwen's tokenizer."""
    from transformers import AutoTokenizer

    from dft_lora.data.sources import load_problems
    from dft_lora.data.templates import Renderer

    data = DataConfig(
        source=str(data_dir / "train/gsm8k_train.jsonl"), prompt="question", completion="answer", sample=1024
    )
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers/qwen2.5")
    renderer = Renderer(tokenizer, "qwen-boxed")
    examples = [renderer.render(problem) for problem in load_problems(data).problems]
    tokens = positions = 0
    for step in range(0, 1024, 256):
        for batch in Packed(2048)(ungrouped(examples[step : step + 256]), size, renderer.pad_id):
            tokens, positions = tokens + batch.tokens, positions + batch.positions
    assert 1 - tokens / positions < 0.03


def test_auto_packs_where_it_costs_less_and_a_mixing_model_is_refused():
    llama, mamba = causal_lm("llama"), _mamba()
    assert choose_arrangement(DataConfig(packing=True, max_length=64), llama) == Packed(64)
    assert choose_arrangement(DataConfig(packing=False), llama) is micro_batches
    assert choose_arrangement(DataConfig(packing="auto"), llama) == CheapestPacking(crossover_length(llama))
    assert not keeps_examples_apart(mamba)
    assert choose_arrangement(DataConfig(packing="auto"), mamba) is micro_batches
    with pytest.raises(ModelError, match=r"data\.packing"):
        choose_arrangement(DataConfig(packing=True), mamba)


def test_the_even_length_is_where_attention_costs_as_much_as_the_matrices():
    """All multiplications of a forward pass before the head, counted by torch, with and without attention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = causal_lm("llama")
    model.set_attn_implementation("eager")  # scores and sums of whole rows, as a block mask pays them
    even = round(crossover_length(model))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=torch.ones(1, even, dtype=torch.long))
    flops = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in flops.items() if "bmm" in str(op))
    assert attention == pytest.approx(sum(flops.values()) / 2, rel=0.05)


@pytest.mark.parametrize("even", [1.0, 30.0, 1e9])
@pytest.mark.parametrize("size", [1, 3, 9])
def test_cheapest_packing_rows_never_cost_or_hold_more_than_padded_ones(even, size):
    def cost(batch):
        longest = batch.input_ids_BL.shape[1]
        return batch.positions * (1 + longest / even)

    thrifty, padded = (
        CheapestPacking(even)(ungrouped(EXAMPLES), size, PAD),
        micro_batches(ungrouped(EXAMPLES), size, PAD),
    )
    for mine, theirs in zip(thrifty, padded, strict=True):
        assert sorted(mine.ids) == sorted(theirs.ids) and mine.supervised == theirs.supervised
        assert cost(mine) <= cost(theirs) and mine.positions <= theirs.positions
    assert any(batch.positions_BL is not None for batch in thrifty) == (size > 1)


def test_cheapest_packing_rows_stay_padded_where_attention_would_cost_more():
    pair = [example("a", 30, 1), example("b", 20, 1)]
    (cheap,), (dear,) = (
        CheapestPacking(1e9)(ungrouped(pair), 2, PAD),
        CheapestPacking(1.0)(ungrouped(pair), 2, PAD),
    )
    assert cheap.input_ids_BL.shape == (1, 56) and dear.input_ids_BL.shape == (2, 32)


def _mamba():
    """A recurrent model: its state runs through a packed row from one example into the next."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    return AutoModelForCausalLM.from_config(config).eval()


def test_collating_one_row_equals_collating_examples_alone():
    for e in EXAMPLES:
        packed, alone = collate_packed([[e]], PAD), collate([e], PAD)
        assert torch.equal(packed.input_ids_BL, alone.input_ids_BL)
        assert torch.equal(packed.labels_BL[:, 1:], alone.labels_BL[:, 1:])


# --- groups -----------------------------------------------------------------------------------


GROUPS = [
    (example("pair-a", 9, 3), example("pair-b", 4, 3)),
    *ungrouped([example("alone", 7, 2), example("short", 3, 1)]),
    tuple(example(f"rollout-{i}", 6 + i, 3) for i in range(5)),
]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("arrange", [micro_batches, Packed(20), Packed(20, flat=True), CheapestPacking(64.0)])
def test_no_group_is_in_two_micro_batches(arrange, size):
    batches = arrange(GROUPS, size, PAD)
    assert sorted(id for batch in batches for id in batch.ids) == sorted(
        example.id for group in GROUPS for example in group
    )
    for group in GROUPS:
        assert sum(any(example.id in batch.ids for example in group) for batch in batches) == 1


@pytest.mark.parametrize("arrange", [micro_batches, Packed(20), Packed(20, flat=True), CheapestPacking(4.0)])
def test_signals_lie_at_their_tokens(arrange):
    """One value per supervised token, here the token's own id, and one per example, at all of its tokens."""
    groups = [*GROUPS, (example("no prompt", 5, 0),)]
    place = {e.id: float(i) for i, e in enumerate(examples_of(groups), 1)}

    def marked(one: Example) -> Example:
        ids = tuple(float(id) for id in one.ids[max(1, one.prompt_length) :])
        return replace(one, signals={"id": ids, "example": place[one.id]})

    for size in (1, 3, 16):
        for batch in arrange([tuple(map(marked, group)) for group in groups], size, PAD):
            labels_BL, signals_BL = batch.labels_BL[:, 1:], batch.signals_BL
            is_label = labels_BL != IGNORE
            owners = [place[batch.ids[int(e)]] for e in batch.examples_BL[:, 1:][is_label]]
            assert torch.equal(signals_BL["id"][:, 1:], labels_BL.float() * is_label)
            assert signals_BL["example"][:, 1:][is_label].tolist() == owners
            assert not signals_BL["example"][:, 1:][~is_label].any()
            flat = batch.signals_N(torch.device("cpu"))["id"]
            assert torch.equal(flat, (labels_BL.float() * is_label).flatten())
