"""The benchmark files: every gold solution is judged correct, other problems' answers are not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANG
from second_opinion import audit

from dft_lora import tasks
from dft_lora.errors import DataError, RequestError
from dft_lora.tasks import get_task, task_names
from dft_lora.tasks.judge import judge_many

SIZES = {
    ("math500", "test"): 500,
    ("minerva", "test"): 272,
    ("olympiadbench", "test"): 675,
    ("aime24", "test"): 30,
    ("amc23", "test"): 40,
    ("aime25", "test"): 30,
    ("gsm8k", "test"): 1319,
    ("gsm8k", "train"): 7473,
}
EXCEPTIONS: dict[str, str] = {}  # problem id -> why its gold solution is not judged correct: none


@pytest.fixture(autouse=True)
def local_files(monkeypatch, data_dir):
    monkeypatch.setenv("DFT_LORA_DATA", str(data_dir))


@pytest.mark.parametrize(("name", "split"), SIZES)
def test_every_gold_solution_is_correct(name, split):
    problems = get_task(name).problems(split)
    assert len(problems) == SIZES[name, split]
    assert len({problem.id for problem in problems}) == len(problems)
    assert all(problem.question.strip() and problem.answer.strip() for problem in problems)
    pairs = [(problem.solution or f"\\boxed{{{problem.answer}}}", problem.answer) for problem in problems]
    verdicts = judge_many(pairs)
    failed = {p.id: v for p, v in zip(problems, verdicts, strict=True) if not v.correct}
    assert failed.keys() == EXCEPTIONS.keys() & {problem.id for problem in problems}, failed


def test_published_solutions_are_read_without_our_box(data_dir):
    """As published: GSM8K by its `####`, AIME by its last box or framebox, MATH and Minerva by their box."""
    rows = [json.loads(line) for line in (data_dir / "eval/gsm8k_test.jsonl").read_text().splitlines()]
    pairs = [(row["answer"], row["answer"].rpartition("####")[2].strip()) for row in rows]
    for file in ("math500", "aime24"):
        rows = [json.loads(line) for line in (data_dir / f"eval/{file}.jsonl").read_text().splitlines()]
        pairs += [(row["solution"], row["answer"]) for row in rows]
    assert all(verdict.correct for verdict in judge_many(pairs))


@pytest.mark.parametrize("name", ["math500", "minerva", "olympiadbench"])
def test_every_reference_survives_other_typography(name):
    answers = [problem.answer for problem in get_task(name).problems()]
    pairs = [
        (f"so $$\\boxed{{ {a.replace(chr(92) + 'frac', chr(92) + 'dfrac')} \\,}}.$$", a) for a in answers
    ]
    wrong = [(pair, v) for pair, v in zip(pairs, judge_many(pairs), strict=True) if not v.correct]
    assert not wrong


@pytest.mark.parametrize(
    "name", ["math500", pytest.param("minerva", marks=pytest.mark.slow), "olympiadbench", "gsm8k"]
)
def test_the_next_problems_answer_is_wrong_and_the_audit_agrees(name):
    answers = [problem.answer for problem in get_task(name).problems()]
    shifted = [*answers[1:], answers[0]]
    verdicts = judge_many(
        [(f"\\boxed{{{answer}}}", other) for answer, other in zip(answers, shifted, strict=True)]
    )
    assert sum(verdict.status == "timed_out" for verdict in verdicts) < 0.02 * len(verdicts)
    assert sum(verdict.correct for verdict in verdicts) < 0.05 * len(verdicts)
    opinion = audit(zip(verdicts, shifted, strict=True))
    assert opinion.compared > 0.7 * len(verdicts)
    assert opinion.disagreements == ()


def test_gsm8k_solutions_are_clean():
    for problem in get_task("gsm8k").problems("train"):
        assert "<<" not in problem.solution and "####" not in problem.solution
        assert problem.solution.endswith(f"\\boxed{{{problem.answer}}}")


def test_olympiad_answers_have_all_values_and_their_unit():
    by_answer = {problem.answer for problem in get_task("olympiadbench").problems()}
    assert {"69,84", r"45 \text{ minute}", r"\frac{600}{7} \text{ km/h}", "1, 3, 5, 15"} <= by_answer


def write(folder: Path, name: str, *rows: dict) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_with_the_fields_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("DFT_LORA_DATA", str(tmp_path))
    write(tmp_path, "minerva_math.jsonl", {"question": "How wide?", "answer": "1.6"})
    write(tmp_path, "amc23.jsonl", {"id": 0, "question": "How far?", "answer": "27"})
    write(tmp_path, "aime25.jsonl", {"id": "0", "problem": "Find the area.", "answer": "468"})
    answers = {name: get_task(name).problems()[0].answer for name in ("minerva", "amc23", "aime25")}
    assert answers == {"minerva": "1.6", "amc23": "27", "aime25": "468"}


def test_a_bad_row_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DFT_LORA_DATA", str(tmp_path))
    write(tmp_path, "aime25.jsonl", {"question": "a", "answer": "1"}, {"question": "b"})
    with pytest.raises(DataError, match=r"aime25: row 2 .*no field 'answer'"):
        get_task("aime25").problems()
    (tmp_path / "eval/aime25.jsonl").write_text('{"question": "a", "answer": "1"}\n{"quest')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        get_task("aime25").problems()


def test_a_missing_file_says_where_it_comes_from(tmp_path):
    script = (
        "from dft_lora.tasks import get_task\nfrom dft_lora.errors import DataError\n"
        "try: get_task('olympiadbench').problems()\nexcept DataError as error: print(error)\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "DFT_LORA_DATA": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert done.stdout.count("\n") == 1
    for part in ("olympiadbench", "Hothan/OlympiadBench", "eval/olympiadbench.jsonl", "DFT_LORA_DATA"):
        assert part in done.stdout


def test_splits_that_are_not_there():
    with pytest.raises(DataError, match="math500 has no split 'train'; it has test"):
        get_task("math500").problems("train")


def test_the_registry_knows_its_tasks_and_imports_them_late():
    for name in task_names():
        assert get_task(name).name == name
    with pytest.raises(RequestError, match=r"unknown task 'olympiad'.*did you mean 'olympiadbench'"):
        get_task("olympiad")
    script = "import sys, dft_lora.tasks; print([m for m in sys.modules if m.startswith('dft_lora.tasks.')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG)
    assert "dft_lora.tasks.base" in done.stdout
    for name in tasks.MODULES:
        assert f"dft_lora.tasks.{name}" not in done.stdout
