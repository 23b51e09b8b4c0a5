"""Shots and stop texts: part of prompt and protocol, drawn from training data, and absent by default."""

import json
import shutil

import pytest

from dft_lora.config import load_recipe
from dft_lora.data.doctor import normalized
from dft_lora.data.own_tasks import find_task
from dft_lora.data.templates import TEMPLATES, Renderer
from dft_lora.errors import RequestError
from dft_lora.evaluation.attempts import read_attempts
from dft_lora.evaluation.evaluate import before, evaluate
from dft_lora.evaluation.shots import shots_for
from dft_lora.experiments.shipped import shipped_runs
from dft_lora.model.load import load_tokenizer
from dft_lora.runs.folder import RunFolder, read_json
from dft_lora.tasks import get_task
from dft_lora.tasks.base import Problem

SHOTS = tuple(Problem.ask(str(n), f"What is {n} + 1?", solution=f"It is {n + 1}.") for n in (1, 2))
ASKED = ({"role": "user", "content": "What is 7 + 1?"},)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(load_recipe("tiny_dft").model)


def recipe(*changes):
    return load_recipe("tiny_dft", [f"evaluate.{change}" for change in changes])


def test_a_text_template_repeats_itself(tokenizer):
    text = Renderer(tokenizer, "plain").after(SHOTS).prompt_text(ASKED)
    assert text == (
        "Question: What is 1 + 1?\nAnswer:\nIt is 2.\n\n"
        "Question: What is 2 + 1?\nAnswer:\nIt is 3.\n\n"
        "Question: What is 7 + 1?\nAnswer:\n"
    )
    assert (
        Renderer(tokenizer, "raw").after(SHOTS).prompt_text(ASKED).startswith("What is 1 + 1? It is 2.\n\n")
    )


def test_a_chat_template_gets_turns(tokenizer):
    turns = [{"role": "system", "content": "Be brief."}]
    for shot in SHOTS:
        turns += [*shot.messages, {"role": "assistant", "content": shot.solution}]
    renderer = Renderer(tokenizer, "chat")
    wanted = renderer.prompt_text([*turns, *ASKED])
    assert renderer.after(SHOTS).prompt_text([turns[0], *ASKED]) == wanted
    boxed = Renderer(tokenizer, "chat-boxed").after(SHOTS).prompt_text(ASKED)
    assert boxed.count(TEMPLATES["chat-boxed"].suffix) == 3


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_templates_hash_covers_the_shots(tokenizer, template):
    renderer = Renderer(tokenizer, template)
    hashes = [renderer.after(shots).fingerprint for shots in ((), SHOTS[:1], SHOTS)]
    assert hashes[0] == Renderer(tokenizer, template).fingerprint and len(set(hashes)) == 3


def test_shots_are_drawn_by_the_seed_from_training_problems_alone():
    task = get_task("arithmetic")
    drawn = shots_for(task, recipe("shots=8"))
    assert drawn == shots_for(task, recipe("shots=8", "samples=3"))
    assert drawn != shots_for(task, recipe("shots=8", "seed=1"))
    known = {problem.id for problem in task.problems("train")}
    asked = {normalized(problem) for problem in task.problems()}
    assert all(shot.id in known and normalized(shot) not in asked for shot in drawn)
    assert shots_for(task, recipe()) == ()


def test_what_the_test_set_asks_is_never_shown(tmp_path):
    """Of an own test set that holds all training problems but three, those three are left."""
    rows = [{"problem": f"{n}+1?", "solution": f"{n + 1}", "answer": f"{n + 1}"} for n in range(20)]
    for name, part in (("train", rows), ("held-out", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    chosen = load_recipe("tiny_dft", [f"data.source={tmp_path / 'train.jsonl'}", "evaluate.shots=3"])
    task = find_task(str(tmp_path / "held-out.jsonl"), chosen.data)
    assert {shot.question for shot in shots_for(task, chosen)} == {"0+1?", "1+1?", "2+1?"}
    with pytest.raises(RequestError, match=r"evaluate.shots: 4; held-out has 3 solved training problems"):
        shots_for(task, chosen.override(["evaluate.shots=4"]))


def test_multiple_choice_shows_the_right_choice(data_dir, monkeypatch):
    monkeypatch.setenv("DFT_LORA_DATA", str(data_dir))
    task = get_task("openbookqa")
    (shot,) = shots_for(task, recipe("shots=1"))
    assert shot.solution == shot.choices["ABCD".index(shot.answer)]


def test_a_text_ends_before_the_first_stop():
    assert (
        before("a Q: b\n\nc", ["\n\n", "Q:"]) == "a " and before("abc", ["d"]) == before("abc", []) == "abc"
    )


def test_a_stop_text_is_seen_as_soon_as_it_is_there(tokenizer):
    renderer = Renderer(tokenizer, "plain")
    ids = tokenizer("9-4=5\n#### 5\nQuestion: é is 3?", add_special_tokens=False)["input_ids"]
    for stop in ("####", "Question:", "é is", "\n", "5\nQ", tokenizer.eos_token):
        answer = [*ids, tokenizer.eos_token_id]
        ends = renderer.has_text([stop, "nowhere"])
        first = next(n for n in range(1, len(answer) + 1) if stop in tokenizer.decode(answer[:n]))
        assert [ends(answer[:n]) for n in range(1, first + 1)] == [False] * (first - 1) + [True], stop


@pytest.fixture
def base(tmp_path):
    shutil.copytree(shipped_runs()[0].path, tmp_path / "base")
    return RunFolder(tmp_path / "base")


def test_an_evaluation_with_shots_and_stop(base):
    """Its protocol is another one; by default nothing of it is recorded, as in earlier versions."""
    asked = {"limit": 2, "changes": ["samples=1"]}
    evaluate([base.path], ["arithmetic"], **asked)
    file = base.evaluation("arithmetic")
    plain, answers = read_json(file.with_suffix(".json"))["protocol"], read_attempts(file)
    assert not {"shots", "stop", "file"} & set(plain)
    changed = {"limit": 2, "changes": ["samples=1", "shots=2", 'stop=["####"]']}
    with pytest.raises(RequestError, match=r"template_hash: .*; shots: 0 -> 2; stop: \[\] -> \['####'\]"):
        evaluate([base.path], ["arithmetic"], **changed)
    stopped = {"limit": 2, "changes": ["samples=1", 'stop=["####"]'], "overwrite": True}
    evaluate([base.path], ["arithmetic"], **stopped)
    for whole, cut in zip(answers, read_attempts(file), strict=True):
        assert cut.text == before(whole.text, ["####"]) and cut.tokens <= whole.tokens
        assert not cut.truncated or whole.truncated
    assert any("####" in answer.text for answer in answers)
    evaluate([base.path], ["arithmetic"], **changed, overwrite=True)
    protocol = read_json(file.with_suffix(".json"))["protocol"]
    assert (protocol["shots"], protocol["stop"]) == (2, ["####"])
    assert protocol["template_hash"] != plain["template_hash"] and protocol["template"] == plain["template"]
