"""The embedded base: what is shipped is what the script makes, and it is good but noisy, in nf4 too."""

import json
from hashlib import sha256
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft_lora.config import ModelConfig
from dft_lora.model.load import load_base
from dft_lora.model.tiny import TINY_DIR, build
from dft_lora.tasks.arithmetic import TASKS, base_training

PROVENANCE = json.loads((TINY_DIR / "PROVENANCE.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_DIR).eval()


@pytest.fixture(scope="module")
def nf4():
    return load_base(ModelConfig(quantization="nf4", dtype="float32"))[0]


def random_texts(count: int) -> list[str]:
    """Texts of random printable characters from all of Unicode, and of the blanks people type."""
    rng = Random(0)
    ranges = [
        (0x20, 0x7F),
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x370, 0x1000),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1FAFF),
    ]
    draw = [lambda: chr(rng.randrange(*rng.choice(ranges))), lambda: rng.choice(" \n\t  0123456789")]
    return ["".join(rng.choice(draw)() for _ in range(rng.randrange(40))) for _ in range(count)]


# -- what is shipped


def test_shipped_files_are_small_without_pickles_and_match_their_provenance():
    shipped = [path for path in TINY_DIR.iterdir() if path.suffix not in {".py", ""} and path.is_file()]
    assert {path.suffix for path in shipped} == {".json", ".jinja", ".safetensors"}
    assert sum(path.stat().st_size for path in shipped) <= 8e6
    for name, digest in PROVENANCE["sha256"].items():
        assert sha256((TINY_DIR / name).read_bytes()).hexdigest() == digest


def test_shape(model, nf4):
    assert 1e6 <= model.num_parameters() == PROVENANCE["parameters"] <= 2e6
    assert model.config.model_type == "llama"
    four_bit = [name for name, module in nf4.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(four_bit) == 7 * model.config.num_hidden_layers
    assert nf4.lm_head.weight.dtype == torch.float32
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.in_features % 64 == layer.out_features % 64 == 0


def test_recorded_accuracy_is_good_but_noisy_and_survives_nf4():
    for precision in PROVENANCE["accuracy"].values():
        sampled, greedy = (precision["arithmetic"][how]["all"] for how in ("temperature_1", "greedy"))
        assert 0.35 <= sampled <= 0.60
        assert greedy >= sampled + 0.15
        assert 0 < precision["arithmetic-long"]["temperature_1"]["all"] < sampled


# -- the tokenizer


def test_any_text_survives_the_round_trip(tokenizer):
    texts = [*random_texts(300), *(p.question + "\n" + p.solution for p in TASKS[1].problems()[:50])]
    texts += [
        r"\frac{1}{2} \boxed{42}",
        "a  b",
        " lead",
        "trail ",
        "",
        "\r\n",
        "n't isn't",
        "naïve №7 ½ 日本",
        "\x00\x7f",
    ]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_numbers_are_read_and_written_digit_by_digit(tokenizer):
    for number in ("7", "42", "1234567890"):
        assert tokenizer.tokenize(f"{number}+{number}") == [*number, "+", *number]
    assert not [
        token for token in tokenizer.get_vocab() if sum(c.isdigit() for c in token) and len(token) > 1
    ]


def test_special_tokens_are_distinct_single_ids(tokenizer):
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for token in build.SPECIAL:
        assert len(tokenizer(token).input_ids) == 1
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(TINY_DIR).config.vocab_size


def test_words_of_the_task_are_single_tokens(tokenizer):
    lengths = [len(tokenizer(problem.question).input_ids) for problem in TASKS[0].problems()]
    words = [len(problem.question.split()) for problem in TASKS[0].problems()]
    assert sum(lengths) < 1.6 * sum(words)  # digits, stops and the blanks before numbers make up the rest


def test_chat_template_writes_the_turns_and_the_generation_prompt(tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|system|>Be brief.<|end|><|user|>1+1?<|end|><|assistant|>"
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "2"}], tokenize=False)
    assert whole == prompt + "2<|end|>"


def test_labels_are_the_solution_and_its_end(tokenizer):
    from dft_lora.data.templates import Renderer

    problem = TASKS[0].problems()[0]
    ids, labels = build.encode(Renderer(tokenizer), problem)
    kept = labels != build.IGNORE
    assert tokenizer.decode(labels[kept]) == problem.solution + tokenizer.eos_token
    assert torch.equal(ids[kept], labels[kept])
    assert tokenizer.decode(ids[~kept]).endswith(problem.question + "<|end|><|assistant|>")


# -- the script


def test_the_script_makes_the_shipped_tokenizer(tmp_path):
    build.build_tokenizer(build.corpus()).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (TINY_DIR / name).read_text()


def test_training_is_repeatable_and_learns(tokenizer):
    one, losses = build.train(tokenizer, examples=128, seed=0)
    two, _ = build.train(tokenizer, examples=128, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert len(losses) == 4 and losses[-1] < 0.95 * losses[0]


def test_every_row_is_in_one_batch_and_padding_carries_no_label(tokenizer):
    from dft_lora.data.templates import Renderer

    renderer = Renderer(tokenizer)
    rows = [build.encode(renderer, problem) for problem in base_training(101).problems()]
    seen = []
    for ids, labels in build.batches(rows, 16, Random(0)):
        for row, label in zip(ids, labels, strict=True):
            seen.append(label[label != build.IGNORE].tolist())
            end = (label != build.IGNORE).nonzero().max() + 1
            assert row[end - 1] == tokenizer.eos_token_id
    assert sorted(seen) == sorted(label[label != build.IGNORE].tolist() for _, label in rows)


# -- what it can do


def test_base_is_much_better_greedy_than_sampled_and_nf4_keeps_it(model, nf4, tokenizer):
    problems = TASKS[0].problems()[:90]
    torch.manual_seed(0)
    greedy = build.accuracy(model, tokenizer, problems, 0.0, 96)
    sampled = build.accuracy(model, tokenizer, problems, 1.0, 96)
    assert greedy["all"] >= sampled["all"] + 0.10
    assert build.accuracy(nf4, tokenizer, problems, 0.0, 96)["all"] >= greedy["all"] - 0.12


@pytest.mark.slow
def test_recorded_accuracy_is_measured_again(model, tokenizer):
    measured = build.measure(model, tokenizer, PROVENANCE["samples_per_problem"])
    for task, recorded in PROVENANCE["accuracy"]["fp32"].items():
        assert measured[task]["greedy"]["all"] == pytest.approx(recorded["greedy"]["all"], abs=0.01)
        assert measured[task]["temperature_1"]["all"] == pytest.approx(
            recorded["temperature_1"]["all"], abs=0.05
        )
