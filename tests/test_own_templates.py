"""Own prompts: a text, or a chat template in a file. The run stores it, and evaluation uses it."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from dft_lora.cli import main
from dft_lora.config import load_recipe
from dft_lora.data.sources import load_problems
from dft_lora.data.templates import Renderer, shown
from dft_lora.errors import DataError, RecipeError
from dft_lora.evaluation.run_set import renderer_of
from dft_lora.export import card
from dft_lora.model.tiny import TINY_DIR
from dft_lora.runs.folder import RunFolder
from dft_lora.training.loop import train

ROOT = Path(__file__).parent.parent
TEXT = "[{system}]\nQ: {question}\nA:"
JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "Why {system}?"}
SYSTEM = {"role": "system", "content": "Be {question} brief."}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_DIR)


def test_a_text_is_filled_in_one_pass(tokenizer):
    """What a person wrote into a message is never taken for a place of the template."""
    renderer = Renderer(tokenizer, TEXT)
    assert renderer.prompt_text([USER]) == "[]\nQ: Why {system}?\nA:"
    assert renderer.prompt_text([SYSTEM, USER]) == "[Be {question} brief.]\nQ: Why {system}?\nA:"
    with pytest.raises(DataError, match=r"takes one user turn, not 2; use template: chat"):
        Renderer(tokenizer, "Q: {question}").prompt_text([SYSTEM, USER])


def test_a_file_and_its_content_are_the_same_template(tokenizer, tmp_path):
    for text in (TEXT, JINJA):
        file = tmp_path / "mine.txt"
        file.write_text(text)
        from_file, written_out = Renderer(tokenizer, str(file)), Renderer(tokenizer, text)
        assert from_file.template == written_out.template and from_file.template.name == text
        assert from_file.fingerprint == written_out.fingerprint


def test_a_chat_template_renders_all_turns(tokenizer):
    turns = [SYSTEM, USER, {"role": "assistant", "content": "So."}, USER]
    expected = "".join(f"<{t['role']}>{t['content']}{tokenizer.eos_token}" for t in turns) + "<assistant>"
    assert Renderer(tokenizer, JINJA).prompt_text(turns) == expected


def test_the_fingerprint_covers_what_the_probe_does_not_show(tokenizer):
    """A template that treats system turns differently is another template; known ones keep theirs."""
    other = JINJA.replace("<{{ m.role }}>", "{% if m.role == 'system' %}!{% endif %}<{{ m.role }}>")
    assert Renderer(tokenizer, JINJA).prompt_ids([USER]) == Renderer(tokenizer, other).prompt_ids([USER])
    assert Renderer(tokenizer, JINJA).fingerprint != Renderer(tokenizer, other).fingerprint
    shipped = json.loads((ROOT / "dft_lora/experiments/shipped_runs/dft/run.json").read_text())
    assert Renderer(tokenizer, shipped["template"]).fingerprint == shipped["template_hash"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatt", "'chatt' is unknown (did you mean 'chat'?); known: chat, "),
        ("no/such.jinja", "or a file with such a text"),
        ("{question} and {question}", "must contain {question} once, not 2 times"),
        ("{system}{system}{question}", "must contain {system} once, not 2 times"),
        ("{% for m in messages %}", "is no chat template: "),
        ("{{ messages[3].content }}", "is no chat template: "),
        ("{% if true %}hello{% endif %}", "leaves out the user's message"),
        ("empty.txt", "empty.txt: has no {question}, and is no chat template"),
        ("latin.txt", "latin.txt: not UTF-8 text"),
        ("large.txt", "bytes are too many"),
        (".", "'.' is unknown"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tokenizer, tmp_path, monkeypatch, template, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("Answer:")
    Path("latin.txt").write_bytes("Où {question}".encode("latin-1"))
    Path("large.txt").write_text("{question}" + " " * 2**20)
    with pytest.raises(RecipeError) as refused:
        Renderer(tokenizer, template)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    result = CliRunner().invoke(main, ["train", "tiny_dft", "--set", f"data.template={json.dumps(template)}"])
    assert result.exit_code == 2 and message in result.output and not Path("runs").exists()


def test_turns_that_a_chat_template_refuses_are_one_line(tokenizer):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + JINJA
    with pytest.raises(DataError, match="refuses these turns: no system"):
        Renderer(tokenizer, strict).prompt_text([SYSTEM, USER])


def test_an_own_template_is_shown_in_one_short_line():
    assert shown("chat") == "'chat'" and "\n" not in shown(TEXT)
    long = "{question}\n" + "x" * 500
    assert len(shown(long)) < 60 and shown(long) != shown(long + "y")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The two examples, a few steps each, from a copy that is gone afterwards."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "examples", home / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        runs = {}
        for name in ("alpaca", "support"):
            changes = ["train.max_steps=2", f"output={home / 'runs' / name}"]
            runs[name] = train(load_recipe(f"examples/{name}.yaml", changes))
        shutil.rmtree(home / "examples")
        yield runs


def test_the_run_stores_the_template_and_evaluation_uses_it(trained, tokenizer):
    for name, ends in (("alpaca", "### Response:\n"), ("support", "Agent: ")):
        run: RunFolder = trained[name]
        renderer = renderer_of([run], [run.recipe()])
        assert renderer.fingerprint == run.run()["template_hash"]
        assert renderer.prompt_text([{"role": "user", "content": "Hm?"}]).endswith(ends)
        assert "Prompt template: " in card(run)
        done = CliRunner().invoke(
            main, ["evaluate", str(run.path), "--task", "arithmetic", "--samples", "1", "--limit", "2"]
        )
        assert done.exit_code == 0, done.output


def test_alpaca_rows_become_one_prompt(monkeypatch):
    monkeypatch.chdir(ROOT)
    problems = load_problems(load_recipe("examples/alpaca.yaml").data).problems
    assert problems[0].question == "Give three words that rhyme with 'bell'."
    assert problems[2].question == "Name the capital of the country.\n\nPortugal"


def test_only_the_assistants_turns_of_a_conversation_are_trained_on(monkeypatch, tokenizer):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("examples/support.yaml")
    renderer = Renderer(tokenizer, recipe.data.template)
    rows = [json.loads(line) for line in Path("examples/support.jsonl").read_text().splitlines()]
    spoken = [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"]
    examples = [renderer.render(problem) for problem in load_problems(recipe.data).problems]
    assert [renderer.decode(e.ids[e.prompt_length :]) for e in examples] == spoken


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{instruction}\n{inptu}", "row 1: no column 'inptu' (did you mean 'input'?)"),
        ("{input}", "row 1: the prompt '{input}' is empty"),
    ],
)
def test_a_prompt_from_columns_that_cannot_be_filled(tmp_path, prompt, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Count.", "input": None, "output": "1"}))
    data = load_recipe("tiny_dft", [f"data.source={file}", "data.completion=output"]).data
    with pytest.raises(DataError) as refused:
        load_problems(data.model_copy(update={"prompt": prompt}))
    assert message in str(refused.value)
