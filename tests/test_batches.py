"""Batches: exact labels, masks by length, an order that is a pure function of the seed."""

import torch

from dft_lora.data.batches import IGNORE, collate, micro_batches, step_indices, ungrouped
from dft_lora.data.templates import Example

EOS = PAD = 9  # pad equals eos: masking by id would hide the end token
EXAMPLES = [Example("a", (1, 2, 3, EOS), 2), Example("b", (4, 5, 6, 7, 8, EOS), 1), Example("c", (1, EOS), 1)]


def test_labels_are_the_solution_and_its_end_token():
    batch = collate(EXAMPLES, PAD)
    for row, example in enumerate(EXAMPLES):
        labels = batch.labels_BL[row].tolist()
        n, p = len(example.ids), example.prompt_length
        assert labels == [IGNORE] * p + list(example.ids[p:]) + [IGNORE] * (8 - n)
        assert batch.attention_mask_BL[row].tolist() == [1] * n + [0] * (8 - n)
    assert batch.supervised == sum(len(e.ids) - e.prompt_length for e in EXAMPLES)
    assert batch.tokens == sum(len(e.ids) for e in EXAMPLES)


def test_an_epoch_is_a_permutation_and_steps_follow_without_a_gap():
    order = [i for step in range(7) for i in step_indices(10, 4, seed=3, step=step)]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order[:8] == step_indices(10, 8, seed=3, step=0)
    assert order[:4] != step_indices(10, 4, seed=4, step=0)


def test_a_step_larger_than_the_data_repeats_it():
    order = step_indices(3, 7, seed=0, step=0)
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2] and len(order) == 7


def test_micro_batches_hold_each_example_once():
    for size in (1, 2, 3, 8):
        batches = micro_batches(ungrouped(EXAMPLES), size, PAD)
        assert sorted(id for batch in batches for id in batch.ids) == ["a", "b", "c"]
        assert torch.equal(
            torch.tensor(sum(batch.supervised for batch in batches)),
            torch.tensor(collate(EXAMPLES, PAD).supervised),
        )
