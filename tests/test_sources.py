"""Every row is read; a bad one is refused by its number."""

import json

import pytest

from dft_lora.config import DataConfig
from dft_lora.data.sources import load_problems
from dft_lora.errors import DataError

GOOD = {"problem": "1+1?", "solution": "2", "answer": "2"}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_gsm8k_columns_become_a_boxed_solution(data_dir):
    data = DataConfig(
        source=str(data_dir / "train" / "gsm8k_train.jsonl"), prompt="question", completion="answer"
    )
    problems = load_problems(data).problems
    assert len(problems) == 7473
    assert problems[0].answer == "72"
    assert "<<" not in problems[0].solution and "####" not in problems[0].solution
    assert (
        problems[0].solution.endswith("\\boxed{72}") or "\\boxed{72}" in problems[0].solution.splitlines()[-1]
    )


AS_IS = {
    "Markdown headings": "#### Rent\nIt is 1,200.\n#### Food\nIt is 300.",
    "a heading at the end": "Work:\n12+7=19\n#### Result",
    "headings and a marked number": "#### Work\n1,000+200\n#### 1,200",
    "a trailing mark": "The answer is 5\n####",
    "a mark within a line": "the answer follows #### 42",
    "a marked number that is not last": "#### 42\nand so on",
    "a decimal comma": "so\n#### 1,5",
}


@pytest.mark.parametrize("kind", AS_IS)
def test_only_a_last_line_of_a_marked_number_is_gsm8k(tmp_path, kind):
    source = write(tmp_path / "a.jsonl", [{"problem": "?", "solution": AS_IS[kind]}])
    [problem] = load_problems(DataConfig(source=source)).problems
    assert (problem.solution, problem.answer) == (AS_IS[kind], None)


def test_gsm8k_under_other_column_names_is_boxed_too(tmp_path):
    row = {"instruction": "?", "output": "2*600=$<<2*600=1200>>1,200 in all\n#### $1,200\n"}
    source = write(tmp_path / "a.jsonl", [row])
    [problem] = load_problems(DataConfig(source=source, prompt="instruction", completion="output")).problems
    assert (problem.solution, problem.answer) == ("2*600=$1,200 in all\n\\boxed{$1200}", "$1200")


TEXTS = [
    "12+7=19\n#### 19",
    "2*600=<<2*600=1200>>1,200\n#### 1,200",
    "#### 42",
    "####",
    "#### A\n1,000\n#### B\n",
    "so \\boxed{1,000} and\n#### 1,000\n\n",
    "  \t leading and trailing \r\n ",
    "caf\u00e9 \u2028 \U0001f600 e\u0301 \u202e \ufeff",
    '{"a": "\\n"}',
]


@pytest.mark.parametrize("columns", [{}, {"answer": "answer"}], ids=["found", "named"])
def test_a_row_with_its_own_answer_is_used_as_it_stands(tmp_path, columns):
    rows = [{"problem": f"{text}?", "solution": text, "answer": "7"} for text in TEXTS]
    problems = load_problems(DataConfig(source=write(tmp_path / "a.jsonl", rows), **columns)).problems
    assert [(p.question, p.solution, p.answer) for p in problems] == [(f"{t}?", t, "7") for t in TEXTS]


def test_a_named_answer_column_may_hold_numbers_and_must_hold_something(tmp_path):
    source = write(tmp_path / "a.jsonl", [GOOD | {"gold": gold} for gold in (5, 2.5, "x")])
    found = load_problems(DataConfig(source=source, answer="gold")).problems
    assert [problem.answer for problem in found] == ["5", "2.5", "x"]
    source = write(tmp_path / "b.jsonl", [GOOD | {"gold": gold} for gold in (1, None, True, " ")])
    rows = load_problems(DataConfig(source=source, answer="gold", skip_bad_rows=1))
    assert [bad.number for bad in rows.bad] == [2, 3, 4]


def test_a_column_that_is_only_called_answer_need_not_hold_one(tmp_path):
    rows = [GOOD | {"answer": answer} for answer in (None, ["a"], "", 3)]
    problems = load_problems(DataConfig(source=write(tmp_path / "a.jsonl", rows))).problems
    assert [problem.answer for problem in problems] == [None, None, None, "3"]


@pytest.mark.parametrize("text, answer", [("a\n#### 1,200", "1200"), ("Paris", "Paris")])
def test_the_answer_may_be_the_completion_itself(tmp_path, text, answer):
    data = {"prompt": "question", "completion": "answer", "answer": "answer"}
    source = write(tmp_path / "a.jsonl", [{"question": "?", "answer": text}])
    assert load_problems(DataConfig(source=source, **data)).problems[0].answer == answer


def test_math_columns_are_the_defaults(data_dir):
    problems = load_problems(DataConfig(source=str(data_dir / "train" / "math_train.jsonl"))).problems
    assert len(problems) == 7500 and problems[0].solution.endswith("\\boxed{0}$.")


def test_a_json_array_with_other_column_names(data_dir):
    source = str(data_dir / "train" / "llm_adapters_math_data.json")
    data = DataConfig(source=source, prompt="instruction", completion="output", answer="answer")
    with pytest.raises(DataError, match="3 of 3260 rows"):  # this public file holds three empty outputs
        load_problems(data)
    rows = load_problems(data.model_copy(update={"skip_bad_rows": 0.001}))
    assert [bad.number for bad in rows.bad] == [176, 1449, 2921]
    assert rows.problems[0].answer == "4.0"


def test_parquet_equals_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [GOOD | {"problem": f"{i}+1?"} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", rows)
    parquet, jsonl = (
        load_problems(DataConfig(source=str(tmp_path / f"a.{kind}"))) for kind in ("parquet", "jsonl")
    )
    assert parquet == jsonl


def test_messages_give_one_problem_for_each_assistant_turn(tmp_path):
    turns = [{"role": role, "content": f"{role} {i}"} for i in (1, 2) for role in ("user", "assistant")]
    problems = load_problems(DataConfig(source=write(tmp_path / "a.jsonl", [{"messages": turns}]))).problems
    assert [p.solution for p in problems] == ["assistant 1", "assistant 2"]
    assert [len(p.messages) for p in problems] == [1, 3]


def test_the_answer_of_a_messages_row_belongs_to_its_last_turn(tmp_path):
    turns = [{"role": role, "content": "#### 4"} for _ in (1, 2) for role in ("user", "assistant")]
    source = write(tmp_path / "a.jsonl", [{"messages": turns, "gold": "9"}])
    problems = load_problems(DataConfig(source=source, answer="gold")).problems
    assert [(p.solution, p.answer) for p in problems] == [("#### 4", None), ("#### 4", "9")]


def test_a_prompt_may_be_a_list_of_turns(tmp_path):
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    source = write(tmp_path / "a.jsonl", [GOOD | {"problem": turns}, GOOD | {"problem": turns[:3]}])
    rows = load_problems(DataConfig(source=source, skip_bad_rows=0.5))
    assert [(list(p.messages), p.solution) for p in rows.problems] == [(turns, "2")]
    assert "end with user" in rows.bad[0].reason


def test_prompts_need_no_solution(tmp_path):
    """The Hub's and parquet's rows have every column, perhaps null; turns may end with the question."""
    turns = [{"role": "user", "content": "1 + 1?"}]
    rows = [
        {"problem": "2 + 2?", "solution": None, "answer": "4"},
        {"problem": "2 + 2?", "solution": "", "answer": "4"},
        {"messages": turns, "answer": "2"},
        {"problem": None, "messages": turns, "solution": None, "answer": "2"},
        {"problem": "2 + 2?", "messages": None, "solution": None, "answer": "4"},
    ]
    rows = load_problems(DataConfig(source=write(tmp_path / "a.jsonl", rows)), kind="prompts")
    assert [(p.question, p.solution, p.answer) for p in rows.problems] == [
        ("2 + 2?", None, "4"),
        ("2 + 2?", None, "4"),
        ("1 + 1?", None, "2"),
        ("1 + 1?", None, "2"),
        ("2 + 2?", None, "4"),
    ]


def test_sample_is_random_seeded_and_a_subset(tmp_path):
    rows = [GOOD | {"problem": str(i)} for i in range(100)]
    source = write(tmp_path / "a.jsonl", rows)
    draw = [load_problems(DataConfig(source=source, sample=10), seed=s).problems for s in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    assert len(draw[0]) == 10 and {p.question for p in draw[0]} <= {str(i) for i in range(100)}


def test_messages_rows_are_counted_and_drawn_as_rows(tmp_path):
    turns = [{"role": role, "content": role} for _ in range(5) for role in ("user", "assistant")]
    source = write(tmp_path / "a.jsonl", [{"messages": turns}] * 4 + ["broken"] * 2)
    with pytest.raises(DataError, match="2 of 6 rows"):  # of the 22 problems and rows they would be 9 %
        load_problems(DataConfig(source=source, skip_bad_rows=0.2))
    rows = load_problems(DataConfig(source=source, skip_bad_rows=0.4, sample=3))
    assert (len(rows.problems), len(rows.bad), rows.total) == (15, 2, 5)
    assert len({problem.id.partition(".")[0] for problem in rows.problems}) == 3


IGNORED = {
    "split of a file": ({"split": "test"}, "data.split 'test': a file has no splits"),
    "subset of a file": ({"subset": "main"}, "data.subset 'main': a file has no subsets"),
    "subset of a task": (
        {"source": "gsm8k", "subset": "main"},
        "data.subset 'main': the task 'gsm8k' has no subsets",
    ),
    "split that a task lacks": ({"source": "arithmetic", "split": "dev"}, "arithmetic has no split 'dev'"),
}


@pytest.mark.parametrize("kind", IGNORED)
def test_a_field_that_would_be_ignored_is_refused_by_name(tmp_path, kind):
    fields, said = IGNORED[kind]
    source = write(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(DataError) as error:
        load_problems(DataConfig(**{"source": source, **fields}))
    assert said in str(error.value)


def parquet_bytes() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 500), file)
    return file.getvalue()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "middle"])
def test_a_corrupt_parquet_is_one_line_with_the_file_and_the_reason(tmp_path, damage):
    whole = parquet_bytes()
    broken = {
        "empty": b"",
        "text": b"hello" * 10,
        "cut": whole[: len(whole) // 2],
        "middle": whole[:30] + b"\xff" * 60 + whole[90:],
    }
    path = tmp_path / "a.parquet"
    path.write_bytes(broken[damage])
    with pytest.raises(DataError) as error:
        load_problems(DataConfig(source=str(path)))
    assert "a.parquet: " in str(error.value) and "\n" not in str(error.value)


BAD = {
    "missing column": ({"problem": "x", "solutoin": "y"}, "no column 'solution' (did you mean 'solutoin'?)"),
    "empty": (GOOD | {"solution": "  "}, "is empty"),
    "number": (GOOD | {"solution": 5}, "is int, not text"),
    "null": (GOOD | {"problem": None}, "is NoneType, not text"),
    "deeply nested": ("[" * 100_000, "broken JSON"),
    "broken JSON": ('{"problem": "x", ', "broken JSON"),
    "array": ("[1, 2]", "not a list"),
    "lone surrogate": ('{"problem": "\\ud800", "solution": "x"}', "lone surrogate"),
    "NUL": ('{"problem": "a\\u0000b", "solution": "x"}', "NUL"),
    "10 MB": (GOOD | {"solution": "x" * 10_000_000}, "10,000,000 characters"),
    "not UTF-8": (None, "not UTF-8 text"),
    "wrong role": ({"messages": [{"role": "wizard", "content": "x"}]}, "'wizard'"),
    "ends with user": ({"messages": [{"role": "user", "content": "x"}]}, "end with assistant"),
    "no turns": ({"messages": []}, "alternate"),
    "messages is text": ({"messages": "hello"}, "not a list"),
}


def test_a_null_prompt_beside_turns_counts_as_missing(tmp_path):
    """A table has all columns in every row."""
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    source = write(tmp_path / "a.jsonl", [{"problem": None, "solution": None, "messages": turns}])
    (problem,) = load_problems(DataConfig(source=source)).problems
    assert problem.solution == "2"


def test_a_problem_without_a_solution_may_have_turns_besides(tmp_path):
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    source = write(tmp_path / "a.jsonl", [{"problem": "1 + 2?", "answer": "3", "messages": turns}])
    (problem,) = load_problems(DataConfig(source=source), 0, "prompts").problems
    assert problem.answer == "3"


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_refused_by_number_and_skipped_when_allowed(tmp_path, kind):
    row, reason = BAD[kind]
    source = write(tmp_path / "a.jsonl", [GOOD, row or "REPLACE", *[GOOD] * 8])
    if row is None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(path.read_bytes().replace(b"REPLACE", b'{"problem": "\xff"}'))
    with pytest.raises(DataError) as error:
        load_problems(DataConfig(source=source))
    assert "row 2" in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)
    rows = load_problems(DataConfig(source=source, skip_bad_rows=0.1))
    assert (len(rows.problems), [bad.number for bad in rows.bad]) == (9, [2])
    with pytest.raises(DataError):
        load_problems(DataConfig(source=source, skip_bad_rows=0.09))


def test_the_hint_for_a_missing_solution_is_not_the_prompts_own_column(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"question": "1 + 1?", "reply": "2"}])
    with pytest.raises(DataError, match=r"no column 'solution'; it has question, reply"):
        load_problems(DataConfig(source=source, prompt="question"))


def test_missing_file_empty_file_and_unknown_task(tmp_path):
    with pytest.raises(DataError, match="no file"):
        load_problems(DataConfig(source=str(tmp_path / "nope.jsonl")))
    with pytest.raises(DataError, match="no rows"):
        load_problems(DataConfig(source=write(tmp_path / "a.jsonl", [])))
    with pytest.raises(DataError, match="array"):
        (tmp_path / "a.json").write_text('{"a": 1}')
        load_problems(DataConfig(source=str(tmp_path / "a.json")))


def test_an_unknown_source_names_the_nearest_task(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="did you mean 'arithmetic'"):
        load_problems(DataConfig(source="arithmetik"))
