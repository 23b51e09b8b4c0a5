"""Generation with vLLM, for large evaluations: the only file that imports it (`dft-lora[vllm]`).

It uses the same requests, protocol and files as the package's own loop, with one base and one adapter per
request. vLLM does not read our bitsandbytes weights, so it gets the 4-bit base unpacked: the same numbers, in
16 bits. It has its own random streams, so individual samples differ from those of our loop; their
distribution does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from ..config import Recipe
from ..data.templates import Renderer
from ..errors import MissingPart, RequestError
from ..runs.folder import read_json
from .generate import Completion, Request, random_stream
from .hardware import dtype_name
from .load import hardware_of, resolve, unpack

AT_ONCE = 1024  # requests per call: what is lost if the process is killed
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM accepts for max_lora_rank


def lora_rank(ranks: Iterable[int]) -> int:
    """vLLM's max_lora_rank for adapters of these ranks. Raises RequestError if none is large enough."""
    largest = max(ranks, default=1)
    if largest > RANKS[-1]:
        raise RequestError(f"adapter.r {largest}: vLLM supports adapters up to rank {RANKS[-1]}")
    return next(rank for rank in RANKS if rank >= largest)


class Vllm:
    """An engine of evaluation/engines.py. Raises MissingPart where vLLM, or a device for it, is missing."""

    scores_tokens: ClassVar[bool] = False

    def __init__(self, recipe: Recipe, adapters: Mapping[str, Path], renderer: Renderer):
        if find_spec("vllm") is None:
            raise MissingPart("evaluate.engine: vllm is not installed: pip install 'dft-lora[vllm]'")
        from vllm.platforms import current_platform

        if current_platform.is_unspecified():
            raise MissingPart("evaluate.engine: vllm needs a GPU; use evaluate.engine: plain")
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        config = recipe.model
        hardware = hardware_of(config)
        dtype = dtype_name(hardware.dtype)
        self.provenance: dict[str, Any] = {"device": hardware.name, "dtype": dtype, "engine": "vllm"}
        self.stop_ids, self.stop = sorted(renderer.stop_ids), list(recipe.evaluate.stop)
        self.loras = {
            name: LoRARequest(name, number, str(path.resolve()))
            for number, (name, path) in enumerate(adapters.items(), start=1)
        }
        ranks = [vllm_rank(path) for path in adapters.values()]
        use_own_gpu()
        with TemporaryDirectory(prefix="dft-lora-") as folder:
            unpacked = config.quantization != "none"
            if unpacked:
                unpack(config, hardware.dtype, Path(folder))
            self.model = LLM(
                model=folder if unpacked else resolve(config),
                revision=None if unpacked else config.revision,
                tokenizer=resolve(config),
                tokenizer_revision=config.revision,
                dtype=dtype,
                max_model_len=-1,  # as long as fits
                enable_lora=bool(ranks),
                max_loras=max(1, len(ranks)),
                max_lora_rank=lora_rank(ranks),
                trust_remote_code=False,
            )

    def generate(self, requests: Sequence[Request], on_progress: Callable[[int, Completion], None]) -> None:
        """Answer all requests; calls `on_progress(i, completion)` after each part of AT_ONCE requests.

        Requests to the bare base go in calls of their own: next to adapters, vLLM 0.32's CPU build applies
        one to their rows too.
        """
        for adapted in (False, True):
            chosen = [i for i, request in enumerate(requests) if (request.adapter is not None) == adapted]
            for start in range(0, len(chosen), AT_ONCE):
                part = chosen[start : start + AT_ONCE]
                for i, completion in zip(part, self._answers([requests[i] for i in part]), strict=True):
                    on_progress(i, completion)

    def _answers(self, requests: Sequence[Request]) -> Iterator[Completion]:
        from vllm import SamplingParams

        outputs = self.model.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [
                SamplingParams(
                    temperature=request.temperature,
                    top_p=request.top_p,
                    seed=int(random_stream(request).integers(2**31)),  # vLLM's depends on the seed alone
                    max_tokens=request.max_new_tokens,
                    stop_token_ids=self.stop_ids,
                    stop=self.stop,
                    detokenize=bool(self.stop),
                )
                for request in requests
            ],
            lora_request=[request.adapter and self.loras[request.adapter] for request in requests],
            use_tqdm=False,
        )
        for output in outputs:
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            finished = answer.finish_reason == "stop"
            if finished and ids and ids[-1] in self.stop_ids:
                ids.pop()
            yield Completion(ids, finished)


def use_own_gpu() -> None:
    """Under a launcher each process sees all GPUs, and vLLM takes the first one: show it only its own."""
    if "LOCAL_RANK" in os.environ:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = seen.split(",") if seen else [str(i) for i in range(int(os.environ["LOCAL_WORLD_SIZE"]))]
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)]


def vllm_rank(adapter: Path) -> int:
    """The rank of an adapter. Raises RequestError for DoRA, which vLLM does not serve."""
    config = read_json(adapter / "adapter_config.json")
    if config.get("use_dora"):
        raise RequestError(f"{adapter}: vLLM does not serve DoRA adapters; merge it with dft-lora merge")
    return config["r"]
