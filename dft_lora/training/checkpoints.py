"""Checkpoints: everything the next step depends on, besides the recipe and the data.

    checkpoints/step-000030/
        adapter/                 peft format: adapter_model.safetensors, adapter_config.json
        optimizer.safetensors    the optimizer's tensors, unchanged (8-bit states stay 8-bit); `extra`'s
        random.safetensors       random generators, one row per rank
        state.json               the optimizer's structure and all plain values
        manifest.json            size and sha256 of each file

Tensors are stored in safetensors, everything else in JSON: nothing is ever unpickled. A folder is written
completely or not at all (`runs/atomic.py`). Resuming takes the newest undamaged one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from ..model.accelerator import accelerator
from ..runs.atomic import damage, discard, write_folder
from ..runs.folder import step_name, steps_in, writing

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PARTS = (
    f"adapter/{WEIGHTS}",
    f"adapter/{CONFIG}",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)


@dataclass(frozen=True)
class State:
    """The state of a run after `step` optimizer steps."""

    step: int
    adapter: dict[str, torch.Tensor]
    """Adapter weights by peft's names."""
    optimizer: dict[str, Any]
    """`optimizer.state_dict()`."""
    random: torch.Tensor
    """[ranks, bytes], uint8: see `random_state`."""
    progress: dict[str, Any]
    """Plain values: how a step is split, skipped steps, loss scale, seconds."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What only some runs have: answers that the next steps learn from, log p under the base, a value
    head."""


class Checkpoints:
    """The checkpoints of one run; the newest `keep` are kept."""

    def __init__(self, path: Path, keep: int):
        self.path, self.keep = path, keep

    def save(self, state: State, adapter_config: Any) -> Path:
        """Write a checkpoint; old ones are deleted only after it was verified.

        Raises RunError if it cannot be written.
        """
        path = self.path / step_name(state.step)
        with writing(path):
            write_folder(path, _files(state, adapter_config))
            for leftover in self.path.glob(".step-*"):
                shutil.rmtree(leftover)
            found = steps_in(self.path)
            kept = [step for step in found if step <= state.step][-self.keep :]
            for step in found.keys() - set(kept):
                discard(found[step])
        return path

    def newest(self) -> tuple[State | None, list[str]]:
        """The newest undamaged checkpoint (None if there are no checkpoints), and those that were skipped.

        Raises RunError if there are checkpoints but all are damaged: a run never silently starts over.
        """
        skipped: list[str] = []
        for path in reversed(steps_in(self.path).values()):
            why = damage(path, PARTS)
            if why is None:
                try:
                    return _load(path), skipped
                except (OSError, ValueError, KeyError, TypeError) as error:
                    why = f"unreadable ({error})"
            skipped.append(f"{path.name}: {why}")
        if skipped:
            raise RunError(
                f"{self.path}: no checkpoint can be used ({'; '.join(skipped)}); "
                "restore one from a backup, or start a new run in another folder"
            )
        return None, []


def write_adapter(path: Path, weights: dict[str, torch.Tensor], config: Any) -> None:
    """Write the final adapter as an atomic folder. Raises RunError if it cannot be written."""
    with writing(path):
        write_folder(path, adapter_files(weights, config))


def adapter_files(weights: dict[str, torch.Tensor], config: Any) -> Iterator[tuple[str, bytes]]:
    """An adapter in peft's format, file by file."""
    yield WEIGHTS, _tensors(weights)
    values = config.to_dict() | {"inference_mode": True}
    yield CONFIG, json.dumps(values, indent=2, sort_keys=True, default=sorted).encode()


def random_state(device: torch.device) -> torch.Tensor:
    """torch's generator on the CPU, followed by the device's own, as bytes."""
    return torch.cat([torch.get_rng_state(), accelerator(device).random_state()])


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """The reverse of `random_state`."""
    host = len(torch.get_rng_state())
    # Copies: torch 2.13 reads a view into a larger tensor from the wrong place, or crashes.
    torch.set_rng_state(state[:host].clone())
    accelerator(device).set_random_state(state[host:].clone())


def pack(value: Any, tensors: dict[str, torch.Tensor], name: str = "") -> Any:
    """`value` as JSON, with its tensors moved into `tensors` under their paths.

    Dicts become lists of pairs, since their keys may be numbers.
    """
    match value:
        case torch.Tensor():
            # A copy: bitsandbytes shares one quantile map between all states, which safetensors refuses.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}
        case dict():
            return {"dict": [[key, pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
        case list() | tuple():
            items = [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
            return {type(value).__name__: items}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be stored in a checkpoint")


def unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The reverse of `pack`."""
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": pairs}:
            return {key: unpack(item, tensors) for key, item in pairs}
        case {"list": items}:
            return [unpack(item, tensors) for item in items]
        case {"tuple": items}:
            return tuple(unpack(item, tensors) for item in items)
    return value


def _files(state: State, adapter_config: Any) -> Iterator[tuple[str, bytes]]:
    for name, content in adapter_files(state.adapter, adapter_config):
        yield f"adapter/{name}", content
    tensors: dict[str, torch.Tensor] = {}
    structure, extra = pack(state.optimizer, tensors), pack(state.extra, tensors, "extra")
    yield "optimizer.safetensors", _tensors(tensors)
    yield "random.safetensors", _tensors({"random": state.random})
    values = {"step": state.step, "progress": state.progress, "optimizer": structure, "extra": extra}
    yield "state.json", json.dumps(values).encode()


def _load(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((path / "state.json").read_bytes())
        tensors = load_file(path / "optimizer.safetensors")
        return State(
            step=values["step"],
            adapter=load_file(path / "adapter" / WEIGHTS),
            optimizer=unpack(values["optimizer"], tensors),
            random=load_file(path / "random.safetensors")["random"],
            progress=values["progress"],
            extra=unpack(values.get("extra", {}), tensors),  # earlier versions had none
        )
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
