"""The judge: a table of cases, laws that hold for every case, and answers that want to hang it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from patience import HANG, wait_for
from second_opinion import audit, second_opinion

from dft_lora.errors import DataError, RunError
from dft_lora.tasks import judge as judging
from dft_lora.tasks.answers import NeedsAlgebra, agree
from dft_lora.tasks.extraction import clean_gsm8k, extract
from dft_lora.tasks.judge import Verdict, judge, judge_many

HERE = Path(__file__).resolve().parent
HANGS = (r"\boxed{(99999!)!}", r"\sqrt{2}")  # sympy would compute for days


class Case(NamedTuple):
    """A line of the table: an answer to be boxed, or, after `>`, a whole text (⏎ for a line break)."""

    reference: str
    answer: str
    status: str
    why: str = ""

    @property
    def boxed(self) -> bool:
        return not self.answer.startswith(">")

    @property
    def text(self) -> str:
        return f"\\boxed{{{self.answer}}}" if self.boxed else self.answer[1:].replace("⏎", "\n")


CASES = [
    Case(*line.split("\t"))
    for line in (HERE / "judge_cases.tsv").read_text("utf-8").splitlines()
    if not line.startswith("# ")
]


def mistakes(texts: list[str], cases: list[Case]) -> list[str]:
    verdicts = judge_many(list(zip(texts, (case.reference for case in cases), strict=True)))
    return [
        f"{case.reference!r} | {text!r}: {verdict.status} ({verdict.extracted}), not {case.status} {case.why}"
        for text, case, verdict in zip(texts, cases, verdicts, strict=True)
        if verdict.status != case.status
    ]


# --------------------------------------------------------------------------------------- verdicts


def test_every_case_of_the_table():
    assert len(CASES) >= 300
    assert {case.status for case in CASES} == {"correct", "wrong", "unparsable"}
    assert not mistakes([case.text for case in CASES], CASES)


def test_every_reference_is_a_correct_answer_to_itself():
    references = sorted({case.reference for case in CASES})
    cases = [Case(reference, reference, "correct") for reference in references]
    assert not mistakes([case.text for case in cases], cases)


def test_typography_does_not_change_a_verdict():
    cases = [
        case for case in CASES if case.boxed and case.status != "unparsable" and case.answer.count("{") < 9
    ]
    cases = [case for case in cases if case.answer.count("{") == case.answer.count("}")]
    dressed = [case.answer.replace(r"\frac", r"\dfrac") for case in cases]
    dressed = [f"Therefore\n$$\\boxed{{\\displaystyle \\, {answer} }}.$$" for answer in dressed]
    assert len(cases) > 400
    assert not mistakes(dressed, cases)


def test_one_and_many_agree_in_any_thread():
    cases = CASES[::9]
    with ThreadPoolExecutor(6) as threads:
        one_by_one = list(threads.map(lambda case: judge(case.text, case.reference), cases))
    assert one_by_one == judge_many([(case.text, case.reference) for case in cases])


def test_the_verdict_names_what_was_judged():
    assert judge(r"first \boxed{1}, no: \boxed{\frac{1}{2}}", "0.5") == Verdict("correct", r"\frac{1}{2}")
    assert judge("no idea at all", "5") == Verdict("unparsable", None)
    assert judge(r"\boxed{" + "7" * 5000 + "}", "5").status == "unparsable"


def test_a_hostile_reference_costs_no_more_than_an_ordinary_one():
    """Equal answers are compared in the page's own process, so every step is linear or bounded."""
    deep = "(" * 1000 + "1" + ")" * 1000
    references = ["1" + " " * 7900 + "2", "\\ " * 2600, "degrees " * 1000, deep]
    started = time.process_time()
    assert [judge("\\boxed{5}", reference).status for reference in references[:3]] == ["wrong"] * 3
    assert judge("\\boxed{5}", deep).status in ("wrong", "unparsable")
    assert judge("\\boxed{(" + deep + ")}", deep).status in ("correct", "unparsable")
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "rambling", ["many more words of it " * 5, "letters" * 20, "m/s^2 " * 30, "feet. " * 30]
)
def test_an_answer_that_rambles_on_after_a_number_is_judged_at_once(rambling):
    """A model at a high temperature writes such answers. The pattern of units once took exponential time."""
    started = time.process_time()
    assert judge(f'\\boxed{{24{rambling}"}}', "24").status in ("wrong", "unparsable")
    assert time.process_time() - started < 2


def test_an_empty_reference_is_refused():
    with pytest.raises(DataError, match="reference answer is empty"):
        judge(r"\boxed{5}", " ")


def test_exact_comparison_says_when_it_needs_algebra():
    assert agree("0.5", r"\frac12") and not agree("2", "3")
    with pytest.raises(NeedsAlgebra):
        agree(r"\sqrt{8}", r"2\sqrt{2}")
    assert agree(
        r"(1, \sqrt{8})", r"(1, 2\sqrt{2})", algebra=lambda a, b: (a, b) == (r"\sqrt{8}", r"2\sqrt{2}")
    )


def test_gsm8k_solutions_lose_their_marks_and_gain_a_box():
    solution, answer = clean_gsm8k("He has 2*600=$<<2*600=1200>>1200.\n#### 1,200")
    assert (solution, answer) == ("He has 2*600=$1200.\n\\boxed{1200}", "1200")
    assert extract(solution) == answer
    with pytest.raises(ValueError, match="####"):
        clean_gsm8k("no mark")


# ------------------------------------------------------------------------------------------ audit


def test_a_second_opinion_finds_wrong_verdicts_and_leaves_right_ones():
    pairs = [
        (f"\\boxed{{{case.answer}}}", case) for case in CASES if case.boxed and case.status != "unparsable"
    ]
    right = audit((Verdict(case.status, extract(text)), case.reference) for text, case in pairs)
    flip = {"correct": "wrong", "wrong": "correct"}
    flipped = audit((Verdict(flip[case.status], extract(text)), case.reference) for text, case in pairs)
    assert right.compared == flipped.compared > 0.6 * right.judged
    assert right.rate < 0.04  # rules that it does not know: integers exact, units, bits beyond 53
    assert flipped.rate > 0.96


def test_second_opinions():
    assert second_opinion(r"\frac{\sqrt{8}}{2}", r"\sqrt2") is True
    assert second_opinion("(x+1)^2", "x^2+2x+1") is True
    assert second_opinion("(x+1)^2", "x^2+2x") is False
    assert second_opinion("red", "blue") is None
    assert second_opinion(r"10^{10^{10}}", "5") is None


# ------------------------------------------------------------------------- processes and hostility


def spent() -> float:
    """Processor time, in seconds, of this process, its checkers and all that they have ended.

    What an answer costs, on any machine; on the clock it costs as much as the machine's other work makes it.
    """
    time.sleep(0.05)  # a killed child is counted once it is reaped
    total = 0.0
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # its own, and that of the children it has reaped
    return total


def in_a_thread(work) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(HANG)
    assert not thread.is_alive(), "hangs"


def test_a_hanging_answer_is_ended_and_does_not_stall_the_next():
    judge(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
    verdicts = []

    def work():
        for text, reference in [HANGS, (r"\boxed{\sqrt{12}}", r"2\sqrt{3}")]:
            start = spent()
            verdicts.append((judge(text, reference).status, spent() - start))

    in_a_thread(work)
    (hung, hung_s), (next_, next_s) = verdicts
    assert (hung, next_) == ("timed_out", "correct")
    assert judging.LIMIT - 0.1 <= hung_s < 5
    assert next_s < 1


@pytest.fixture
def short_limit(monkeypatch):
    """A hanging answer is ended after a third of the time; the limit itself is measured above."""
    monkeypatch.setattr(judging, "LIMIT", judging.LIMIT / 3)


def test_hanging_answers_among_ordinary_ones_cross_no_wires(short_limit):
    ordinary = [(f"\\boxed{{\\sqrt{{{k * k * 2}}}}}", f"{k}\\sqrt{{2}}", "correct") for k in range(2, 40)]
    ordinary += [(f"\\boxed{{\\sqrt{{{k * k * 3}}}}}", f"{k}\\sqrt{{2}}", "wrong") for k in range(2, 40)]
    jobs = [*ordinary[::2], (*HANGS, "timed_out"), *ordinary[1::2]]
    verdicts = judge_many([(text, reference) for text, reference, _ in jobs])
    assert [verdict.status for verdict in verdicts] == [status for *_, status in jobs]


def hostile() -> list[str]:
    """200 answers made to hang, to overflow, to recurse or to fill memory."""
    big = 1_000_000
    towers = ["^{".join([base] * height) + "}" * (height - 1) for base in "2379" for height in range(3, 9)]
    towers += ["^{".join(["10"] * height) + "}" * (height - 1) for height in range(3, 9)]
    nests = [
        left * depth + "1" + right * depth
        for left, right in [
            ("{", "}"),
            ("(", ")"),
            (r"\frac{1}{", "}"),
            (r"\sqrt{", "}"),
            (r"\left(", r"\right)"),
        ]
        for depth in (10, 100, 200, 400, 1_000, 10_000, 100_000)
    ]
    floods = [
        letter * big for letter in ["9", "x", "{", "}", "(", "$", "\\", "#", " ", "\n", "-", "1,", "é", "\0"]
    ]
    floods += [
        word * (big // len(word)) for word in [r"\boxed{", r"\boxed ", "answer is ", "#### ", r"\pm ", "a b "]
    ]
    repeats = [
        unit * (900 // len(unit)) + "1"
        for unit in [
            "1+",
            "1/",
            "-",
            "x+",
            r"x\cdot ",
            "1,",
            "(1,2),",
            r"\{1\},",
            r"1\pm",
            r"\sqrt ",
            "2^",
            "1^{2}",
            "!",
        ]
    ]
    operators = [
        template.replace("N", size)
        for template in (
            *("N!", "(N!)!", "x^{N}-y", "(x+y)^{N}", r"\prod_{k=1}^{N} k", r"\sum_{k=1}^{N} \frac{1}{k}"),
            *(r"\binom{2N}{N}", r"\sqrt[N]{2}", r"\frac{1}{3^{N}}", "eN", r"\log_2 (N!)", r"\sin(N!)"),
            *(r"7^{N} \bmod 10", r"\lfloor \pi^{N} \rfloor", r"\sqrt{2}^{N}", r"\gcd(N!, N)"),
        )
        for size in ("1000", "99999", "123456", "9999999", "999999999", "1" + "0" * 18)
    ]
    strange = [r"\begin{pmatrix}" * 60, r"\int_0^1 x^{x^x} dx", r"\lim_{x\to 0} x^{x^x}", "\ud800"]
    return [*towers, *nests, *floods, *repeats, *operators, *strange, "1" + "0" * 990, "1e999999999"]


def slowest(answers: list[str]) -> float:
    """The dearest judgement, in seconds of processor time, called from a thread; none may be correct."""
    seconds = []

    def work():
        for i, answer in enumerate(answers):
            text = answer if len(answer) >= 900_000 and i % 2 else f"\\boxed{{{answer}}}"
            start = spent()
            assert judge(text, [r"\sqrt{2}", "x^2-1", "8128"][i % 3]).status != "correct", answer[:60]
            seconds.append(spent() - start)

    in_a_thread(work)
    assert len(seconds) == len(answers)
    return max(seconds)


def test_hostile_answers_end_in_time_a_sample(short_limit):
    answers, most = hostile(), judging.LIMIT + 2
    assert slowest([answer for answer in answers if len(answer) > 5000][::3]) < most
    assert slowest([r"10^{10^{10}}", r"\prod_{k=1}^{9999999} k", r"\lim_{x\to 0} x^{x^x}"]) < most


@pytest.mark.slow
def test_hostile_answers_end_in_time():
    answers = hostile()
    assert len(answers) >= 200
    assert slowest(answers) < 5


def test_ordinary_answers_a_second_of_processor_time():
    numbers = [(f"\\boxed{{{k}/8}}", f"\\frac{{{k}}}{{8}}") for k in range(300)]
    roots = [(f"\\boxed{{{k}\\sqrt{{5}}+x}}", f"x+\\sqrt{{{5 * k * k}}}") for k in range(2, 62)]
    judge_many(roots[:4])
    start = spent()
    assert all(verdict.correct for verdict in judge_many(numbers + roots))
    rate = (len(numbers) + len(roots)) / (spent() - start)
    print(f"{rate:.0f} answers a second of processor time, {len(roots)} of them by algebra")
    assert rate >= 100


def run(script: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        timeout=HANG,
        **options,
    )


def gone(pid: int) -> bool:
    """Whether it has ended; an orphan that nobody reaps, as in a container without an init, has ended too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_script_without_a_main_guard_leaves_no_process_and_imports_no_sympy():
    done = run(
        "import sys\n"
        "from dft_lora.tasks.judge import judge, _pool\n"
        "print(judge(r'\\boxed{\\sqrt{8}}', r'2\\sqrt{2}').status)\n"
        "print(*{'sympy', 'math_verify', 'torch'} & set(sys.modules))\n"
        "print(*(pid for checker in _pool().idle for pid in (checker.process.pid, checker.child)))\n"
    )
    status, imported, pids = done.stdout.splitlines()
    assert (status, imported, done.stderr) == ("correct", "", "")
    assert len(set(pids.split())) == 2
    wait_for(lambda: all(gone(int(pid)) for pid in pids.split()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX")
def test_a_forked_child_judges_with_checkers_of_its_own():
    done = run(
        "import os\n"
        "from dft_lora.tasks.judge import judge, _pool\n"
        "ask = lambda: judge(r'\\boxed{\\sqrt{8}}', r'2\\sqrt{2}').status\n"
        "ask(); mine = _pool()\n"
        "if (child := os.fork()) == 0:\n"
        "    print(ask(), _pool() is mine, flush=True); _pool().close(); os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(ask(), _pool() is mine)\n"
    )
    assert done.stdout.splitlines() == ["correct False", "correct True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs kill -9 and timers of POSIX")
def test_a_busy_checker_does_not_outlive_a_killed_caller():
    script = (
        "import threading, time\n"
        "from dft_lora.tasks.judge import judge, _pool\n"
        "judge(r'\\boxed{\\sqrt{8}}', r'2\\sqrt{2}')\n"
        "checker = _pool().idle[0]\n"
        f"threading.Thread(target=judge, args={HANGS}, daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(checker.child, checker.process.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=HERE.parent) as caller:
        pids = [int(pid) for pid in caller.stdout.readline().split()]
        caller.kill()
    wait_for(lambda: all(map(gone, pids)))


def test_a_checker_that_cannot_start_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"dft_lora\.tasks\.algebra"):
        judging._Pool().ask("x", "y")


def test_a_checker_that_somebody_ended_is_replaced():
    pool = judging._Pool()
    assert pool.ask(r"\sqrt{8}", r"2\sqrt{2}") == "correct"
    checker = pool.idle[0]
    for pid in (checker.process.pid, checker.child):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(checker.child))
    checker.process.wait(HANG)
    assert pool.ask(r"\sqrt{8}", r"2\sqrt{2}") == "correct"
    pool.close()
