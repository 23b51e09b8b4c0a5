"""DPO, GRPO and RLOO against TRL on the same batch: loss and gradients. Skipped where trl is not installed.

TRL's trainers are built as a user would, on the embedded base without quantization, because they cast the
adapters of a quantized model to bfloat16; then their loss of one given batch is compared with ours.
"""

from contextlib import nullcontext

import pytest
import torch

from dft_lora.config import ModelConfig
from dft_lora.data.batches import collate, numbered
from dft_lora.data.templates import Example
from dft_lora.loss import objective, token_logps
from dft_lora.model.head import head_of, hidden_states
from dft_lora.model.load import load_base, load_tokenizer

pytest.importorskip("trl")

BASE = ModelConfig(name="tiny", quantization="none", dtype="float32")
PAD = 0


@pytest.fixture(scope="module")
def answers():
    """Eight answers of different lengths to two prompts of different lengths, in random tokens."""
    generate = torch.Generator().manual_seed(0)

    def tokens(count):
        return tuple(torch.randint(5, 200, (count,), generator=generate).tolist())

    prompts = [tokens(7), tokens(4)]
    return [Example(str(i), prompts[i // 4] + tokens(3 + i % 5), len(prompts[i // 4])) for i in range(8)]


@pytest.fixture
def theirs(tmp_path):
    """A function that makes a trainer of TRL with a new LoRA adapter that is not zero."""
    from datasets import Dataset
    from peft import LoraConfig

    def make(trainer, config, rows, **more):
        settings = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
        made = trainer(
            model=load_base(BASE)[0],
            args=config(output_dir=str(tmp_path), **settings, **more.pop("settings")),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(BASE),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            **more,
        )
        torch.manual_seed(1)
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        made.model.train()
        return made

    return make


def ours(model, wanted, examples, divisor):
    """Our loss of one batch of whole groups."""
    batch = collate(examples, PAD)
    head = head_of(model)

    def scores(**more):
        h_BLD = hidden_states(model, **batch.inputs(torch.device("cpu")))[:, :-1]
        return token_logps(
            h_BLD.flatten(0, 1),
            targets=batch.labels_BL[:, 1:].flatten(),
            **head.arguments(),
            sequence=batch.examples_BL[:, 1:].flatten(),
            **more,
        )

    given = batch.signals_N(torch.device("cpu"))
    with torch.no_grad(), model.disable_adapter():
        reference = scores()
    given["reference_logp"] = torch.zeros(batch.labels_BL[:, 1:].numel())
    given["reference_logp"][reference.index] = reference.logp
    return wanted(scores(needs=wanted.needs, signals=given)) / divisor


def compare(trainer, loss_of_theirs, loss_of_ours):
    """Differences of the loss, relative to 1 or more, and of the gradient of all LoRA weights, relative.

    Not to the loss alone: on policy it is a sum of advantages, which is zero.
    """
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    their_loss, our_loss = loss_of_theirs(), loss_of_ours()
    their_slope, our_slope = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        for loss in (their_loss, our_loss)
    )
    differences = (
        abs(our_loss.item() - their_loss.item()) / max(1.0, abs(their_loss.item())),
        float((our_slope - their_slope).norm() / their_slope.norm()),
    )
    print("relative difference of loss {:.1e}, of gradient {:.1e}".format(*differences))
    assert their_slope.norm() > 0 and max(differences) <= 1e-4


def padded(rows, left=False):
    """Token rows as a rectangle and its mask."""
    width = max(map(len, rows))
    pads = [[PAD] * (width - len(row)) for row in rows]
    ids = [pad + list(row) if left else list(row) + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [
        [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
        for row, pad in zip(rows, pads, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(ones)


def rollout(answers):
    prompt_ids, prompt_mask = padded([e.ids[: e.prompt_length] for e in answers], left=True)
    completion_ids, completion_mask = padded([e.ids[e.prompt_length :] for e in answers])
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
    }


REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0])
PROMPTS = torch.arange(8) // 4
QUESTIONS = [{"prompt": "What is 2 + 3?"}] * 8


@pytest.mark.parametrize("numbers", [{}, {"length": 1.0}, {"length": 1.0, "ipo": 1.0}], ids=str)
def test_dpo(answers, theirs, numbers):
    from trl import DPOConfig, DPOTrainer

    kind = "ipo" if "ipo" in numbers else "sigmoid_norm" if numbers else "sigmoid"
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    settings = {"loss_type": [kind], "beta": 0.3}
    trainer = theirs(DPOTrainer, DPOConfig, rows, settings=settings)
    pairs = [
        (answers[0], answers[1]),
        (answers[2], answers[3]),
        (answers[5], answers[4]),
        (answers[7], answers[6]),
    ]
    marked = numbered([tuple(e for e in pair) for pair in pairs])
    examples = [
        Example(e.id, e.ids, e.prompt_length, {**e.signals, "preference": sign})
        for pair in marked
        for e, sign in zip(pair, (1.0, -1.0), strict=True)
    ]
    flat = [pair[side] for side in (0, 1) for pair in pairs]
    ids, mask = padded([e.ids for e in flat])
    completion = mask.clone()
    for row, e in enumerate(flat):
        completion[row, : e.prompt_length] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    compare(
        trainer,
        lambda: trainer._compute_loss(trainer.model, inputs, False),
        lambda: ours(trainer.model, objective("dpo", beta=0.3, **numbers), examples, divisor=4),
    )


@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_grpo_and_rloo(name, on_policy, answers, theirs):
    import trl

    kl = 0.2 if name == "grpo" else 0.0  # TRL's RLOO takes its KL from the reward
    settings = {"num_generations": 4, "per_device_train_batch_size": 8, "beta": kl}
    if name == "grpo":  # the KL of GRPO's paper; TRL's default multiplies it by the ratio (DeepSeek-V3.2)
        settings |= {"loss_type": "grpo", "use_bias_correction_kl": False}
    trainer = theirs(
        getattr(trl, f"{name.upper()}Trainer"),
        getattr(trl, f"{name.upper()}Config"),
        QUESTIONS,
        settings=settings,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )
    trainer.current_gradient_accumulation_steps = 1
    inputs, wanted = rollout(answers), objective(name, kl=kl)
    mask = inputs["completion_mask"].bool()
    advantage = torch.tensor(wanted.rollout_signals(REWARDS, PROMPTS)["advantage"])
    groups = REWARDS.view(2, 4)
    if name == "grpo":
        truth = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    else:
        truth = groups - (groups.sum(1, keepdim=True) - groups) / 3
    assert torch.allclose(advantage, truth.flatten(), atol=1e-6)

    def logps(switch):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad(), switch():
            return trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.shape[1])[0]

    generate = torch.Generator().manual_seed(3)
    old = logps(nullcontext) + (0 if on_policy else 0.3 * torch.randn(mask.shape, generator=generate)) * mask
    inputs |= {"advantages": advantage, "ref_per_token_logps": logps(trainer.model.disable_adapter)}
    inputs |= {"old_per_token_logps": old} if name == "grpo" else {"old_logps": (old * mask).sum(1)}
    examples = [
        Example(
            e.id,
            e.ids,
            e.prompt_length,
            {"advantage": float(advantage[i]), "old_logp": tuple(old[i][mask[i]].tolist())},
        )
        for i, e in enumerate(answers)
    ]
    compare(
        trainer,
        lambda: trainer._compute_loss(trainer.model, inputs),
        lambda: ours(trainer.model, wanted, examples, divisor=8),
    )
