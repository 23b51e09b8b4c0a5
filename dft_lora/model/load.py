"""A base model in 4-bit (nf4 or fp4, double quantisation) or 8-bit, with LoRA adapters over it.

The output head stays in the compute dtype, frozen and never copied to float32: with a vocabulary of 152k that
copy alone takes 0.9 GB. LoRA weights are float32 from the start, which makes a resumed run bit-exact. Only
this file knows how bitsandbytes quantizes a base.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import AdapterConfig, ModelConfig
from ..errors import ModelError
from ..hub import unreachable
from ..runs.atomic import MANIFEST, damage
from . import gguf
from .accelerator import accelerator
from .attention import lacks_shared_heads, use_packed_heads
from .hardware import Hardware, choose, dtype_name
from .head import bare
from .known import KNOWN, known_file, unpacked_base
from .limits import overflows_float16, refuse_running_state
from .random_base import fill_, seed_of
from .starts import CHANGES_BASE
from .tiny import TINY_DIR

log = logging.getLogger(__name__)

NO_CODE = {"trust_remote_code": False}
"""Explicit, because otherwise transformers asks in a terminal whether to run a model's own code."""

CHECKPOINTING_FROM = 300_000_000
"""Parameters. In smaller models activations are small, and recomputing them costs a third of the time."""


def resolve(config: ModelConfig) -> str:
    """Path or Hub id of a model; `tiny` is the embedded base. The first call unpacks a GGUF file.

    Raises ModelError for a path without a model, or for a field that this base does not use.
    """
    _refuse_ignored(config)
    if config.name == "tiny":
        return str(TINY_DIR)
    if config.name in KNOWN:
        return str(unpacked_base(config.name))
    if (file := gguf_file(config)) is not None:
        return str(gguf.unpacked(file))
    path = os.path.expanduser(config.name)  # os.path, not Path: no error for a name that no file can have
    if os.path.exists(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ModelError(f"model.name: {config.name!r} has no config.json")
        return path
    if config.name.startswith((".", "/", "~")) or config.name.count("/") != 1:
        raise ModelError(f"model.name: no folder {config.name!r}, and not a Hub id of the form owner/name")
    return config.name


def _refuse_ignored(config: ModelConfig) -> None:
    """Raises ModelError for `gguf` or `revision` where it would change nothing."""
    for field, value, ignored in (
        ("gguf", config.gguf, _embedded(config)),
        ("revision", config.revision, _embedded(config) or _local(config)),
    ):
        if value is not None and ignored:
            raise ModelError(f"model.{field}: not with model.name {config.name!r}; leave it out")


def _embedded(config: ModelConfig) -> bool:
    return config.name == "tiny" or config.name in KNOWN


def _local(config: ModelConfig) -> bool:
    return config.name.endswith(".gguf") or os.path.exists(os.path.expanduser(config.name))


def _origin(config: ModelConfig) -> dict[str, Any]:
    """Where `from_pretrained` finds a model. Call it before transformers is imported (`hub.py`)."""
    name = resolve(config)
    return {
        "pretrained_model_name_or_path": name,
        "revision": config.revision,
        "local_files_only": not os.path.isdir(name) and unreachable() is not None,
        **NO_CODE,
    }


def _not_found(config: ModelConfig, what: str, error: Exception) -> ModelError:
    """The error for a part of a model that could not be loaded."""
    if os.path.isdir(resolve(config)) or not (why := unreachable()):
        return ModelError(f"model.name: {what} {config.name!r} ({_first_line(error)})")
    return ModelError(
        f"model.name: {what} {config.name!r} in the local cache, and {why}; connect, or give a folder "
        "that contains the model"
    )


def gguf_file(config: ModelConfig, fetch: bool = True) -> Path | None:
    """The GGUF file that a recipe names: by path, by known name, or in a folder or Hub repository; else None.

    Raises ModelError if it cannot be fetched from a Hub repository; without `fetch`, if it was not before.
    """
    if config.name in KNOWN:
        return known_file(config.name)
    path = Path(os.path.expanduser(config.name))
    if config.gguf is None:
        # os.path, not Path: it answers no for a name that no file can have
        return path if path.suffix == ".gguf" or os.path.isfile(path) else None
    if os.path.isdir(path):
        return path / config.gguf
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            hf_hub_download(config.name, config.gguf, revision=config.revision, local_files_only=not fetch)
        )
    except (OSError, HFValidationError) as error:
        why = _first_line(error)
        raise ModelError(f"model.gguf: no {config.gguf!r} in {config.name!r} ({why})") from None


def weights_of(config: ModelConfig) -> str:
    """How the weights are stored, in words: `nf4`, or `nf4 over Q4_K_M: quantized twice`."""
    held, origin = config.quantization, gguf.facts(resolve(config))
    quantized = held != "none"
    if origin is None:
        return held if quantized else "not quantized"
    kind = origin["quantization"]
    if kind in gguf.FLOATS:
        return f"{held} over {kind}" if quantized else f"{kind}, not quantized"
    return f"{held} over {kind}: quantized twice" if quantized else f"{kind}, unpacked"


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer. Raises ModelError if it has none."""
    origin = _origin(config)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**origin)
    except (OSError, ValueError, ImportError) as error:
        raise _not_found(config, "no tokenizer for", error) from None


def load_model_config(config: ModelConfig) -> Any:
    """The transformers config of a model, read without its weights.

    Raises ModelError if there is none, or if this kind of model cannot be trained here.
    """
    origin = _origin(config)
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(**origin)
    except (OSError, ValueError) as error:
        raise _not_found(config, "no model", error) from None
    refuse_running_state(found, config.name)
    return found


def hub_commit(config: ModelConfig) -> str | None:
    """The commit that a base's revision has on the Hub now; None for a base from elsewhere.

    Raises ModelError if there is no such base.
    """
    resolve(config)  # fetches a GGUF file, and raises for a wrong name
    if _embedded(config) or _local(config):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    name, offline = config.gguf or "config.json", unreachable() is not None
    try:
        file = hf_hub_download(config.name, name, revision=config.revision, local_files_only=offline)
    except (OSError, HFValidationError) as error:
        raise _not_found(config, "no model", error) from None
    return Path(file).parents[name.count("/")].name  # the cache has a folder for each commit


def count_parameters(model_config: Any) -> int:
    """Parameters of a model, from its config alone (built on the meta device)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    return sum(parameter.numel() for parameter in model.parameters())


def hardware_of(config: ModelConfig, device: torch.device | None = None) -> Hardware:
    """The device and compute dtype of a base. Raises ModelError if there is no such model."""
    model_config = load_model_config(config)
    return choose(config.dtype, count_parameters(model_config), device, overflows_float16(model_config))


def load_base(
    config: ModelConfig,
    device: torch.device | None = None,
    shardable: bool = False,
    for_answers: bool = False,
) -> tuple[Any, Hardware]:
    """A frozen causal LM in eval mode on its device, and the hardware rule that was applied.

    `shardable`: leave it on the CPU, with 4-bit weights stored as elements of the compute dtype
    (`sharding.py`). `for_answers`: unpack its 4-bit layers once, according to `config.unpack`, and not at
    every decoding step. On the meta device only the shapes of the weights are made, from the model's config.
    Raises ModelError if there is no such model.
    """
    from transformers import AutoModelForCausalLM

    _quieten()
    model_config = load_model_config(config)
    hardware = hardware_of(config, device)
    config = held_on(config, hardware.device)
    if hardware.device.type == "meta":
        return _shapes_alone(model_config, config.quantization, hardware.dtype), hardware
    arguments: dict[str, Any] = {"dtype": hardware.dtype, **_origin(config)}
    if config.quantization != "none":
        storage = hardware.dtype if shardable else torch.uint8
        arguments |= {"quantization_config": _quantized(config.quantization, hardware.dtype, storage)}
    seed = seed_of(resolve(config))
    if hardware.device.type != "cpu":
        gc.collect()  # bitsandbytes' weights point back at their layers, so a dropped base is still there
        accelerator(hardware.device).empty_cache()
    try:
        model = (
            AutoModelForCausalLM.from_pretrained(
                device_map={"": "cpu" if shardable else hardware.device}, **arguments
            )
            if seed is None
            else _random_weights(model_config, config.quantization, hardware, seed)
        )
    except (OSError, ValueError) as error:
        raise _not_found(config, "no weights of", error) from None
    keep_differentiable(model)
    if hardware.device.type == "cpu" or lacks_shared_heads(hardware.device, hardware.dtype):
        use_packed_heads(model)
    if for_answers and _wants_unpacked(model, config.unpack):
        _unpack_layers(model)
    model.requires_grad_(False)
    return model.eval(), hardware


def held_on(config: ModelConfig, device: torch.device) -> ModelConfig:
    """`config`, or the same base in 16 bits, with a warning, where bitsandbytes cannot compute."""
    if config.quantization == "none" or accelerator(device).quantizes:
        return config
    log.warning(
        "model.quantization: bitsandbytes cannot compute with %s on %s; the base stays in 16 bits",
        config.quantization,
        accelerator(device).name,
    )
    return config.model_copy(update={"quantization": "none"})


def twin(base: Any) -> Any:
    """A second tree of modules over the same weights: two adapters can then be in training over one base."""
    shared: list[Any] = [*base.parameters(), *base.buffers()]
    shared += [module.quant_state for _, module in _4bit_layers(base)]
    for module in base.modules():
        if hasattr(module, "init_8bit_state"):  # an 8-bit layer moves its scales there in its first pass
            if module.weight.CB is not None:
                module.init_8bit_state()
            shared.append(module.state)
    return copy.deepcopy(base, {id(one): one for one in shared})


def _shapes_alone(model_config: Any, quantization: str, dtype: torch.dtype) -> Any:
    """The model that `load_base` returns, with tensors that have no contents (`TracedTensors`)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    if quantization != "none":
        _use_packed_layers(model, quantization, dtype)
        from bitsandbytes.functional import create_dynamic_map, name2qmap

        name2qmap.setdefault("dynamic", create_dynamic_map())  # kept for the process: not without contents
        for _, layer in _4bit_layers(model):
            layer.weight.data = layer.weight.data.to(dtype)
            layer.weight._quantize("meta")  # bitsandbytes' own shapes: packed numbers, scales, tables
    return model.requires_grad_(False).eval()


def _random_weights(model_config: Any, quantization: str, hardware: Hardware, seed: int) -> Any:
    """The model that `load_base` returns for a base of random weights (`random_base.py`)."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(model_config, dtype=hardware.dtype)
    if quantization != "none":
        _use_packed_layers(model, quantization, hardware.dtype)
    fill_(model, hardware.dtype, hardware.device, seed)
    return model


def _use_packed_layers(model: Any, quantization: str, dtype: torch.dtype) -> None:
    """Replace the layers of a model without contents with bitsandbytes', still unpacked."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    settings = _quantized(quantization, dtype, torch.uint8)
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), settings)


def _wants_unpacked(model: Any, unpack: bool | str) -> bool:
    """`auto`: on a CPU, if the plain layers take at most half of the free memory.

    On CUDA bitsandbytes multiplies by the 4-bit numbers directly, which reads a quarter of the memory.
    """
    if unpack != "auto":
        return bool(unpack)
    size = sum(m.in_features * m.out_features for _, m in _4bit_layers(model)) * model.dtype.itemsize
    return model.device.type == "cpu" and size <= accelerator(model.device).free_memory // 2


def _4bit_layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "quant_state")]


def _unpack_layers(model: Any) -> None:
    """Replace each 4-bit layer with a plain layer of the same numbers in the compute dtype.

    On a CPU a 4-bit layer multiplies by exactly these numbers, unpacked at each call, so answers stay the
    same.
    """
    from bitsandbytes.functional import dequantize_4bit

    for name, packed in _4bit_layers(model):
        plain = torch.nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
        weight = dequantize_4bit(packed.weight, packed.weight.quant_state).to(packed.compute_dtype)
        plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), packed.bias
        model.set_submodule(name, plain)


def unpack(config: ModelConfig, dtype: torch.dtype, folder: Path) -> None:
    """Save a 4-bit base as the equivalent 16-bit model: same logits, for engines that cannot read nf4.

    Runs on the CPU, so the device's memory stays free for that engine. Takes 2 bytes of memory and disk per
    parameter.
    """
    named = config.model_copy(update={"dtype": dtype_name(dtype)})
    load_base(named, torch.device("cpu"))[0].dequantize().save_pretrained(folder)


def _quieten() -> None:
    """Silence progress bars for weights that load instantly, and other packages' deprecation notes."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`.*gradient_checkpointing", FutureWarning)


def _quantized(kind: str, dtype: torch.dtype, storage: torch.dtype) -> Any:
    """How bitsandbytes holds the base.

    int8 without outlier columns: they are chosen by the largest activations of a whole batch, so an answer
    would depend on what else is in its batch.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def keep_differentiable(model: Any) -> None:
    """Disable bitsandbytes' re-packing of 4-bit layers, which would stop training silently.

    On CPUs with AVX512-BF16 the first forward pass in eval mode without gradients re-packs each 4-bit layer
    in place. From then on the gradient through it is None, without an error, and the LoRA layers below stop
    learning. Keeping the common layout makes CPU inference somewhat slower.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_lora(base: Any, config: AdapterConfig, revision: str | None = None) -> Any:
    """A peft model with one new trainable adapter (named `default`, float32) over a frozen base.

    `revision`: that of the base, for those who load the adapter with peft alone. Raises ModelError if
    target_modules match nothing.
    """
    from peft import LoraConfig, get_peft_model

    _ignore_old_torchao()
    targets = config.target_modules
    alpha: Any = config.alpha  # peft's annotation says int, but it takes any number
    init: Any = config.init if config.init in CHANGES_BASE else True
    lora = LoraConfig(
        r=config.r,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        use_rslora=config.rslora,
        use_dora=config.dora,
        init_lora_weights=init,
        revision=revision,
    )
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        head = base.get_output_embeddings()
        layers = {
            name.rpartition(".")[2]
            for name, part in base.named_modules()
            if isinstance(part, torch.nn.Linear) and part is not head
        }
        raise ModelError(
            f"adapter.target_modules {targets!r}: {_first_line(error)} Linear layers of this base: "
            + ", ".join(sorted(layers))
        ) from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def load_adapters(base: Any, adapters: Mapping[str, Path]) -> Any:
    """A peft model with the named adapters over one base, in eval mode; the base itself if there are none.

    `base` may have adapters already.

    Raises ModelError for a folder without a readable adapter, or with a damaged one.
    """
    from peft import PeftModel

    _ignore_old_torchao()
    model, device = base, str(base.device)  # otherwise peft reads them into a GPU, wherever the base is
    for name, path in adapters.items():
        check_adapter(path)
        with fitting(path):
            if not isinstance(model, PeftModel):
                model = PeftModel.from_pretrained(base, path, adapter_name=name, torch_device=device)
            else:
                model.load_adapter(path, adapter_name=name, torch_device=device)
    return model.eval()


def _ignore_old_torchao() -> None:
    """peft raises for a torchao that is too old, such as Colab's, although layers of ours never use it."""
    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError:
        for name, module in list(sys.modules.items()):
            if name.startswith("peft.") and hasattr(module, "is_torchao_available"):
                vars(module)["is_torchao_available"] = lambda: False


def check_adapter(path: Path) -> None:
    """Raises ModelError for a folder without a readable adapter, or with a damaged one."""
    if not (path / "adapter_config.json").is_file():
        raise ModelError(f"{path}: no adapter here (adapter_config.json is missing)")
    if not (path / "adapter_model.safetensors").is_file():  # peft would load a pickle instead
        raise ModelError(f"{path}: no adapter_model.safetensors; other formats are not supported")
    if (path / MANIFEST).is_file() and (why := damage(path)):
        raise ModelError(f"{path}: the adapter is damaged: {why}")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turn what peft raises for an adapter of another shape into a ModelError that names its folder."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: the adapter does not fit this base ({_first_line(error)})") from None


def use_checkpointing(model: Any, wanted: bool | str) -> bool:
    """Recompute activations in the backward pass if wanted; `auto`: on a GPU, from 300 M parameters."""
    core = bare(model)
    if wanted == "auto":
        # 4-bit weights have two parameters per element; this count is only compared with a threshold.
        wanted = core.device.type != "cpu" and core.num_parameters() >= CHECKPOINTING_FROM
    if wanted:
        set_checkpointing(model, True)
    return bool(wanted)


def set_checkpointing(model: Any, on: bool) -> None:
    """Switch transformers' gradient checkpointing on or off."""
    if on:
        bare(model).gradient_checkpointing_enable({"use_reentrant": False})
    else:
        bare(model).gradient_checkpointing_disable()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
