"""Laws of generation: a row's answer is its own, whatever company it keeps and however the loop ends."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from scipy.stats import chisquare
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BitsAndBytesConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dft_lora.bench.decode import random_adapters
from dft_lora.config import ModelConfig
from dft_lora.errors import ModelError, RequestError, RunError
from dft_lora.model import attention
from dft_lora.model.accelerator import Accelerator
from dft_lora.model.adapters import BASE, AdaptedLayer, Places, adapter_layers, mixed
from dft_lora.model.cache import RaggedCache
from dft_lora.model.generate import Request, draw, generate, shared_prefix, stream
from dft_lora.model.generation_memory import PREFILL_TOKENS, Bound
from dft_lora.model.head import bare
from dft_lora.model.load import load_base
from dft_lora.model.memory import LiveTensors, ProcessMemory

VOCABULARY, PAD, STOPS = 64, 0, {1, 2, 3}
ADAPTERS = (None, "sft", "dft")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Qwen2 shape in nf4 with two adapters of different rank, too sharp for ties."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=nf4)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # see model/load.py
            module.support_avx512bf16_for_cpu = False
    lora = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(r=4, **lora), adapter_name="sft")
    model.add_adapter("dft", LoraConfig(r=8, **lora))
    return model.eval()


@pytest.fixture(autouse=True)
def no_hook_left(model):
    yield
    assert hooks(model) == 0


def hooks(model) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + ("forward" in vars(m)) for m in model.modules()
    )


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    ids = torch.randint(
        4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed + 1000 * length)
    )
    return tuple(ids.tolist())


def run(model, requests, **more):
    return generate(model, requests, **{"stop_ids": STOPS, "pad_id": PAD, **more})


def mixed_requests(samples: int = 4, prompts: int = 6) -> list[Request]:
    """Prompts of 3 to 23 tokens, all adapters, greedy and sampled, whole distribution and nucleus."""
    kinds = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.3, 0.5)]
    return [
        Request(prompt(3 + 4 * p), adapter, seed=s, temperature=t, top_p=top_p, max_new_tokens=6 + 3 * p)
        for p in range(prompts)
        for adapter in ADAPTERS
        for s, (t, top_p) in zip(range(samples), kinds, strict=False)
    ]


def test_an_answer_ends_where_ends_says_so_and_changes_no_other(model):
    """`ends` sees every prefix of an answer; what it cuts is the answer without it, up to there."""
    requests, seen = mixed_requests(), []

    def ends(ids):
        seen.append(tuple(ids))
        return ids[-1] % 5 == 0

    whole, cut = (run(model, requests, batch_rows=8, **more) for more in ({}, {"ends": ends}))
    for one, other in zip(whole, cut, strict=True):
        first = next((i for i, token in enumerate(one.ids) if token % 5 == 0), None)
        assert other.ids == one.ids[: None if first is None else first + 1]
        assert (other.finished, other.end) == ((True, None) if first is not None else (one.finished, one.end))
        assert {tuple(other.ids[: i + 1]) for i in range(len(other.ids))} <= set(seen)
    assert any(c.ids != w.ids for c, w in zip(cut, whole, strict=True)) and any(c.end for c in cut)


class ForwardCount:
    """Rows and columns of every forward of `model`, in order."""

    def __init__(self, model):
        self.model, self.shapes = model, []

    def __enter__(self):
        embedding = self.model.get_input_embeddings()
        self.hook = embedding.register_forward_pre_hook(
            lambda _, args: self.shapes.append(tuple(args[0].shape))
        )
        return self.shapes

    def __exit__(self, *_):
        self.hook.remove()


@pytest.fixture(scope="module")
def alone(model):
    """The answer to each of `mixed_requests`, asked alone."""
    return [run(model, [request])[0] for request in mixed_requests()]


@pytest.mark.parametrize("batch_rows", [5, 24, 100])
def test_a_row_in_a_mixed_batch_equals_the_row_alone(model, alone, batch_rows):
    assert run(model, mixed_requests(), batch_rows=batch_rows) == alone
    assert {c.finished for c in alone} == {True, False}


def test_the_order_of_requests_is_the_order_of_answers(model, alone):
    order = torch.randperm(len(alone), generator=torch.Generator().manual_seed(0)).tolist()
    requests = mixed_requests()
    assert run(model, [requests[i] for i in order], batch_rows=10) == [alone[i] for i in order]


def test_adapters_differ_so_that_mixing_them_up_would_show(model):
    answers = [
        run(model, [Request(prompt(9), a, seed=0, temperature=0, max_new_tokens=20)])[0] for a in ADAPTERS
    ]
    assert len({tuple(answer.ids) for answer in answers}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_of_an_unpacked_base_are_those_of_the_4_bit_one(tmp_path, dtype):
    """Several adapters over both, greedy and sampled; the unpacked base has no 4-bit layer left."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": 0.2}
    qwen = Qwen2ForCausalLM(Qwen2Config(**shape))
    torch.nn.init.normal_(qwen.model.layers[1].self_attn.q_proj.bias)
    qwen.save_pretrained(tmp_path)
    answers = []
    for unpack in (False, True, "auto"):
        config = ModelConfig(name=str(tmp_path), dtype=dtype, unpack=unpack)
        base, _ = load_base(config, torch.device("cpu"), for_answers=True)
        layers = {type(m).__name__ for m in base.model.layers.modules() if hasattr(m, "in_features")}
        assert layers == {"Linear" if unpack else "Linear4bit"}
        assert not any(p.requires_grad for p in base.parameters())
        model = random_adapters(base, {"sft": 4, "dft": 8})
        answers.append(run(model, mixed_requests(), batch_rows=24))
    assert answers[0] == answers[1] == answers[2]
    assert len({tuple(a.ids) for a in answers[0]}) > 20


def test_training_keeps_its_4_bit_layers():
    base, _ = load_base(ModelConfig(unpack=True))
    assert any(type(m).__name__ == "Linear4bit" for m in base.modules())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_greedy_equals_transformers_generate(model, adapter):
    names = ["__base__" if adapter is None else adapter]
    for length in (3, 10, 30):
        ids = torch.tensor([prompt(length)])
        theirs = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=names,
            do_sample=False,
            max_new_tokens=25,
            eos_token_id=sorted(STOPS),
            pad_token_id=PAD,
        )[0, length:].tolist()
        ours = run(model, [Request(prompt(length), adapter, seed=0, temperature=0, max_new_tokens=25)])[0]
        assert ours.ids == [token for token in theirs if token not in STOPS]
        assert ours.finished == (theirs[-1] in STOPS)


@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 5, 7)])
def test_attention_over_one_token_is_that_of_transformers(model, monkeypatch, lengths):
    """With rows of equal length, which need no mask, the query heads of a key head become its rows."""
    core = bare(model)
    requests = [
        Request(prompt(length, seed=i), "sft", seed=0, temperature=0, max_new_tokens=20)
        for i, length in enumerate(lengths)
    ]
    shapes = []

    def spy(query, *args, **kwargs):
        shapes.append(tuple(query.shape))
        return scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    theirs = run(model, requests, stop_ids=())
    assert shapes == []
    attention.use_packed_heads(model)
    try:
        assert run(model, requests, stop_ids=()) == theirs
    finally:
        core.set_attn_implementation("sdpa")
    layers_and_steps = 2 * 19
    assert shapes == ([(3, 2, 2, 16)] * layers_and_steps if len(set(lengths)) == 1 else [])


def test_a_model_that_chooses_its_mask_by_the_name_of_its_attention_keeps_it(model, monkeypatch):
    monkeypatch.setattr(bare(model).config, "model_type", "deepseek_v32")
    attention.use_packed_heads(model)
    assert bare(model).config._attn_implementation == "sdpa"


def test_attention_with_a_soft_cap_is_left_to_transformers():
    query, past = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="softcap"):
        attention._packed_heads(torch.nn.Identity(), query, past, past, None, softcap=30.0)


@pytest.mark.parametrize(
    ("ampere", "dtype", "lacks"),
    [(True, torch.bfloat16, False), (True, torch.float32, True), (False, torch.float16, True)],
)
def test_only_flash_attention_shares_heads_on_cuda(monkeypatch, ampere, dtype, lacks):
    monkeypatch.setattr(Accelerator, "computes_bfloat16", ampere)
    assert attention.lacks_shared_heads(torch.device("cuda", 0), dtype) is lacks


def test_an_older_gpu_gets_keys_and_values_repeated(monkeypatch):
    query, past = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    layer = torch.nn.Identity()
    layer.num_key_value_groups, layer.is_causal = 2, True
    shared, _ = attention._packed_heads(layer, query, past, past, None)
    monkeypatch.setattr(attention, "lacks_shared_heads", lambda device, dtype: True)
    heads = []

    def spy(query, key, value, **kwargs):
        heads.append((query.shape[1], key.shape[1], value.shape[1]))
        return scaled_dot_product_attention(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    repeated, _ = attention._packed_heads(layer, query, past, past, None)
    torch.testing.assert_close(repeated, shared)
    assert heads == [(4, 4, 4)]


@pytest.mark.parametrize("shared", [0, 70])
def test_a_sliding_window_is_kept_while_rows_of_other_ages_join(shared):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        initializer_range=0.3,
        **shape,
    )
    gemma = Gemma2ForCausalLM(config).eval()
    requests = [
        Request(prompt(shared) + prompt(n), None, seed=0, temperature=0, max_new_tokens=5 + n)
        for n in (20, 14, 9, 3)
    ]
    for request, answer in zip(requests, run(gemma, requests, stop_ids=(), batch_rows=2), strict=True):
        ids = torch.tensor([request.prompt_ids])
        theirs = gemma.generate(
            ids, do_sample=False, max_new_tokens=request.max_new_tokens, eos_token_id=None
        )
        assert answer.ids == theirs[0, ids.shape[1] :].tolist()


def test_the_cache_holds_what_a_list_of_rows_would():
    """Rows come, grow and leave at random; a row's last columns stay its own (keys, values)."""
    generator = torch.Generator().manual_seed(0)
    cache, rows = RaggedCache(), []

    def states(count, columns):
        return [torch.randn(count, 2, columns, size, generator=generator) for size in (4, 6)]

    for turn in range(300):
        if turn % 5 == 0:  # two prompts of one width, the first of them twice
            prefill, repeat = DynamicCache(), torch.tensor([0, 1, 0])
            new = states(2, 1 + 13 * turn % 90)
            prefill.update(*new, layer_idx=0)
            cache.add(prefill, repeat)
            rows += [[state[i] for state in new] for i in repeat]
        new = states(len(rows), 1)
        cache.update(*new, layer_idx=0)
        rows = [
            [torch.cat([a, b[i]], 1) for a, b in zip(row, new, strict=True)] for i, row in enumerate(rows)
        ]
        gone = set(
            torch.randperm(len(rows), generator=generator)[: turn % 3 if turn % 60 else len(rows)].tolist()
        )
        stay = len(rows) - len(gone)
        holes = [i for i in range(stay) if i in gone]
        movers = [i for i in range(stay, len(rows)) if i not in gone]
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = rows[mover]
        rows = rows[:stay]
        width = max((row[0].shape[1] for row in rows), default=0)
        cache.drop(torch.tensor(holes, dtype=torch.long), torch.tensor(movers, dtype=torch.long), stay, width)
        layer = cache.layers[0]
        assert layer.keys.shape == (stay, 2, width, 4) and cache.get_seq_length() == width
        for i, row in enumerate(rows):
            for held, own in zip((layer.keys, layer.values), row, strict=True):
                assert torch.equal(held[i, :, width - own.shape[1] :], own)
                assert held.isfinite().all()


def test_samples_follow_the_softmax(model):
    """Chi-square of 4000 first tokens against softmax(logits / T), for each adapter; fixed seeds."""
    ids = torch.tensor([prompt(7)])
    for adapter in ADAPTERS:
        with torch.no_grad(), mixed(adapter_layers(model), [adapter]):
            p = torch.softmax(model(input_ids=ids).logits[0, -1].double(), -1)
        requests = [Request(prompt(7), adapter, seed=s, max_new_tokens=1) for s in range(4000)]
        answers = run(model, requests, stop_ids=(), batch_rows=1000)
        seen = torch.bincount(torch.tensor([a.ids[0] for a in answers]), minlength=VOCABULARY)
        often = 4000 * p >= 5  # the rest is one cell, where there is a rest
        observed = torch.cat([seen[often], seen[~often].sum()[None]])
        expected = torch.cat([4000 * p[often], 4000 * p[~often].sum()[None]])
        cells = expected > 0
        assert cells.sum() > 10
        assert chisquare(observed[cells], expected[cells]).pvalue > 0.01


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(6, 4)
    u = torch.tensor([0.0, 0.099, 0.101, 0.299, 0.601, 1 - 2**-53], dtype=torch.float64)
    ones = torch.ones(6, dtype=torch.float64)
    assert draw(logits, u, ones, ones).tolist() == [0, 0, 1, 1, 3, 3]


def naive_draw(logits_RV, uniform_R, temperature_R, top_p_R):
    """The same draw by the whole cumulative sum in float64."""
    ids = []
    rows = zip(logits_RV.float(), uniform_R, temperature_R, top_p_R, strict=True)
    for z_V, uniform, temperature, top_p in rows:
        if temperature == 0:
            ids.append(z_V.max(-1).indices)
            continue
        p_V = torch.softmax(z_V / temperature.float(), -1)
        if top_p < 1:
            sorted_V, order_V = p_V.sort(descending=True, stable=True)
            outside_V = sorted_V.cumsum(-1) - sorted_V >= top_p
            outside_V[0] = False
            p_V[order_V[outside_V]] = 0
        upto_V = p_V.cumsum(-1, dtype=torch.float64)
        ids.append(torch.searchsorted(upto_V, uniform * upto_V[-1], right=True))
    return torch.stack(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [2, 64, 1000, 4096, 50_257, 151_936])
def test_draws_are_those_of_the_whole_cumulative_sum(vocabulary, dtype):
    """Blocks of 1 to 512 numbers; flat, usual and sharp rows; ties, as bfloat16 has them, at the top too."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 240 if vocabulary < 50_000 else 60  # a multiple of the lists below
    logits = torch.randn(rows, vocabulary, generator=generator)
    logits = (logits * torch.tensor([0.01, 3.0, 30.0]).repeat(rows // 3)[:, None]).to(dtype)
    u = torch.rand(rows, generator=generator, dtype=torch.float64)
    u[::7], u[1::7] = 0, 1 - 2**-53
    temperature = torch.tensor([1.0, 0.7, 1.0, 0.0], dtype=torch.float64).repeat(rows // 4)
    top_p = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.9], dtype=torch.float64).repeat(rows // 5)
    ours = draw(logits, u, temperature, top_p)
    assert torch.equal(ours, naive_draw(logits, u, temperature, top_p))


def test_a_draw_makes_no_row_of_float64_for_every_row():
    rows, vocabulary = 200, 65_536
    logits = torch.randn(rows, vocabulary).bfloat16()
    ones = torch.ones(rows, dtype=torch.float64)
    with LiveTensors() as memory:
        draw(logits, 0.5 * ones, ones, ones)
    assert memory.peak() < logits.nbytes


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(1000, 5)
    u = torch.linspace(0, 1 - 2**-53, 1000, dtype=torch.float64)
    ones = torch.ones(1000, dtype=torch.float64)
    assert set(draw(logits, u, ones, ones).tolist()) == {1, 3}


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.75, 0.95])
def test_top_p_draws_from_the_nucleus_in_proportion(top_p):
    torch.manual_seed(0)
    logits, draws = 2 * torch.randn(50), 20_000
    p, order = torch.softmax(logits, -1).double().sort(descending=True)
    size = int((p.cumsum(0) < top_p).sum()) + 1
    u = torch.rand(draws, dtype=torch.float64)
    ones = torch.ones(draws, dtype=torch.float64)
    seen = torch.bincount(draw(logits.expand(draws, -1), u, ones, top_p * ones), minlength=50)[order]
    assert seen[size:].sum() == 0
    if size > 1:
        assert chisquare(seen[:size], draws * p[:size] / p[:size].sum()).pvalue > 0.01


def test_temperature_0_is_the_arg_max_beside_sampled_rows():
    torch.manual_seed(0)
    logits, u = torch.randn(200, 30), torch.rand(200, dtype=torch.float64)
    temperature = torch.arange(200, dtype=torch.float64) % 2
    ids = draw(logits, u, temperature, torch.ones(200))
    assert torch.equal(ids[::2], logits.argmax(-1)[::2])
    assert not torch.equal(ids[1::2], logits.argmax(-1)[1::2])


def test_streams_belong_to_seed_and_prompt(model):
    def first(**change):
        request = Request(prompt(5), None, seed=1, temperature=3.0, max_new_tokens=12)
        return run(model, [replace(request, **change)], stop_ids=())[0].ids

    assert first() == first()
    assert first() != first(seed=2)
    assert first(max_new_tokens=5) == first()[:5]


def test_each_prompt_and_adapter_is_prefilled_once(model):
    """Five prompts of one length, all adapters, eight samples each: 15 rows of prefill, not 120."""
    requests = [
        Request(prompt(6, seed=p), a, seed=s, max_new_tokens=9)
        for s in range(8)
        for p in range(5)
        for a in ADAPTERS
    ]
    for batch_rows in (8, 30, 120):
        with ForwardCount(model) as shapes:
            run(model, requests, batch_rows=batch_rows)
        assert sum(rows for rows, columns in shapes if columns > 1) == 15
        assert max(rows for rows, _ in shapes) <= batch_rows


def begun_alike(lengths: Sequence[int], shared: int = 90) -> list[Request]:
    """Requests whose prompts begin with the same `shared` tokens: all adapters, greedy and sampled."""
    prompts = [prompt(shared) + prompt(length, seed=7 + length) for length in lengths]
    return [
        Request(ids, adapter, seed, temperature=float(seed > 0), max_new_tokens=6)
        for ids in prompts
        for adapter in ADAPTERS
        for seed in (0, 1)
    ]


def tokens_fed(model, work) -> int:
    """Token positions of all forwards, padding included, while `work` runs."""
    fed = []
    decoder = bare(model).get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda _, __, kw: fed.append(kw["input_ids"].numel()), with_kwargs=True
    )
    work()
    hook.remove()
    return sum(fed)


@pytest.mark.parametrize("batch_rows", [5, 64])
@pytest.mark.parametrize("lengths", [(1, 2, 3), (4, 30, 130), (20, 1, 7)])
def test_a_prefix_that_prompts_share_is_prefilled_once_and_changes_no_answer(
    model, monkeypatch, lengths, batch_rows
):
    """Also where one prompt is shorter than what follows the prefix of another (130 against 90 + 4)."""
    requests = begun_alike(lengths)
    answers = run(model, requests, batch_rows=batch_rows)
    fed = tokens_fed(model, lambda: run(model, requests, batch_rows=batch_rows))
    monkeypatch.setattr("dft_lora.model.generate.SHARED_FROM", 10**6)
    assert answers == run(model, requests, batch_rows=batch_rows)
    whole = tokens_fed(model, lambda: run(model, requests, batch_rows=batch_rows))
    if batch_rows == 64:
        assert whole - fed == (len(lengths) - 1) * len(ADAPTERS) * 90


def test_a_short_or_single_prompt_is_not_prefilled_apart():
    assert shared_prefix(begun_alike((4, 9), shared=63)) == ()
    assert shared_prefix(begun_alike((4,), shared=90)) == ()
    ids = prompt(100)
    nested = [Request(ids[:80], None, 0), Request(ids, None, 0)]
    assert shared_prefix(nested) == ids[:79], "a prompt keeps a token to feed"


@pytest.fixture(scope="module")
def wide():
    """A large vocabulary over a small decoder, in bfloat16: the head is all that weighs."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


class HeadProducts(TorchDispatchMode):
    """Products with the head's weight: (operation, shape of the other factor, whether it is dense)."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.seen = vocabulary, []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        if "mm" in operation.__name__ and result.shape[-1] == self.vocabulary:
            left = arguments[-2]
            self.seen.append((operation.__name__, tuple(left.shape), left.is_contiguous()))
        return result


def test_the_head_takes_one_dense_matrix(wide):
    """A slice of the hidden states with a stride makes oneDNN copy the head's weight for each row."""
    requests = [Request(prompt(9 + i % 3, seed=i), None, seed=i, max_new_tokens=3) for i in range(20)]
    with HeadProducts(151_936) as products:
        run(wide, requests, stop_ids=())
    assert products.seen == [("mm.default", (20, 64), True)] * 3


@pytest.mark.parametrize("length", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_memory_stays_below_the_bound_that_is_stated(wide, length):
    """Resident memory, because a library's scratch space is not among the tensors; and tensors alone."""
    rows, new = 120, 2
    requests = [
        Request(prompt(length - i % 5, seed=i), None, seed=i, max_new_tokens=new) for i in range(rows)
    ]
    bound = Bound(wide)(rows, length + new)
    assert bound < 400 * 2**20
    run(wide, requests[:2])
    memory = ProcessMemory()
    before = memory.now()
    memory.reset()
    with LiveTensors() as tensors, ForwardCount(wide) as shapes:
        run(wide, requests, batch_rows=rows, stop_ids=())
    assert memory.peak() - before < bound
    assert tensors.peak() < bound
    prefills = [rows * columns for rows, columns in shapes if columns > 1]
    assert len(prefills) > 1 and max(prefills) <= PREFILL_TOKENS


def test_copies_of_a_shared_prefix_stay_below_the_bound(model):
    rows, shared = 100, prompt(600)
    requests = [Request((*shared, *prompt(8, seed=i)), None, seed=i, max_new_tokens=2) for i in range(rows)]
    assert shared_prefix(requests) == shared
    with LiveTensors() as tensors:
        run(model, requests, batch_rows=rows, stop_ids=())
    assert tensors.peak() < Bound(model)(rows, 610, kept=600)


def test_the_bound_grows_with_what_a_batch_holds(model, wide):
    """Cache for rows and tokens; logits, a prefill and an unpacked matrix whatever their number."""
    bound = Bound(wide)
    assert bound(20, 500) - bound(10, 500) == 10 * bound.row(500)
    cache_of_500 = 500 * 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, width, bytes
    assert cache_of_500 < bound.row(500) < 4 * cache_of_500
    assert bound.shared(500) > 64 * 2**20
    for tokens in (10, 5000):
        rows = bound.rows(tokens, budget=2**31)
        assert bound(rows, tokens) <= 2**31 < bound(rows + 1, tokens)
    assert bound.rows(tokens, budget=1) == 1
    assert Bound(model).unpacked == 64 * 128 * 4


def test_a_long_prompt_is_prefilled_alone(model):
    long = PREFILL_TOKENS // 2 + 1
    requests = [Request(prompt(n), None, seed=0, max_new_tokens=1) for n in (4, long, long, 5)]
    with ForwardCount(model) as shapes:
        run(model, requests, batch_rows=8)
    assert shapes == [(1, long), (2, 5)]


def test_finished_rows_leave_the_batch(model):
    limits = range(1, 21)
    with ForwardCount(model) as shapes:
        run(model, [Request(prompt(6), None, seed=n, max_new_tokens=n) for n in limits], stop_ids=())
    assert shapes[0] == (1, 6)
    assert shapes[1:] == [(rows, 1) for rows in range(19, 0, -1)]


def test_columns_of_a_row_that_left_are_cut(model):
    """The long prompt stops first; the short one continues with a cache of its own width."""
    long, short = (
        Request(prompt(40), None, 0, max_new_tokens=2),
        Request(prompt(4), None, 0, max_new_tokens=8),
    )
    widths = []
    decoder = model.get_base_model().model
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["attention_mask"].shape[1]), with_kwargs=True
    )
    try:
        run(model, [long, short], stop_ids=())
    finally:
        hook.remove()
    assert widths == [40, 41, *range(6, 12)]


def test_stop_ids_end_a_row_and_are_not_given(model):
    requests = [
        Request(prompt(5), a, seed=s, temperature=2.0, max_new_tokens=60) for s in range(6) for a in ADAPTERS
    ]
    free = run(model, requests, stop_ids=())
    stopped = run(model, requests)
    for whole, part in zip(free, stopped, strict=True):
        end = next((i for i, token in enumerate(whole.ids) if token in STOPS), None)
        assert part.ids == whole.ids[:end]
        assert part.finished == (end is not None)
    assert all(not c.finished and len(c.ids) == 60 for c in free)
    assert any(c.finished for c in stopped)


def test_progress_reports_every_completion_once(model):
    requests, seen = mixed_requests(samples=2), {}
    answers = run(model, requests, batch_rows=7, on_progress=lambda i, c: seen.setdefault(i, []).append(c))
    assert seen == {i: [answer] for i, answer in enumerate(answers)}


def test_no_requests_no_work(model):
    assert run(model, []) == []
    assert list(stream(model, [], stop_ids=STOPS, pad_id=PAD)) == []


def test_stream_gives_the_tokens_of_generate_row_by_row(model):
    requests = [Request(prompt(4 + i), a, seed=3, max_new_tokens=15) for i, a in enumerate(ADAPTERS)]
    ids = {i: [] for i in range(3)}
    for step in stream(model, requests, stop_ids=STOPS, pad_id=PAD):
        for i, token in step:
            ids[i].append(token)
    whole = [c.ids if c.end is None else [*c.ids, c.end] for c in run(model, requests)]
    assert list(ids.values()) == whole and any(row[-1] in STOPS for row in whole)


def test_between_two_steps_the_model_is_untouched(model):
    """While the caller holds the generator: no hook, gradients on, and other answers do not disturb it."""
    requests = mixed_requests(samples=2, prompts=2)
    reference = list(stream(model, requests, stop_ids=STOPS, pad_id=PAD))
    steps = []
    for step in stream(model, requests, stop_ids=STOPS, pad_id=PAD):
        steps.append(step)
        assert hooks(model) == 0
        assert torch.is_grad_enabled()
        run(model, requests[:1])
    assert steps == reference


def test_closing_mid_stream_stops_the_work_and_leaves_nothing(model, alone):
    requests = mixed_requests()
    with ForwardCount(model) as shapes:
        steps = stream(model, requests, stop_ids=STOPS, pad_id=PAD)
        assert len(list(islice(steps, 3))) == 3
        steps.close()
        assert len(shapes) == 3
    assert hooks(model) == 0
    assert run(model, requests) == alone


@pytest.mark.parametrize("nth", [0, 3])
def test_an_exception_in_a_forward_leaves_nothing(model, alone, nth):
    requests = mixed_requests()
    calls = iter(range(100))

    def fail(*_):
        if next(calls) == nth:
            raise MemoryError("no room")

    hook = model.get_base_model().model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        run(model, requests)
    hook.remove()
    assert hooks(model) == 0
    assert run(model, requests) == alone


def test_training_is_possible_after_generation(model):
    run(model, mixed_requests(samples=1))
    parameters = [p for name, p in model.named_parameters() if "lora_A.sft" in name]
    for p in parameters:
        p.requires_grad_(True)
    model(input_ids=torch.tensor([prompt(8)])).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    model.zero_grad()


def test_requests_that_cannot_be_answered_are_refused(model):
    good = Request(prompt(4), None, seed=0)
    for field, value in [
        ("prompt_ids", ()),
        ("seed", -1),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_new_tokens", 0),
    ]:
        with pytest.raises(RequestError, match=field):
            replace(good, **{field: value})
    with pytest.raises(ModelError, match=r"'sfft' is not loaded .*did you mean 'sft'"):
        run(model, [replace(good, adapter="sfft")])
    with pytest.raises(ModelError, match="training mode"):
        try:
            run(model.train(), [good])
        finally:
            model.eval()
    model.merge_adapter(["sft"])
    try:
        with pytest.raises(ModelError, match="merged into the base"):
            adapter_layers(model)
    finally:
        model.unmerge_adapter()
    layers = adapter_layers(model)
    flat = torch.zeros(6, layers[0].base.in_features)
    with mixed(layers, ["sft", None]), pytest.raises(ModelError, match="6 rows of a batch of 2"):
        layers[0].module(flat)
    with model.disable_adapter(), pytest.raises(ModelError, match="are disabled"):
        run(model, [good])


def test_a_layer_that_one_of_the_adapters_lacks():
    """In a decoding step the adapters of a layer are stacked; rows of others keep the base's output."""
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5, bias=False)
    loras = {name: (torch.randn(r, 6), torch.randn(5, r), None, r / 3) for name, r in (("a", 2), ("c", 4))}
    layer = AdaptedLayer(base, {}, base, loras, {})
    names = ["c", "b", BASE, "a", "c"]
    x = torch.randn(5, 1, 6)
    with torch.no_grad():
        found, bare = layer.forward(Places(names, x.device), x), base(x)
    assert [ranks for _, _, ranks in layer.stacks.values()] == [(("a", 2), ("c", 4))]
    assert torch.equal(found[1:3], bare[1:3])
    for i in (0, 3, 4):
        down_RD, up_OR, _, scaling = loras[names[i]]
        assert torch.allclose(found[i], bare[i] + scaling * x[i] @ down_RD.T @ up_OR.T, atol=1e-5)
    with torch.no_grad():
        layer.forward(Places(["a", "b"], x.device), x[:2])
    assert list(layer.stacks) == [("a", "b")], "one copy of the adapters at a time"


def test_logits_that_are_not_finite_are_an_error(model):
    layer = model.get_base_model().model.norm
    hook = layer.register_forward_hook(lambda _, args, out: out * float("nan"))
    try:
        for temperature in (0.0, 1.0):
            with pytest.raises(RunError, match="not finite"):
                run(model, [Request(prompt(4), None, seed=0, temperature=temperature)])
    finally:
        hook.remove()
