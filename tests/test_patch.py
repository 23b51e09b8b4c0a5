"""`patch`: another trainer's steps with our loss are our loop's steps, and nothing of it stays behind."""

import copy
from functools import wraps

import pytest
import torch
from loss_cases import distance
from peft import LoraConfig, get_peft_model
from trainers import (
    STEPS,
    adapter_of,
    arguments,
    built,
    losses_of,
    padded,
    plan_of,
    rows_of,
    trained,
)
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers import Trainer as HfTrainer

from dft_lora import objective, patch
from dft_lora.config import AdapterConfig, ModelConfig
from dft_lora.errors import ModelError, RequestError
from dft_lora.loss import naive_token_logps
from dft_lora.model.head import bare, head_of, hidden_states
from dft_lora.model.load import add_lora, load_base, set_checkpointing
from dft_lora.training.ranks import Ranks
from dft_lora.training.trainer import Trainer


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def batch(plan):
    return padded(rows_of(plan)[:3])


@pytest.fixture(scope="module")
def model(plan):
    """A peft model whose adapter does something."""
    model = built(plan)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def by_hand(model, batch, name="dft", **numbers):
    """The objective's mean over the tokens of a batch, from whole logits; connected to the graph."""
    wanted, head = objective(name, **numbers), head_of(model)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    h_ND, targets = hidden_states(model, **given)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    rows = torch.arange(len(batch["labels"]))[:, None].expand_as(batch["labels"][:, 1:]).flatten()
    reference = None
    if wanted.needs:
        with torch.no_grad(), model.disable_adapter():
            reference = hidden_states(model, **given)[:, :-1].flatten(0, 1)
    scores = naive_token_logps(h_ND, head.weight_VD, targets, sequence=rows, reference_hidden=reference)
    return wanted(scores) / len(scores.logp)


def gradients(model, loss):
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def same_gradients(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    return all(distance(one[name], other[name]) < tolerance for name in one)


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# The laws


def own_loop(plan):
    trainer = Trainer(plan, Ranks(plan.recipe))
    losses = [trainer.step(step)["loss"] for step in range(STEPS)]
    return losses, adapter_of(trainer.learner.adapter_model)


def test_ten_steps_of_a_trainer_are_ten_steps_of_our_loop(plan, tmp_path):
    """In two micro-batches per step: their rows differ in length, so a mean of means would be off."""
    losses, adapter = own_loop(plan)
    model = built(plan)
    with patch(model):
        theirs = trained(
            model, rows_of(plan), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2
        )
    assert torch.allclose(torch.tensor(theirs[0]), torch.tensor(losses), rtol=1e-4, atol=1e-6)
    assert furthest(theirs[1], adapter) < 2e-4, "of a rate of 2e-3 and ten steps"


def test_sft_is_the_trainers_own_loss(plan, tmp_path):
    found = {}
    for patched in (False, True):
        model = built(plan)
        undo = patch(model, "sft").undo if patched else lambda: None
        found[patched] = trained(
            model, rows_of(plan), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2
        )
        undo()
    assert torch.allclose(torch.tensor(found[True][0]), torch.tensor(found[False][0]), rtol=1e-4, atol=1e-6)
    assert furthest(found[True][1], found[False][1]) < 2e-4


@pytest.mark.parametrize("name", ["sft", "dft", "dft-sentence", "iw-sft", "asft", "eaft"])
def test_loss_and_gradient_are_those_of_whole_logits(model, batch, name):
    truth = by_hand(model, batch, name)
    with patch(model, name):
        output = model(**batch)
        assert "logits" not in output and output.past_key_values is None
        assert distance(output.loss, truth) < 1e-5
        assert same_gradients(gradients(model, output.loss), gradients(model, truth), 1e-4)


def test_numbers_of_an_objective_and_own_functions(model, batch):
    with patch(model, objective("threshold", tau=0.7)):
        assert distance(model(**batch).loss, by_hand(model, batch, "threshold", tau=0.7)) < 1e-5
    with patch(model, lambda scores: -scores.logp.sum()):
        assert distance(model(**batch).loss, by_hand(model, batch, "sft")) < 1e-5


def test_the_sum_is_divided_once_by_the_trainers_count(model, batch):
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    with patch(model):
        mean = model(**batch).loss
        for count in (100, torch.tensor(100)):
            assert distance(model(**batch, num_items_in_batch=count).loss, mean * tokens / 100) < 1e-6
        nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
        loss = model(**nothing, num_items_in_batch=torch.tensor(0)).loss
        assert loss == 0 and all((g == 0).all() for g in gradients(model, loss).values())


def test_shifted_labels_and_positional_arguments_and_tuples(model, batch):
    with patch(model):
        loss = model(**batch).loss
        shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert distance(model(**given, shift_labels=shifted).loss, loss) < 1e-6
        core = bare(model)
        assert (
            distance(core(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss, loss)
            < 1e-6
        )
        assert distance(core(**batch, return_dict=False)[0], loss) < 1e-6


# Modes


def test_logits_where_they_are_asked_for(model, batch):
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model.eval()
    with torch.no_grad():
        truth = model(**plain).logits
        with patch(model):
            assert torch.equal(model(**plain).logits, truth)
            assert distance(model(**batch, logits_to_keep=2).logits, truth[:, -2:]) < 1e-5
            assert model(**batch).logits is None
            answer = model.generate(**plain, max_new_tokens=3, do_sample=False)
        with patch(model, eval_logits=True):
            assert torch.equal(model(**batch).logits, truth)
            assert model.train()(**batch).logits is None
        model.eval()
        assert torch.equal(answer, model.generate(**plain, max_new_tokens=3, do_sample=False))


def test_evaluation_of_a_trainer(plan, model, tmp_path):
    """The loss of an evaluation set, with and without metrics from the logits."""
    rows = rows_of(plan)[:6]

    def evaluated(eval_logits, metrics):
        with patch(model, "sft", eval_logits=eval_logits):
            trainer = HfTrainer(
                model, arguments(tmp_path), eval_dataset=rows, data_collator=padded, compute_metrics=metrics
            )
            return trainer.evaluate()

    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"seen": 1.0}

    trainer = HfTrainer(model, arguments(tmp_path), eval_dataset=rows, data_collator=padded)
    naive = trainer.evaluate()["eval_loss"]
    assert evaluated(False, None)["eval_loss"] == pytest.approx(naive, rel=1e-4)
    found = evaluated(True, metrics)
    assert found["eval_loss"] == pytest.approx(naive, rel=1e-4) and found["eval_seen"] == 1
    assert len(seen) == 1 and seen[0][-1] == len(head_of(model).weight_VD)


def test_gradient_checkpointing(model, batch):
    with patch(model):
        plain = gradients(model, model(**batch).loss)
        model.train()
        set_checkpointing(model, True)
        try:
            assert same_gradients(gradients(model, model(**batch).loss), plain)
        finally:
            set_checkpointing(model, False)
            model.eval()


@pytest.mark.parametrize("name", ["dft", "dft-sentence"])
def test_a_packed_row_is_its_documents(model, batch, name):
    """Positions that restart keep documents apart: in attention, and for losses of a whole sequence."""
    lengths = batch["attention_mask"].sum(1).tolist()
    documents = [(batch["input_ids"][i, :n], batch["labels"][i, :n]) for i, n in enumerate(lengths)]
    packed = {
        "input_ids": torch.cat([ids for ids, _ in documents])[None],
        "labels": torch.cat([labels for _, labels in documents])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    with patch(model, name):
        assert distance(model(**packed).loss, model(**batch).loss) < 1e-5
        if name == "dft-sentence":  # one sequence of all three would have another weight
            assert distance(model(**packed | {"position_ids": None}).loss, model(**batch).loss) > 1e-2


@pytest.mark.parametrize("base", ["nf4", "none"])
def test_bf16_autocast(plan, batch, tmp_path, base):
    """No further from float32 than the naive loss under the same autocast, and the loss itself is float32."""
    model = built(plan_of(tmp_path, quantization=base))
    truth = gradients(model, by_hand(model, batch, "sft"))

    def error():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        assert loss.dtype == torch.float32
        return sum(float((g - truth[n]).square().sum()) for n, g in gradients(model, loss).items()) ** 0.5

    naive = error()
    with patch(model, "sft"):
        assert error() < 1.2 * naive


@pytest.mark.parametrize("first", ["patch", "trainer"])
def test_a_trainer_whose_autocast_wraps_the_forward(plan, tmp_path, first, fresh_accelerate):
    """accelerate replaces the forward of a bare model when training begins, and puts it back or does not."""
    base = load_base(ModelConfig(quantization="none", dtype="float32"))[0]
    base.get_input_embeddings().weight.requires_grad_(True)
    rows = rows_of(plan)[:4]
    batch = padded(rows)
    truth = float(base(**batch).loss.detach())
    patched = patch(base, "sft") if first == "patch" else None
    trainer = HfTrainer(
        base,
        arguments(tmp_path, bf16=True, max_steps=1, learning_rate=1e-9),
        train_dataset=rows,
        data_collator=padded,
    )
    patched = patched or patch(base, "sft")
    trainer.train()
    (loss,) = losses_of(trainer)
    assert loss == pytest.approx(truth, rel=0.02) and loss != pytest.approx(truth, rel=1e-6)
    patched.undo()
    assert base(**batch).logits is not None and float(base(**batch).loss.detach()) == pytest.approx(
        loss, rel=0.02
    )


# Undone, refused


def test_undone_cleanly(model, batch):
    core = bare(model)
    before, kind, naive = dict(core.__dict__), type(core), model(**batch).loss
    flags = [getattr(m, "support_avx512bf16_for_cpu", None) for m in core.modules()]
    patched = patch(model)
    assert distance(model(**batch).loss, naive) > 0.1 and type(core).__name__ == kind.__name__
    kept = core.forward
    patched.undo()
    patched.undo()
    assert core.__dict__.keys() == before.keys() and type(core) is kind
    assert model(**batch).loss == naive
    assert kept(**batch).loss == naive, "a reference that somebody kept"
    assert flags == [getattr(m, "support_avx512bf16_for_cpu", None) for m in core.modules()]
    with pytest.raises(ZeroDivisionError), patch(model):
        1 / 0  # noqa: B018
    assert type(core) is kind


def test_a_forward_that_was_there_before_and_one_that_came_later(model, batch):
    core = bare(model)
    inside, around = [], []
    bound = core.forward

    @wraps(bound)
    def earlier(*args, **kwargs):
        inside.append("labels" in kwargs)
        return bound(*args, **kwargs)

    core.forward = earlier
    patched = patch(model)
    truth = model(**batch).loss
    current = core.forward

    def later(*args, **kwargs):
        around.append("labels" in kwargs)
        return current(*args, **kwargs)

    core.forward = later
    try:
        assert model(**batch).loss == truth and around == [False]
        assert inside == [False] * len(inside), "called for hidden states only"
        patched.undo()
        assert core.forward is later and model(**batch).logits is not None
    finally:
        patched.undo()
        core.__dict__.pop("forward")


def test_a_copy_of_a_patched_model_is_patched_too(model, batch):
    with patch(model):
        twin = copy.deepcopy(model)
        truth = model(**batch).loss
        assert twin(**batch).loss == truth
        with torch.no_grad():
            head_of(model).weight_VD.mul_(2)
        assert twin(**batch).loss == truth != model(**batch).loss
        with torch.no_grad():
            head_of(model).weight_VD.div_(2)


def tiny(quantization="none"):
    return load_base(ModelConfig(quantization=quantization, dtype="float32"))[0]


def test_an_adapter_may_come_after_the_patch(batch):
    base = tiny()
    with patch(base, "sft"):
        model = add_lora(base, AdapterConfig(r=4))
        loss = model(**batch).loss
        assert distance(loss, by_hand(model, batch, "sft")) < 1e-5
        assert any((g != 0).any() for g in gradients(model, loss).values())


def test_a_trained_head_gets_its_gradient(batch):
    base = tiny()
    base.requires_grad_(True)
    truth = gradients(base, base(**batch).loss)
    with patch(base, "sft"):
        assert same_gradients(gradients(base, base(**batch).loss), truth, 1e-4)


def test_a_mixture_of_experts_keeps_its_auxiliary_loss(batch):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    experts = MixtralForCausalLM(config)
    truth = experts(**batch)
    with patch(experts, "sft"):
        output = experts(**batch)
    assert truth.aux_loss > 0.1
    assert distance(output.loss, truth.loss) < 1e-5 and distance(output.aux_loss, truth.aux_loss) < 1e-6


def test_a_soft_capped_head_is_served(batch):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    capped = Gemma2ForCausalLM(config)
    torch.nn.init.normal_(capped.lm_head.weight)
    truth = capped(**batch).loss
    with patch(capped, "sft"):
        assert distance(capped(**batch).loss, truth) < 1e-5


def test_copies_for_several_gpus_are_refused(model, batch):
    with patch(model), pytest.raises(RequestError, match="accelerate launch"):
        bare(model)._replicate_for_data_parallel()
    bare(model)._replicate_for_data_parallel()


def test_refused_by_name(model, batch):
    with pytest.raises(RequestError, match=r"cadft.*optimizer step"):
        patch(model, "cadft")
    with pytest.raises(RequestError, match=r"asft.*after get_peft_model"):
        patch(tiny(), "asft")
    with pytest.raises(RequestError, match=r"power.*progress of the run"):
        patch(model, objective("power", anneal=0.5))
    with pytest.raises(RequestError, match="did you mean 'dft'"):
        patch(model, "dtf")

    def pairs(scores):
        return scores.logp.sum()

    pairs.divided_by = "sequences"
    with pytest.raises(RequestError, match=r"pairs.*divided by sequences"):
        patch(model, pairs)
    with patch(model), pytest.raises(RequestError, match="already patched"):
        patch(model)
    adapted = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ModelError, match="'lm_head' is the output head"):
        patch(adapted)
    base = tiny()
    with patch(base):  # the adapter of the head comes after the patch
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"]))
        with pytest.raises(ModelError, match="'lm_head' is the output head"):
            adapted(**batch)
