"""Evaluation end to end on the embedded base: killed, resumed, sharded; token scores against plain torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from evidence_runs import QUICK, trained
from fault_runs import finish, start
from patience import HANG, wait_for

from dft_lora import tasks
from dft_lora.cli import main
from dft_lora.config import ModelConfig, load_recipe
from dft_lora.data.templates import Renderer
from dft_lora.errors import MissingPart, RequestError
from dft_lora.evaluation.attempts import read_attempts
from dft_lora.evaluation.evaluate import evaluate
from dft_lora.evaluation.protocol import answer_limit
from dft_lora.evaluation.report import build, write_own_report
from dft_lora.evaluation.run_set import unique_names
from dft_lora.evaluation.shard import Shard
from dft_lora.evaluation.sharpening import entropy_matched
from dft_lora.evaluation.task_results import TaskResults
from dft_lora.evaluation.token_table import TokenTable, tokens_file
from dft_lora.evaluation.tokens import entropy, score, temperature_for
from dft_lora.experiments.shipped import shipped_runs
from dft_lora.model.head import check_head
from dft_lora.model.load import load_adapters, load_base, load_tokenizer, resolve
from dft_lora.runs.folder import RunFolder, read_json
from dft_lora.tasks import get_task
from dft_lora.tasks.base import Task, Verdict
from dft_lora.training.loop import train
from dft_lora.ui.tabs.picker import ProblemSets

pytestmark = pytest.mark.usefixtures("many_runs")

ARGUMENTS = ("--task", "arithmetic", "--samples", "3", "--limit", "24")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Evaluated without an interruption."""
    paths = trained(tmp_path_factory.mktemp("whole"))
    evaluate(paths, ["arithmetic"], limit=24, changes=["samples=3"])
    return paths


@pytest.fixture
def fresh(runs, tmp_path):
    """The same runs, not evaluated."""
    for path in runs:
        shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("evaluation", "steps"))
    return [tmp_path / path.name for path in runs]


@pytest.mark.parametrize(("change", "tokens"), [("top_p=1.0", 96), ("max_new_tokens=130", 130)])
def test_the_longest_answer_is_the_tasks_own_unless_it_is_set(fresh, change, tokens):
    evaluate(fresh[:1], ["arithmetic"], limit=1, changes=["samples=1", change])
    assert read_json(fresh[0] / "evaluation/arithmetic.json")["protocol"]["max_new_tokens"] == tokens


def test_a_limit_above_the_tasks_own_is_obeyed(fresh):
    recipe = RunFolder(fresh[0]).recipe()  # run.json holds 4096, the default, as it holds every field
    assert answer_limit(get_task("gsm8k"), recipe.override([]).evaluate) == 1024
    for tokens in (500, 3000, 4096):
        changed = recipe.override([f"evaluate.max_new_tokens={tokens}"])
        assert answer_limit(get_task("gsm8k"), changed.evaluate) == tokens


def test_an_answer_ends_where_the_models_positions_do(fresh, monkeypatch, caplog):
    monkeypatch.setattr("dft_lora.evaluation.evaluate.positions", lambda config: 60)
    evaluate([fresh[0]], ["arithmetic"], limit=3, changes=["samples=1"])
    assert re.search(
        "arithmetic: [123] of 3 reference solutions are longer than .* 60 positions", caplog.text
    )
    renderer = Renderer(load_tokenizer(ModelConfig(name="tiny")), "auto")
    prompts = {p.id: len(renderer.prompt_ids(p.messages)) for p in get_task("arithmetic").problems()[:3]}
    given = read_attempts(fresh[0] / "evaluation/arithmetic.jsonl")
    assert all(prompts[one.problem] + one.tokens <= 60 for one in given)
    assert any(prompts[one.problem] + one.tokens == 60 and one.truncated for one in given)
    monkeypatch.setattr("dft_lora.evaluation.evaluate.positions", lambda config: 20)
    with pytest.raises(RequestError, match="tokens, but the model has only 20 positions"):
        evaluate([fresh[0]], ["arithmetic"], limit=3, changes=["samples=1"], overwrite=True)
    assert read_attempts(fresh[0] / "evaluation/arithmetic.jsonl") == given, "nothing was overwritten"


def command(*arguments, launcher=()):
    return [sys.executable, *launcher, "-m", "dft_lora", "evaluate", *map(str, arguments)]


def answers(path):
    found = read_attempts(RunFolder(path).evaluation("arithmetic"))
    return sorted(found, key=lambda a: (a.problem, a.sample))


def figures(paths):
    """The report without what names the machine and the moment."""
    report = build([RunFolder(path) for path in paths])
    for run in report["runs"].values():
        del run["path"]
    del report["provenance"]
    return report


def test_a_stopped_and_killed_evaluation_resumes_to_the_same_report(runs, fresh):
    """Ctrl-C after the first answers, SIGKILL once more are kept, half a line left behind, then the rest."""
    file = RunFolder(fresh[1]).evaluation("arithmetic")
    asked = ("evaluate", *map(str, fresh), *ARGUMENTS)

    def kept():
        return sum(len(answers(path)) for path in fresh)

    child = start(*asked)
    wait_for(lambda: child.log.is_file() or not child.is_alive())
    wait_for(lambda: re.search(r" [1-9]\d*/288 ", child.log.read_text()) or not child.is_alive())
    os.kill(child.pid, signal.SIGINT)
    code, told = finish(child)
    stopped = kept()
    assert code == 130 and "Traceback" not in told and 0 < stopped < 288
    line = f"error: evaluation stopped: {stopped} of 288 answers are kept; run the same command again to "
    assert told.splitlines()[-1] == line + "continue"

    child = start(*asked)
    wait_for(lambda: kept() > stopped or not child.is_alive())
    child.kill()
    finish(child)
    before = kept()
    assert stopped < before < 288
    with file.open("ab") as lines:
        lines.write(b'{"problem": "arithmetic/te')
    left = file.read_bytes()
    assert kept() == before and file.read_bytes() == left  # only read
    evaluate(fresh, ["arithmetic"], limit=24, changes=["samples=3"])
    assert figures(fresh) == figures(runs)
    assert [answers(path) for path in fresh] == [answers(path) for path in runs]


def test_runs_answered_together_and_alone_answer_alike(runs, fresh):
    """The base's own answers do not depend on the company it was asked in (fp32, up to rounding ties)."""
    evaluate([fresh[0]], ["arithmetic"], limit=24, changes=["samples=3"])
    same = [a == b for a, b in zip(answers(fresh[0]), answers(runs[0]), strict=True)]
    assert np.mean(same) >= 0.98


def test_what_stopped_processes_left_is_completed_and_gathered(runs, fresh, monkeypatch):
    """Whether answers are missing is the same for all processes, whoever gives them."""
    shutil.copytree(runs[0] / "evaluation", fresh[0] / "evaluation")
    whole = fresh[0] / "evaluation/arithmetic.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    mine = {problem.id for problem in get_task("arithmetic").problems()[:24:2]}  # all that rank 0 is asked
    parts = [whole.with_name(f"arithmetic.rank-{rank}.jsonl") for rank in (0, 1)]
    parts[0].write_text("".join(line for line in lines if json.loads(line)["problem"] in mine))
    whole.unlink()
    asked = []
    monkeypatch.setattr("dft_lora.evaluation.evaluate._complete", lambda *_: asked.append(1))
    monkeypatch.setattr(Shard, "of_this_process", lambda: Shard(0, 2))
    monkeypatch.setattr(Shard, "wait", lambda self: None)
    evaluate([fresh[0]], ["arithmetic"], limit=24, changes=["samples=3"])
    assert asked == [1] and whole.exists()
    monkeypatch.undo()

    parts[1].write_text("".join(line for line in lines if json.loads(line)["problem"] not in mine))
    monkeypatch.setattr("dft_lora.evaluation.evaluate._complete", None)  # asking again would fail
    evaluate([fresh[0]], ["arithmetic"], limit=24, changes=["samples=3"])
    assert sorted(whole.read_text().splitlines(keepends=True)) == sorted(lines)
    assert not any(part.exists() for part in parts)


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(runs, fresh):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29561")
    done = subprocess.run(
        command(*fresh, *ARGUMENTS, launcher=launcher), capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for path, whole in zip(fresh, runs, strict=True):
        same = [a == b for a, b in zip(answers(path), answers(whole), strict=True)]
        assert np.mean(same) >= 0.98
        assert not list((path / "evaluation").glob("*.rank-*"))


def test_another_protocol_is_refused_before_a_model_is_loaded(runs):
    with pytest.raises(RequestError, match=r"samples: 3 -> 2.*--overwrite"):
        evaluate([runs[0]], ["arithmetic"], limit=24, changes=["samples=2"])
    with pytest.raises(RequestError, match=r"engine: 'plain' -> 'vllm'"):
        evaluate([runs[0]], ["arithmetic"], limit=24, changes=["samples=3", "engine=vllm"])
    with pytest.raises(RequestError, match="did you mean 'arithmetic'"):
        evaluate([runs[0]], ["aritmetic"])
    with pytest.raises(RequestError, match="--limit: 0"):
        evaluate([runs[0]], ["arithmetic"], limit=0)


def test_overwriting_waits_until_an_engine_is_there(runs):
    with pytest.raises(MissingPart, match="vllm"):
        evaluate([runs[0]], ["arithmetic"], limit=2, changes=["samples=1", "engine=vllm"], overwrite=True)
    assert len(answers(runs[0])) == 24 * 4


# --- answers belong to the exact weights ---------------------------------------------------------


@pytest.fixture
def extended(runs, tmp_path):
    """The evaluated run `sft`, trained one step further."""
    path = tmp_path / "sft"
    shutil.copytree(runs[1], path)
    write_own_report(RunFolder(path))
    fields = (*QUICK, "train.save_steps=1", "objective.name=sft", f"output={path}", "train.max_steps=3")
    train(load_recipe("tiny_dft", fields), extend=True)
    return path


def test_a_run_that_was_trained_further_is_answered_anew(runs, extended):
    folder = RunFolder(extended)
    asked = {"limit": 24, "changes": ["samples=3"]}
    with pytest.raises(RequestError, match=r"adapter has changed since.*--overwrite"):
        evaluate([extended], ["arithmetic"], **asked)
    with pytest.raises(RequestError, match=r"adapter has changed since.*--task arithmetic --overwrite"):
        build([folder])
    evaluate([extended], ["arithmetic"], **asked, overwrite=True)
    assert answers(extended) != answers(runs[1])
    assert build([folder])["runs"]["sft"]["adapter"] == folder.adapter_digest
    for title in ("arithmetic", "other-text"):
        mine, old = (TokenTable.load(tokens_file(RunFolder(path), title)) for path in (extended, runs[1]))
        assert not np.array_equal(mine.logp_M, old.logp_M), f"{title}: probabilities of the older adapter"


def test_answers_that_do_not_name_their_weights_are_refused(runs, tmp_path):
    """As an earlier version wrote them."""
    shutil.copytree(runs[0], tmp_path / "base")
    file = RunFolder(tmp_path / "base").evaluation("arithmetic").with_suffix(".json")
    facts = read_json(file)
    for field in ("adapter", "base", "engine"):
        del facts["protocol"][field]
    file.write_text(json.dumps(facts))
    for ask in (
        lambda: build([RunFolder(tmp_path / "base")]),
        lambda: evaluate([tmp_path / "base"], ["arithmetic"], limit=24, changes=["samples=3"]),
    ):
        with pytest.raises(RequestError, match=r"earlier version.*--overwrite"):
            ask()


def test_a_base_whose_weights_changed_is_refused(fresh, tmp_path):
    base, run = tmp_path / "weights", RunFolder(fresh[1])
    shutil.copytree(resolve(ModelConfig()), base)
    recipe = run.run()["recipe"]
    run.write_run(recipe=recipe | {"model": recipe["model"] | {"name": str(base)}})
    evaluate([fresh[1]], ["arithmetic"], limit=2, changes=["samples=1"])
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(RequestError, match=r"weights of its base .* have changed since the run was made"):
        evaluate([fresh[1]], ["arithmetic"], limit=2, changes=["samples=1"])
    with pytest.raises(RequestError, match="base's weights have changed"):
        build([run])


def test_runs_with_different_settings_are_refused_by_name(fresh):
    run = RunFolder(fresh[1])
    recipe = run.run()["recipe"]
    run.write_run(recipe=recipe | {"evaluate": recipe["evaluate"] | {"temperature": 0.7, "seed": 5}})
    with pytest.raises(RequestError, match=r"temperature 1.0 and 0.7; evaluate.seed 0 and 5.*--set"):
        evaluate(fresh[:2], ["arithmetic"], limit=2, changes=["samples=1"])
    evaluate(fresh[:2], ["arithmetic"], limit=2, changes=["samples=1", "temperature=0.7", "seed=5"])
    assert len(answers(fresh[0])) == len(answers(fresh[1])) == 4


def test_a_runs_report_holds_every_task_that_was_answered(runs, tmp_path):
    """Also after a command that asked another task; one that is incomplete is left out and named."""
    path = tmp_path / "base"
    shutil.copytree(runs[0], path)
    asked = ("--samples", "1", "--limit", "2")
    done = CliRunner().invoke(main, ["evaluate", str(path), "--task", "arithmetic-long", *asked])
    assert done.exit_code == 0, done.output
    assert list(read_json(path / "report.json")["runs"]["base"]["tasks"]) == ["arithmetic", "arithmetic-long"]
    assert "arithmetic-long" in done.stdout and "24 problems" not in done.stdout
    file = RunFolder(path).evaluation("arithmetic")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))
    again = CliRunner().invoke(main, ["evaluate", str(path), "--task", "arithmetic-long", *asked])
    assert again.exit_code == 0, again.output
    assert list(read_json(path / "report.json")["runs"]["base"]["tasks"]) == ["arithmetic-long"]


def test_names_are_unique_whatever_the_folders_are_called():
    folders = [RunFolder(path) for path in ("a/sft-3", "b/sft", "c/sft", "d/sft", "e/v1.5")]
    assert unique_names(folders) == ["sft-3", "sft", "sft-2", "sft-4", "v1_5"]


def test_the_page_proposes_a_problem_on_which_the_runs_differ(runs, fresh):
    """And for runs without answers the one that comes with the page."""
    name, problem, why = ProblemSets([RunFolder(path) for path in runs]).proposed
    sft, dft = (TaskResults.read(RunFolder(path), "arithmetic") for path in runs[1:])
    apart_P = abs(sft.correct_PS.mean(1) - dft.correct_PS.mean(1))
    assert apart_P.max() > 0 and apart_P[sft.problems.index(problem.id)] == apart_P.max()
    assert name == "arithmetic" and why.startswith("Chosen because sft and dft disagree on it")
    unasked = ProblemSets([RunFolder(path) for path in fresh]).proposed
    assert unasked == ProblemSets([]).proposed and unasked[2] == "An example of arithmetic."
    assert "disagree" in ProblemSets(shipped_runs()).proposed[2]


def test_vllm_says_what_is_missing(fresh):
    with pytest.raises(MissingPart, match="vllm"):
        evaluate([fresh[0]], ["arithmetic"], limit=2, changes=["samples=1", "engine=vllm"])


class EvenLength(Task):
    """A task with its own judge and without reference answers: an answer of even length is correct."""

    name, description, max_new_tokens = "even-length", "answers of even length", 8

    def problems(self, split="test"):
        return [replace(problem, answer=None) for problem in get_task("arithmetic").problems(split)]

    def judge_many(self, pairs):
        return [Verdict("wrong" if len(text) % 2 else "correct", text) for text, _ in pairs]


def test_a_task_judges_its_own_answers(fresh, monkeypatch):
    monkeypatch.setitem(tasks._tasks(), "even-length", EvenLength())
    evaluate([fresh[0]], ["even-length"], limit=6, changes=["samples=1"])
    found = read_attempts(RunFolder(fresh[0]).evaluation("even-length"))
    assert {a.verdict.status for a in found} == {"correct", "wrong"}
    assert all(a.verdict == Verdict("wrong" if len(a.text) % 2 else "correct", a.text) for a in found)
    summary = TaskResults.read(RunFolder(fresh[0]), "even-length").summary()
    assert summary["maj_at"]["1"] == summary["avg"] > 0, "a correct answer votes without a reference, too"


def test_checkpoints_are_evaluated_like_runs(runs):
    steps = RunFolder(runs[1]).checkpoint_runs()
    assert [step.run()["step"] for step in steps] == [1, 2]
    evaluate([step.path for step in steps], ["arithmetic"], limit=6, changes=["samples=2"])
    curve = build([RunFolder(runs[1])])["steps"]["sft"]["arithmetic"]
    assert [entry["step"] for entry in curve] == [1, 2]
    assert all(0 <= entry["avg"] <= 1 for entry in curve)


@pytest.fixture(scope="module")
def loaded(runs):
    recipe = RunFolder(runs[1]).recipe()
    model = load_adapters(
        load_base(recipe.model)[0], {"sft": runs[1] / "adapter", "dft": runs[2] / "adapter"}
    )
    renderer = Renderer(load_tokenizer(recipe.model))
    examples = [renderer.render(p) for p in get_task("arithmetic").problems()[:20]]
    return model, renderer, examples


@pytest.mark.parametrize("adapter", [None, "sft", "dft"])
def test_token_scores_are_those_of_the_whole_logits(loaded, adapter):
    """Padding, batching by length and the chunked loss change nothing: one example at a time, all logits."""
    model, renderer, examples = loaded
    table = score(model, examples, pad_id=renderer.pad_id, adapter=adapter)
    for e, example in enumerate(examples):
        if adapter is None:
            with model.disable_adapter(), torch.no_grad():
                logits_LV = model(torch.tensor([example.ids])).logits[0]
        else:
            model.set_adapter(adapter)
            with torch.no_grad():
                logits_LV = model(torch.tensor([example.ids])).logits[0]
        logp_LV = logits_LV.float().log_softmax(-1)[example.prompt_length - 1 : -1]
        target_L = torch.tensor(example.ids[example.prompt_length :])
        mine = table.example_M == e
        assert table.ids_M[mine].tolist() == target_L.tolist()
        assert table.logp_M[mine] == pytest.approx(
            logp_LV.gather(1, target_L[:, None])[:, 0].numpy(), abs=2e-4
        )
        assert table.entropy_M[mine] == pytest.approx(-(logp_LV.exp() * logp_LV).sum(-1).numpy(), abs=2e-4)
        assert table.nll_E[e] == pytest.approx(-table.logp_M[mine].mean(), rel=1e-5)


def test_the_pull_is_the_gradient_at_the_hidden_state(loaded):
    model, renderer, examples = loaded
    head = check_head(model)
    from dft_lora.evaluation.tokens import states

    table = score(model, examples[:1], pad_id=renderer.pad_id)
    _, h_MD, y_M = next(states(model, examples[:1], pad_id=renderer.pad_id))
    h_MD = h_MD.clone().float().requires_grad_()
    (h_MD @ head.weight_VD.float().T).log_softmax(-1).gather(1, y_M[:, None]).sum().backward()
    assert table.pull_M == pytest.approx(h_MD.grad.norm(dim=-1).numpy(), rel=2e-3, abs=1e-5)


def test_tables_are_kept_without_pickle(runs, tmp_path):
    table = TokenTable.load(tokens_file(RunFolder(runs[0]), "arithmetic"))
    table.save(tmp_path / "copy.safetensors")
    again = TokenTable.load(tmp_path / "copy.safetensors")
    assert all(np.array_equal(a, b) for a, b in zip(vars(table).values(), vars(again).values(), strict=True))
    assert len(table.nll_E) == 24


def test_temperature_for_gives_back_the_entropy(loaded):
    model, renderer, examples = loaded
    from dft_lora.evaluation.tokens import states

    head = check_head(model)
    h_MD = torch.cat([h for _, h, _ in states(model, examples, pad_id=renderer.pad_id)])
    for temperature in (0.5, 1.0, 1.7):
        wanted = entropy(head, h_MD, temperature)
        assert temperature_for(head, h_MD, wanted) == pytest.approx(temperature, rel=1e-3)


def test_an_entropy_matched_run_has_the_other_runs_entropy(runs, tmp_path):
    twin = entropy_matched(RunFolder(runs[1]), RunFolder(runs[2]), tmp_path / "twin", "arithmetic")
    facts = twin.run()["entropy_matched"]
    assert twin.recipe().evaluate.temperature == pytest.approx(facts["temperature"], abs=1e-4)
    assert json.dumps(facts) and 0.05 < facts["temperature"] < 5
    assert (
        entropy_matched(RunFolder(runs[1]), RunFolder(runs[2]), tmp_path / "twin", "arithmetic").run()
        == twin.run()
    )
    turned = entropy_matched(RunFolder(runs[2]), RunFolder(runs[1]), tmp_path / "twin", "arithmetic")
    assert turned.adapter_digest == RunFolder(runs[2]).adapter_digest, "made anew from another adapter"
    assert turned.run()["entropy_matched"]["temperature"] != facts["temperature"]
