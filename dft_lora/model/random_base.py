"""A base of random weights, made on the device when it is loaded: measurements at real size, without a
download and without 15 GB of files.

Such a base is a folder with a model's `config.json`, a tokenizer, and the file `random_weights.json`, which
holds the seed. It is trained and asked like any other base; what it says is noise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .tiny import TINY_DIR

MARK = "random_weights.json"
SPREAD = 0.02
"""Standard deviation of the matrices, as Qwen2 and Llama initialise theirs."""


def write_random_base(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """Write a base of this `config.json`, with the embedded base's tokenizer; returns the folder."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(TINY_DIR / name, folder)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    (folder / MARK).write_text(json.dumps({"seed": seed}))
    return folder


def seed_of(folder: str) -> int | None:
    """The seed of a base of random weights; None for any other folder or name."""
    mark = Path(folder) / MARK
    return json.loads(mark.read_text())["seed"] if mark.is_file() else None


def fill_(model: Any, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Fill a model without contents (meta) on the device: matrices from N(0, 0.02), norms 1, biases 0.

    One tensor after the other, so a 4-bit base needs little more memory than it has in the end.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            data = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                data.normal_(0, SPREAD, generator=generator)
            else:
                data.fill_(0.0 if name == "bias" else 1.0)
            kind = type(parameter)
            if kind is torch.nn.Parameter:
                module._parameters[name] = kind(data, requires_grad=False)
            else:  # bitsandbytes' own kind quantizes itself
                module._parameters[name] = kind(data, requires_grad=False, **vars(parameter)).to(device)
    model.tie_weights()
