"""Laws of the one renderer, on the real Qwen2.5 and Phi-3 tokenizers and the embedded one."""

import pytest
from transformers import AutoTokenizer

from dft_lora.data.templates import TEMPLATES, Renderer
from dft_lora.errors import DataError, RecipeError
from dft_lora.model.tiny import TINY_DIR
from dft_lora.tasks.base import Problem

PROBLEM = Problem.ask("1", "What is 2 + 3?", solution="It is \\boxed{5}.", answer="5")


@pytest.fixture(scope="module", params=["qwen2.5", "phi-3-mini", "tiny"])
def tokenizer(request, data_dir):
    return AutoTokenizer.from_pretrained(
        TINY_DIR if request.param == "tiny" else data_dir / "tokenizers" / request.param
    )


@pytest.fixture(params=[*TEMPLATES, "auto"])
def renderer(request, tokenizer):
    return Renderer(tokenizer, request.param)


def test_prompt_ids_are_the_prompt_part_of_the_training_sequence(renderer):
    example = renderer.render(PROBLEM)
    assert list(example.ids[: example.prompt_length]) == renderer.prompt_ids(PROBLEM.messages)


def test_the_sequence_ends_in_the_end_token_and_holds_the_solution(renderer):
    example = renderer.render(PROBLEM)
    completion = example.ids[example.prompt_length :]
    assert completion[-1] == renderer.tokenizer.eos_token_id
    assert renderer.eos_id not in completion[:-1]
    assert renderer.decode(completion).strip() == PROBLEM.solution


def test_one_bos_at_most(renderer):
    bos = renderer.tokenizer.bos_token_id
    ids = renderer.prompt_ids(PROBLEM.messages)
    if bos is not None:
        assert ids.count(bos) <= 1


def test_generation_stops_at_eos_and_at_the_end_of_a_turn(data_dir):
    qwen = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2.5")
    qwen.eos_token = "<|endoftext|>"  # as in the base models
    renderer = Renderer(qwen, "qwen-boxed")
    assert renderer.stop_ids == {151_643, 151_645}
    assert renderer.completion_ids("x")[-1] == 151_643
    phi = Renderer(AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "phi-3-mini"))
    assert phi.stop_ids == set(phi.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"]))


def test_qwen_boxed_text_is_the_chat_template_with_the_papers_system_turn(data_dir):
    renderer = Renderer(AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2.5"), "qwen-boxed")
    question = "Why?\nPlease reason step by step, and put your final answer within \\boxed{}."
    turns = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": question},
    ]
    text = renderer.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert renderer.prompt_text([{"role": "user", "content": "Why?"}]) == text


def test_fingerprint_tells_templates_apart_and_is_stable(tokenizer):
    prints = {name: Renderer(tokenizer, name).fingerprint for name in TEMPLATES}
    assert len(set(prints.values())) == len(prints)
    assert prints == {name: Renderer(tokenizer, name).fingerprint for name in TEMPLATES}


def test_a_changed_chat_template_changes_the_fingerprint(data_dir):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2.5")
    before = Renderer(tokenizer, "chat").fingerprint
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\\n", "<|im_start|>assistant:\\n"
    )
    assert Renderer(tokenizer, "chat").fingerprint != before


def test_a_tokenizer_without_chat_template_gets_the_plain_one(data_dir):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2.5")
    tokenizer.chat_template = None
    assert Renderer(tokenizer).template.name == "plain"
    with pytest.raises(RecipeError, match="chat template"):
        Renderer(tokenizer, "chat")


def test_unknown_template_names_the_nearest(tokenizer):
    with pytest.raises(RecipeError, match="did you mean 'qwen-boxed'"):
        Renderer(tokenizer, "qwen-boxd")


def test_text_templates_hold_one_turn_only(tokenizer):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with pytest.raises(DataError, match="template: chat"):
        Renderer(tokenizer, "plain").prompt_ids(turns)
    assert Renderer(tokenizer, "chat").prompt_ids(turns)
