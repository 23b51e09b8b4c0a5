"""Generation by vLLM, for large evaluations on a GPU: the only file that imports it (`dft-lora[vllm]`).

The same requests, protocol and files as the package's own loop, with one base in 4-bit and an adapter a
request. vLLM draws from random streams of its own, so single samples differ from the own loop's; their
distribution does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..data.templates import Renderer
from ..errors import MissingPart
from ..run_folder import read_json
from .generate import Completion, Request
from .load import resolve

AT_ONCE = 1024  # requests handed over at a time: what a kill loses


class Vllm:
    """An engine of evaluation/sampling.py. Raises MissingPart where vLLM, or a GPU for it, is missing."""

    def __init__(self, recipe: Recipe, adapters: Mapping[str, Path], renderer: Renderer):
        import torch

        if find_spec("vllm") is None:
            raise MissingPart("evaluate.engine: vllm is not installed: pip install 'dft-lora[vllm]'")
        if not torch.cuda.is_available():
            raise MissingPart("evaluate.engine: vllm needs a GPU; use evaluate.engine: plain")
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.stop_ids = sorted(renderer.stop_ids)
        self.loras = {
            name: LoRARequest(name, number, str(path.resolve()))
            for number, (name, path) in enumerate(adapters.items(), start=1)
        }
        ranks = [read_json(path / "adapter_config.json")["r"] for path in adapters.values()]
        quantization = {"quantization": "bitsandbytes"} if recipe.model.quantization == "nf4" else {}
        self.model = LLM(
            model=resolve(recipe.model),
            revision=recipe.model.revision,
            dtype=recipe.model.dtype,
            enable_lora=bool(ranks),
            max_loras=max(1, len(ranks)),
            max_lora_rank=max([8, *ranks]),
            trust_remote_code=False,
            **quantization,
        )
        self.facts: dict[str, Any] = {"device": torch.cuda.get_device_name(), "engine": "vllm"}

    def generate(self, requests: Sequence[Request], on_progress: Callable[[int, Completion], None]) -> None:
        """Answer all requests; `on_progress(i, completion)` as soon as each part of AT_ONCE is done."""
        from vllm import SamplingParams

        for start in range(0, len(requests), AT_ONCE):
            part = requests[start : start + AT_ONCE]
            outputs = self.model.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in part],
                [
                    SamplingParams(
                        temperature=request.temperature,
                        top_p=request.top_p,
                        seed=request.seed,
                        max_tokens=request.max_new_tokens,
                        stop_token_ids=self.stop_ids,
                        detokenize=False,
                    )
                    for request in part
                ],
                lora_request=[self.loras.get(request.adapter) for request in part],
                use_tqdm=False,
            )
            for i, output in enumerate(outputs, start=start):
                answer = output.outputs[0]
                ids = list(answer.token_ids)
                finished = answer.finish_reason == "stop"
                if finished and ids and ids[-1] in self.stop_ids:
                    ids.pop()
                on_progress(i, Completion(ids, finished))
