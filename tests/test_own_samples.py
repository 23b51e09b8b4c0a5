"""Own samples are training data: what the base wrote, judged correct, and read back as it was written."""

import json

import pytest

from dft_lora.config import load_recipe
from dft_lora.data.sources import load_problems
from dft_lora.errors import DataError
from dft_lora.experiments.own_samples import own_samples


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_own_samples_train_as_the_base_wrote_them(tmp_path):
    """The embedded base ends its answers in `#### x`, which is also GSM8K's mark."""
    file = own_samples(load_recipe("tiny_dft", ["data.sample=24"]), tmp_path / "own.jsonl", samples=2)
    rows = read(file)
    assert any("\n#### " in row["solution"] for row in rows)
    for column in ("null", "answer"):
        data = load_recipe("tiny_dft", [f"data.source={file}", f"data.answer={column}"]).data
        problems = load_problems(data).problems
        assert [{"problem": p.question, "solution": p.solution, "answer": p.answer} for p in problems] == rows


def test_own_data_is_sampled_by_the_answer_column(tmp_path):
    tasks = load_problems(load_recipe("tiny_dft", ["data.sample=12"]).data).problems
    source = tmp_path / "mine.jsonl"
    source.write_text(
        "".join(
            json.dumps({"q": p.question, "a": "no worked solution", "gold": float(p.answer)}) + "\n"
            for p in tasks
        )
    )
    mine = [f"data.source={source}", "data.prompt=q", "data.completion=a"]
    with pytest.raises(DataError, match=r"no row has a reference answer.*data\.answer"):
        own_samples(load_recipe("tiny_dft", mine), tmp_path / "own.jsonl", max_new_tokens=96)
    recipe = load_recipe("tiny_dft", [*mine, "data.answer=gold"])
    rows = read(own_samples(recipe, tmp_path / "own.jsonl", samples=2, max_new_tokens=96))
    assert rows and {row["problem"] for row in rows} <= {p.question for p in tasks}
