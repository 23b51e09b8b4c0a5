"""What the loss is measured on: hidden states of prescribed probabilities, and those of a real forward pass.

Shapes (docs/shapes.md): N positions, M supervised tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..loss import token_logps


@dataclass(frozen=True)
class Inputs:
    """One batch at the head of a language model."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor  # -100 where unsupervised
    description: str

    @property
    def supervised(self) -> Tensor:
        return (self.targets_N != -100).nonzero()[:, 0]

    def to(self, *where) -> Inputs:
        """The same batch on another device or in another dtype; the targets keep their type."""
        hidden_ND, weight_VD = self.hidden_ND.to(*where), self.weight_VD.to(*where)
        return Inputs(hidden_ND, weight_VD, self.targets_N.to(hidden_ND.device), self.description)


def prescribed(
    N: int, D: int, V: int, *, supervised: float = 0.6, dtype=torch.bfloat16, seed: int = 0, device="cpu"
) -> Inputs:
    """Hidden states under which the targets have prescribed probabilities, bimodal as after DFT.

    logit(p) is drawn from N(8, 3) for half of the tokens, N(-8, 3) for a third and N(0, 2) for the rest. A
    random head with logits of standard deviation 4 puts log sum exp near 20, so |z| is 20 to 30 as in trained
    models; a multiple of the target's row is added to each hidden state until p is the drawn one. Numbers are
    drawn on the CPU, and the rest is computed on the `device`.
    """
    g = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(V, D, generator=g).div_(D**0.5).to(dtype).to(device)
    targets_N = torch.randint(V, (N,), generator=g).to(device)
    mean_N = torch.tensor([8.0, -8.0, 0.0])[
        torch.multinomial(torch.tensor([3.0, 2.0, 1.0]), N, replacement=True, generator=g)
    ]
    wanted_N = (mean_N + torch.where(mean_N == 0, 2, 3) * torch.randn(N, generator=g)).to(device)
    hidden_ND = 4 * torch.randn(N, D, generator=g).to(device)
    row_ND = weight_VD[targets_N].float()
    row_ND /= row_ND.square().sum(-1, keepdim=True)
    for _ in range(4):  # the other logits move a little with the target's
        logp_N = token_logps(hidden_ND.to(dtype), weight_VD, targets_N).logp
        odds_N = logp_N - torch.log(-torch.expm1(logp_N.clamp_max(-1e-6)))
        hidden_ND += (wanted_N - odds_N)[:, None] * row_ND
    targets_N[(torch.rand(N, generator=g) >= supervised).to(device)] = -100
    return Inputs(hidden_ND.to(dtype), weight_VD, targets_N, f"prescribed probabilities, seed {seed}")


def forward_pass(N: int, D: int, V: int, *, dtype=torch.bfloat16, seed: int = 0) -> Inputs:
    """Hidden states of a Qwen2 of random weights (24 layers, heads of 64) reading real text.

    The text is GSM8K's training set in Qwen's tokenizer where DFT_LORA_DATA has both, questions unsupervised;
    else the embedded task's in bytes. Random weights predict nearly uniformly: the opposite of `prescribed`.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    examples, source = _examples()
    ids, supervised = [], []
    for prompt, completion in examples:
        ids += [*prompt, *completion]
        supervised += [False] * len(prompt) + [True] * len(completion)
        if len(ids) > N:
            break
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=D * 38 // 7,
        num_hidden_layers=24,
        num_attention_heads=D // 64,
        num_key_value_heads=max(1, D // 448),
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        hidden_ND = model.model(torch.tensor([ids[:N]])).last_hidden_state[0]
    targets_N = torch.tensor(ids[1 : N + 1])
    targets_N[~torch.tensor(supervised[1 : N + 1])] = -100
    return Inputs(hidden_ND, model.lm_head.weight.detach(), targets_N, f"24-layer forward pass over {source}")


def _examples():
    """(pairs of prompt and completion ids, where they come from)."""
    data = Path(os.environ.get("DFT_LORA_DATA", "../shared/data"))
    text, tokenizer_dir = data / "train/gsm8k_train.jsonl", data / "tokenizers/qwen2.5"
    if text.exists() and tokenizer_dir.exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        rows = (json.loads(line) for line in text.open())
        pairs = ((tokenizer.encode(r["question"]), tokenizer.encode(r["answer"])) for r in rows)
        return pairs, "GSM8K"
    from ..tasks import get_task

    problems = get_task("arithmetic").problems("train")
    return ((list(p.question.encode()), list(p.solution.encode())) for p in problems), "the embedded task"


SOURCES = {"prescribed": prescribed, "forward": forward_pass}
