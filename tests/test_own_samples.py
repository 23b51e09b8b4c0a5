"""Own samples are training data: what the base wrote, judged correct, and read back as it was written."""

import json

import pytest
from click.testing import CliRunner

from dft_lora.cli import main
from dft_lora.config import load_recipe
from dft_lora.data.sources import load_problems
from dft_lora.errors import DataError
from dft_lora.experiments.own_samples import own_samples
from dft_lora.experiments.shipped import shipped_runs
from dft_lora.tasks.judge import judge
from dft_lora.training.loop import train

pytestmark = pytest.mark.usefixtures("many_runs")


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


def test_prompts_that_exceed_max_length_are_left_out_and_counted(tmp_path, caplog):
    tasks = load_problems(load_recipe("tiny_dft", ["data.sample=12"]).data).problems
    rows = [{"problem": p.question, "answer": p.answer} for p in tasks]
    rows.append({"problem": "and so on " * 100, "answer": "5"})
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = [f"data.source={source}", "data.max_length=100"]
    read(own_samples(load_recipe("tiny_dft", mine), tmp_path / "own.jsonl", samples=2, max_new_tokens=96))
    assert "1 of 13 prompts are longer than data.max_length 100: left out" in caplog.text
    with pytest.raises(DataError, match=r"data\.max_length 3: all prompts are longer"):
        own_samples(load_recipe("tiny_dft", [*mine, "data.max_length=3"]), tmp_path / "other.jsonl")


def sample(*arguments):
    return CliRunner().invoke(main, ["sample", "tiny_dft", "--set", "data.sample=24", *map(str, arguments)])


def test_the_command_writes_answers_and_pairs(tmp_path):
    own, pairs = tmp_path / "own.jsonl", tmp_path / "pairs.jsonl"
    done = sample("--out", own, "--pairs", pairs, "--samples", 3)
    assert done.exit_code == 0 and done.stdout.split() == [str(own)], done.output
    assert all(judge(row["solution"], row["answer"]).correct for row in read(own))
    rows = read(pairs)
    assert rows and all(judge(row["chosen"], row["answer"]).correct for row in rows)
    assert not any(judge(row["rejected"], row["answer"]).correct for row in rows)
    assert len({(row["problem"], row[side]) for row in rows for side in ("chosen", "rejected")}) == 2 * len(
        rows
    )
    sides = load_problems(load_recipe("tiny_dft", [f"data.source={pairs}"]).data, kind="pairs").problems
    assert [(p.question, p.solution) for p in sides] == [
        (row["problem"], row[side]) for row in rows for side in ("chosen", "rejected")
    ]


def test_a_run_samples_with_its_own_adapter(tmp_path):
    """Step 0 of a run that learned nothing is the base; after training the answers differ."""
    run = tmp_path / "qwen2.5_run"  # with a dot
    train(
        load_recipe(
            "tiny_sft", ["data.sample=24", "train.max_steps=4", "train.batch_size=16", f"output={run}"]
        )
    )
    files = {"base": [], "run": ["--run", run]}
    texts = {}
    for name, more in files.items():
        done = sample("--out", tmp_path / f"{name}.jsonl", "--samples", 2, *more)
        assert done.exit_code == 0, done.output
        texts[name] = (tmp_path / f"{name}.jsonl").read_text()
    assert texts["base"] != texts["run"]


def test_a_base_as_the_run_that_samples_is_refused(tmp_path):
    base = shipped_runs()[0].path
    done = sample("--out", tmp_path / "own.jsonl", "--run", base)
    assert done.exit_code == 2 and f"--run: {base} has no adapter" in done.output


def test_files_are_reused_only_as_they_were_written(tmp_path):
    """`--pairs` of another command, or an edit, replaced what this one had written."""
    out, pairs = tmp_path / "own.jsonl", tmp_path / "pairs.jsonl"
    arguments = ("--out", out, "--pairs", pairs, "--set", "data.sample=24", "--samples", 4)
    assert sample(*arguments).exit_code == 0
    assert sample(*arguments).exit_code == 0
    pairs.write_text(pairs.read_text() + "\n")
    done = sample(*arguments)
    assert done.exit_code == 2 and "--overwrite" in done.output


def test_answers_that_are_all_cut_are_refused_by_name(tmp_path):
    done = sample("--out", tmp_path / "own.jsonl", "--set", "rollouts.max_new_tokens=2")
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert "all 192 answers were cut at rollouts.max_new_tokens 2" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "own.json"], "--out: own.json must end in .jsonl"),
        (["--out", "own.jsonl", "--pairs", "own.jsonl"], "--pairs: give another file than --out"),
        (["--out", "own.jsonl", "--run", "nowhere"], "nowhere"),
        (["--out", "own.jsonl", "--set", "rollouts.sample=3"], "did you mean 'samples'?"),
        (["--out", "own.jsonl", "--set", "rollouts.truncated=kept"], "rollouts.truncated"),
    ],
)
def test_wrong_requests_end_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = sample(*arguments)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_sample_did_not_write_is_kept(tmp_path):
    """The file itself, the pairs, the record beside them, and the data that is sampled from."""
    out, record, pairs = (tmp_path / name for name in ("own.jsonl", "own.made.json", "pairs.jsonl"))
    for mine in (out, record, pairs):
        mine.write_text("[1]")
        done = sample("--out", out, "--pairs", pairs)
        assert done.exit_code == 2 and f"{mine} exists" in done.stderr, done.stderr
        assert mine.read_text() == "[1]" and list(tmp_path.iterdir()) == [mine]
        mine.unlink()
    source = tmp_path / "mine.jsonl"
    source.write_text(json.dumps({"problem": "1 + 1?", "solution": "2", "answer": "2"}) + "\n")
    done = sample("--out", source, "--set", f"data.source={source}", "--overwrite")
    assert done.exit_code == 2 and "is the data that is sampled from" in done.stderr
    done = sample("--out", out, "--pairs", tmp_path / "x" / ".." / "own.jsonl")
    assert done.exit_code == 2 and "--pairs: give another file than --out" in done.stderr


PAIR = {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "6"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "5"}, "no column 'rejected'.*it has prompt, chosen"),
        (PAIR | {"rejected": "5"}, "chosen and rejected are the same text"),
        (PAIR | {"chosen": [{"role": "assistant", "content": "5"}]}, "column 'chosen' is list, not text"),
        ({"chosen": "5", "rejected": "6"}, "no column 'problem'"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row, message, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PAIR) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"row 2: {message}"):
        load_problems(load_recipe("tiny_dft", [f"data.source={file}"]).data, kind="pairs")
