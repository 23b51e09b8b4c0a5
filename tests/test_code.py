"""Tasks whose answers are programs: published solutions pass, wrong ones fail, hostile ones are contained.

Every hostile program answers rightly if its attack succeeds. So "correct" means that something got out.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from patience import HANG, wait_for

from dft_lora.cli import main
from dft_lora.config import load_recipe
from dft_lora.data.sources import load_problems
from dft_lora.errors import DataError, RequestError, RunError
from dft_lora.evaluation.base_run import base_run
from dft_lora.evaluation.report import build
from dft_lora.experiments.own_samples import own_samples
from dft_lora.runs.folder import RunFolder, read_json, read_lines
from dft_lora.tasks import code, get_task, judge_of
from dft_lora.tasks.code import runner
from dft_lora.tasks.code.cell import packed, unpacked
from dft_lora.tasks.code.runner import Limits, run_all
from dft_lora.training.plan import make_plan

TESTS = "from candidate import f\nassert f(2) == 3\n"
RIGHT = "def f(x):\n    return x + 1\n"
BRIEF = Limits(seconds=1, patience=1.0, memory_mb=256, file_mb=4)


def attack(body: str, *imports: str) -> str:
    """A program whose `f` does something and then answers rightly."""
    lines = [f"import {name}" for name in imports]
    return "\n".join([*lines, "def f(x):", *(f"    {line}" for line in body.splitlines()), "    return 3"])


def writing(data: str, how: str = "") -> str:
    """A program that writes to every file that it may have inherited."""
    return (
        f"import os\nfor end in range(40):\n  try:\n    {how}os.write(end, {data})\n  except OSError: pass\n"
    )


def hostile(canary: Path, port: int) -> dict[str, str]:
    """Programs by what they try. `canary`: a file that none may see; `port`: a server that none may reach."""
    secret, here = str(canary), os.getpid()
    return {
        # processes and threads
        "fork": attack("os.fork()", "os"),
        "fork bomb": "import os\nwhile True:\n    os.fork()\n",
        "fork bomb that hides errors": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass\n",
        "thread": attack("threading.Thread(target=print).start()", "threading"),
        "process": attack("multiprocessing.Process(target=print).start()", "multiprocessing"),
        "shell": attack("subprocess.run(['/bin/sh', '-c', 'true'], check=True)", "subprocess"),
        "exec": attack("os.execv('/bin/sh', ['sh'])", "os"),
        # memory and time
        "memory at once": attack("b = bytearray(1 << 33)"),
        "memory by and by": attack("kept = [bytearray(1 << 24) for _ in range(200)]"),
        "memory map": attack("mmap.mmap(-1, 1 << 33)", "mmap"),
        "sleep": attack("time.sleep(1e6)", "time"),
        "pause": attack("signal.pause()", "signal"),
        "loop": attack("while True: pass"),
        "loop that ignores signals": attack(
            "for s in range(1, 60):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
            "while True: pass",
            "signal",
        ),
        "one long instruction": attack("9 ** 9 ** 9"),
        "regular expression": attack("re.match('(a+)+b', 'a' * 50)", "re"),
        "endless result": "import itertools\ndef f(x):\n    return itertools.count()\n",
        "more time": attack("resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "resource"),
        # files
        "read a secret": attack(f"open({secret!r}).read()"),
        "write outside": attack(f"open({secret!r}, 'w').write('x')"),
        "delete": attack(f"os.remove({secret!r})", "os"),
        "change rights": attack(f"os.chmod({secret!r}, 0o777)", "os"),
        "symlink to read": attack(f"os.symlink({secret!r}, 'l')\nopen('l').read()", "os"),
        "symlink to write": attack(f"os.symlink({secret!r}, 'l')\nopen('l', 'r+').write('x')", "os"),
        "hard link": attack(f"os.link({secret!r}, 'l')", "os"),
        "users": attack("open('/etc/passwd').read()"),
        "change the library": attack("open(os.__file__, 'a').write('')", "os"),
        "one large file": attack("open('f', 'wb').write(b'x' * (1 << 24))"),
        "many files": attack("for i in range(99): open(str(i), 'wb').write(b'x' * (1 << 20))"),
        "escape from the root": attack("os.mkdir('d')\nos.chroot('d')", "os"),
        # rights, signals, secrets, network
        "become root": attack("os.setuid(0)", "os"),
        "new namespace": attack("assert ctypes.CDLL(None).unshare(0x10000000) == 0", "ctypes"),
        "signal to the parent": attack(f"os.kill({here}, 0)", "os"),
        "signal to all": attack("os.kill(-1, 0)", "os"),
        "kill the group": attack("os.killpg(0, 9)\nraise OSError", "os"),
        "environment": attack("assert os.environ['TOKEN']", "os"),
        "the parent's environment": attack(f"open('/proc/{here}/environ').read()"),
        "network": attack(f"socket.create_connection(('127.0.0.1', {port}), 2)", "socket"),
        "read the input": attack("input()"),
        # what the judge reads
        "flood the output": attack("while True: print('x' * 9999)"),
        "flood the answers": writing("b'x' * 999", "while True: "),
        "say passed": writing("b'passed'") + "os._exit(0)\n",
        "deep answer": writing("b'[' * 99999 + b'\\n'"),
        "an error that ends the tests": writing(r"""b'{"error": "SystemExit"}\n'"""),
        # the tests' own asserts
        "exit": "import sys\nsys.exit(0)\n",
        "exit at once": "import os\ndef f(x):\n    os._exit(0)\n",
        "exit later": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)\n",
        "equal to all": "class E:\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n"
        "def f(x): return E()\n",
        "a number equal to all": "class E(int):\n    __eq__ = lambda *_: True\n    __hash__ = int.__hash__\n"
        "def f(x): return E(7)\n",
        "no assertions": "import builtins\nbuiltins.AssertionError = builtins.Warning\ndef f(x): return 7\n",
        "another candidate": "import sys\nclass C:\n    f = lambda x: 3\nsys.modules['candidate'] = C\n"
        "def f(x): return 7\n",
        "crash": attack("ctypes.string_at(0)", "ctypes"),
        "stack": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)\n",
        "abort": attack("os.abort()", "os"),
        "interrupt": "def f(x): raise KeyboardInterrupt\n",
    }


LATE = {
    "sleep",
    "pause",
    "loop",
    "loop that ignores signals",
    "fork bomb that hides errors",
    "flood the output",
}


@pytest.fixture
def walled():
    if (why := runner.walls()) is not None:
        pytest.skip(f"this system gives no namespaces: {why}")


@pytest.fixture
def canary(tmp_path):
    file = tmp_path / "secret"
    file.write_text("mine")
    return file


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_hostile_programs_are_contained(walled, canary, port, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    programs = hostile(canary, port)
    assert len(programs) >= 40
    before = os.stat(canary)
    statuses = dict(zip(programs, run_all([(p, TESTS) for p in programs.values()], BRIEF), strict=True))
    assert {name for name, status in statuses.items() if status == "correct"} == set()
    assert {name for name in LATE if statuses[name] != "timed_out"} == set()
    after = os.stat(canary)
    assert (canary.read_text(), after.st_mode, after.st_nlink) == ("mine", before.st_mode, before.st_nlink)
    assert os.environ["TOKEN"] == "secret"
    assert run_all([(RIGHT, TESTS)]) == ["correct"]


def test_the_walls_are_what_contains_some(canary, port):
    """Without namespaces a program can read other files, so the test above can fail."""
    if (why := runner._obstacle(walled=False)) is not None:
        pytest.skip(f"nothing runs here without namespaces: {why}")
    programs = hostile(canary, port)
    assert runner._run(programs["users"], TESTS, BRIEF, walled=False) == "correct"
    for name in ("fork", "thread", "memory at once", "loop", "environment", "equal to all", "say passed"):
        assert runner._run(programs[name], TESTS, BRIEF, walled=False) != "correct", name


def test_a_system_on_which_no_program_runs_is_named(monkeypatch):
    monkeypatch.setattr(runner, "CELL", Path("/nowhere/cell.py"))
    with pytest.raises(RequestError, match=r"programs cannot be run here: .*cell.py"):
        runner.walls.__wrapped__()


def test_nothing_outlives_a_killed_parent(walled, tmp_path):
    cell = shutil.copy(runner.CELL, tmp_path / "cell-of-the-killed.py")
    script = (
        "from pathlib import Path; from dft_lora.tasks.code import runner\n"
        f"runner.CELL = Path({str(cell)!r})\n"
        f"runner._run('import time; time.sleep(600)', {TESTS!r}, runner.Limits(9, 600.0), walled=True)\n"
    )

    def alive():
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                found += path.read_bytes().rstrip(b"\0").endswith(str(cell).encode())
        return found

    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: parent.poll() is not None or alive() == 4)  # two wardens and their inmates
    assert parent.poll() is None, parent.stderr.read()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: alive() == 0)


@pytest.mark.parametrize(
    ("tests", "program", "status"),
    [
        (TESTS, RIGHT, "correct"),
        (TESTS, "def f(x):\n    return x\n", "wrong"),
        (TESTS, "def f(x) return x", "unparsable"),
        (TESTS, "(" * 100_000, "unparsable"),
        (TESTS, "", "wrong"),
        (TESTS, "def g(x):\n    return 3\n", "wrong"),
        (TESTS, "print('hello')\n" + RIGHT, "correct"),
        (TESTS, "if __name__ == '__main__':\n    input()\n" + RIGHT, "correct"),
        (
            "from candidate import f\nassert f(a=(1, {2: [None]}))",
            "def f(a):\n    return a == (1, {2: [None]})",
            "correct",
        ),
        (
            "from candidate import f\nassert list(f()) == [1, 4]",
            "def f():\n    yield 1\n    yield 4",
            "correct",
        ),
        (
            "from candidate import f\ntry: f()\nexcept ValueError as e: assert str(e) == 'n'\nelse: assert 0",
            "def f():\n    raise ValueError('n')",
            "correct",
        ),
        (
            "from candidate import Node, depth\nroot = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2",
            "class Node:\n    def __init__(self, x):\n        self.left = None\n"
            "def depth(n):\n    return 1 + depth(n.left) if n else 0",
            "correct",
        ),
        ("from candidate import f\nf()\nwhile True: pass", "def f(): pass", "timed_out"),
        (
            "try:\n    from candidate import f\n    f()\nexcept BaseException: pass",
            "def f(): raise SystemExit",
            "wrong",
        ),
    ],
)
def test_programs_and_their_tests(tests, program, status):
    assert run_all([(program, tests)], Limits(seconds=1, patience=HANG)) == [status]


def test_plain_data_is_the_same_on_the_other_side():
    values = [None, True, 3, 10**5000, -1.5, float("inf"), 1j, "ä\ud800", b"\0", [1, (2, {3})]]
    values += [{(1,): frozenset("a")}, range(1, 9, 2), int]
    kept = []
    arrived = unpacked(json.loads(json.dumps(packed(values, kept))), kept.__getitem__)
    assert (arrived, kept) == (values, [])
    assert list(map(type, arrived)) == list(map(type, values))


def test_a_broken_cell_is_an_error_not_a_verdict(monkeypatch):
    monkeypatch.setattr(runner, "CELL", Path("/nowhere/cell.py"))
    with pytest.raises(RunError, match=r"a program could not be run: .*cell.py"):
        runner._run(RIGHT, TESTS, BRIEF, walled=False)


# --- HumanEval and MBPP ----------------------------------------------------------------------------------


@pytest.fixture
def local(monkeypatch, data_dir):
    monkeypatch.setenv("DFT_LORA_DATA", str(data_dir))


def statuses(name: str, problems, texts) -> list[str]:
    verdicts = judge_of(name).allowed(True).judge_many(list(zip(texts, problems, strict=True)))
    return [verdict.status for verdict in verdicts]


SAMPLE = {"humaneval": (0, 32, 38, 50, 127), "mbpp": (0, 115, 346, 489)}
"""Among them: tests that use the prompt's helpers, and a tree that the tests build."""


@pytest.mark.parametrize("name", SAMPLE)
def test_published_solutions_pass_and_others_fail(local, name):
    problems = get_task(name).problems()
    assert len(problems) == {"humaneval": 164, "mbpp": 500}[name]
    some = [problems[i] for i in SAMPLE[name]]
    right = [problem.solution for problem in some]
    assert statuses(name, some, right) == ["correct"] * len(some)
    wrong = [right[1:] + right[:1], ["    return None\n"] * len(some), ["    pass\n[DONE]"] * len(some)]
    for texts in wrong:
        assert "correct" not in statuses(name, some, texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split", "size"),
    [("humaneval", "test", 164), ("mbpp", "test", 500), ("mbpp", "train", 374), ("mbpp", "validation", 90)],
)
def test_every_published_solution_passes(local, name, split, size):
    problems = get_task(name).problems(split)
    assert len(problems) == size
    found = statuses(name, problems, [problem.solution for problem in problems])
    assert [problem.id for problem, status in zip(problems, found, strict=True) if status != "correct"] == []


def test_prompts_are_the_published_ones(local, data_dir):
    first = get_task("humaneval").problems()[0].question
    assert first.startswith("from typing import List\n\n\ndef has_close_elements(") and first.endswith(
        '"""\n'
    )
    prompt = get_task("mbpp").problems()[0].question
    assert prompt.count("You are an expert Python programmer, and here is your task: ") == 4
    assert prompt.count("[DONE]") == 3 and prompt.endswith("\n[BEGIN]\n")
    assert (
        "Your code should pass these tests:\n\nassert remove_Occ(" in prompt
    )  # task 11, the first of the test set


@pytest.mark.parametrize(
    ("name", "text", "cut"),
    [
        ("humaneval", "    return 1\n\ndef other():\n    pass", "    return 1\n"),
        ("humaneval", "    return 1\n# Test\nassert 0", "    return 1"),
        ("humaneval", "    return 1\nprint(2)", "    return 1"),
        ("humaneval", "    if x:\n        return 1\n", "    if x:\n        return 1\n"),
        (
            "humaneval",
            "Sure:\n```python\nimport os\n\ndef f():\n    pass\n```\nIt works.",
            "Sure:\n```python\nimport os\n\ndef f():\n    pass\n```",
        ),
        ("mbpp", "def f():\n    pass\n[DONE]\nMore", "def f():\n    pass\n"),
        ("mbpp", "def f():\n    pass\n[DONE]\n```\nx = 1\n```", "def f():\n    pass\n"),
        ("humaneval", "    return 1\n```\nfoo\n```\nbar\n#", "    return 1\n```\nfoo\n```\nbar"),
        ("humaneval", "```py\nx = 1\n#2", "```py\nx = 1\n#2"),
    ],
)
def test_stop_rules(name, text, cut):
    task = get_task(name)
    assert task.cut(text) == cut
    assert task.cut(cut) == cut


def test_an_answer_in_a_code_block_is_judged(local):
    problem = get_task("humaneval").problems()[0]
    text = f"Here it is.\n```python\n{problem.question}{problem.solution}```\nIt compares all pairs."
    assert statuses("humaneval", [problem], [text]) == ["correct"]


def test_rows_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("DFT_LORA_DATA", str(tmp_path))
    (tmp_path / "eval").mkdir()
    row = {
        "text": "Add.",
        "code": "import math\ndef add(a):\n  return a + 1",
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    rows = [
        row | {"task_id": i, "test_list": [f"assert add({i}) == math.floor({i + 1})"]}
        for i in (2, 3, 4, 11, 601)
    ]
    (tmp_path / "eval/mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (problem,) = get_task("mbpp").problems()
    assert statuses("mbpp", [problem], [problem.solution]) == ["correct"]
    assert len(get_task("mbpp").problems("train")) == 1
    rows[-1]["code"] = "x = ("
    (tmp_path / "eval/mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="mbpp: row 1 of split 'train' is not usable: '\\(' was never closed"):
        get_task("mbpp").problems("train")
    (tmp_path / "eval/humaneval.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"humaneval.jsonl.gz: not readable \(Not a gzipped file"):
        get_task("humaneval").problems()


# --- permission ------------------------------------------------------------------------------------------


def test_no_program_runs_without_permission(local, tmp_path):
    task = get_task("humaneval")
    problem = task.problems()[0]
    with pytest.raises(RequestError, match=r"humaneval.*--allow-code"):
        task.judge_many([("    pass", problem)])
    recipe = load_recipe("tiny_dft", ["data.source=mbpp"])
    with pytest.raises(RequestError, match=r"mbpp.*evaluate.allow_code"):
        own_samples(recipe, tmp_path / "own.jsonl")
    with pytest.raises(RequestError, match=r"mbpp.*evaluate.allow_code"):
        make_plan(recipe.override(["objective.name=grpo", "rollouts.samples=8"]))
    assert load_problems(recipe.data).total == 374  # training on them runs nothing


def test_evaluate_runs_programs_only_with_the_flag(local, tmp_path, caplog):
    base_run(load_recipe("tiny_dft"), tmp_path / "base")
    code._announce.cache_clear()
    words = ["evaluate", str(tmp_path / "base"), "--task", "humaneval", "--limit", "2", "--samples", "2"]
    words += ["--set", "max_new_tokens=8"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2 and "--allow-code" in refused.output
    assert not (tmp_path / "base/evaluation").exists()
    done = CliRunner().invoke(main, [*words, "--allow-code", "--json"])
    assert done.exit_code == 0, done.output
    assert "humaneval: programs that the model writes are run on this machine" in caplog.text
    report = build([RunFolder(tmp_path / "base")])
    result = report["runs"]["base"]["tasks"]["humaneval"]
    assert (result["samples"], result["problems"], result["template"]) == (2, 2, "raw")
    assert set(result["pass_at"]) == {"1", "2"} and result["maj_at"] == {}
    lines = list(read_lines(tmp_path / "base/evaluation/humaneval.jsonl"))
    assert len(lines) == 6 and all(line["verdict"] in ("wrong", "unparsable") for line in lines)
    assert read_json(tmp_path / "base/evaluation/humaneval.json")["protocol"]["template"] == "raw"
