"""Runs that learn from judged answers: what a step is, what resumes bit-exactly, what is refused."""

import json
import shutil
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from fault_runs import adapter, finish, lines, run, start
from patience import wait_for
from safetensors.torch import load_file

from dft_lora.config import load_recipe
from dft_lora.data.batches import examples_of
from dft_lora.errors import DataError, RecipeError, RequestError, RunError
from dft_lora.model.generate import Completion
from dft_lora.tasks import get_task
from dft_lora.tasks.base import Judge
from dft_lora.training import rollouts
from dft_lora.training.base_logps import BaseLogps
from dft_lora.training.loop import train
from dft_lora.training.plan import make_plan
from dft_lora.training.ranks import Ranks
from dft_lora.training.resume_guard import ROUND, guarded_fields, refuse_differences
from dft_lora.training.rollouts import (
    pack_groups,
    sample_answers,
    stream_seed,
    unpack_groups,
    up_to_the_stop,
)
from dft_lora.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("many_runs")
SMALL = (
    "data.sample=24",
    "rollouts.samples=4",
    "rollouts.max_new_tokens=48",
    "train.batch_size=16",
    "train.micro_batch_size=16",
    "train.max_steps=4",
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve preference pairs with the Hub's usual columns, sides of different lengths."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {i} + {i}?", "chosen": f"{i}+{i}={2 * i}\n#### {2 * i}", "rejected": f"#### {i}"}
        for i in range(2, 14)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_trainer(name, *changes):
    recipe = load_recipe(f"tiny_{name}", (*SMALL, *changes))
    trainer = Trainer(make_plan(recipe), Ranks(recipe))
    torch.manual_seed(1)
    for key, parameter in trainer.learner.adapter_model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.02)
    return trainer


def gradients(trainer, groups):
    """Of one step on these groups, and its loss."""
    learner = trainer.learner
    totals, _ = learner.accumulate(groups, learner.divisor(groups), 1)
    parameters = [*learner.trainable, *learner.value_parameters]
    found = torch.cat([p.grad.flatten() for p in parameters])
    learner.optimizer.zero_grad()
    return found, totals.loss / learner.divisor(groups)


# --- one step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "ppo", "nft"])
def test_a_step_does_not_depend_on_micro_batches(name, pairs):
    """For dpo, four of the twelve pairs occur in it twice."""
    changes = [f"data.source={pairs}", "rollouts=null"] if name == "dpo" else ["rollouts.updates=2"]
    if name == "ppo":
        changes.append("objective.kl=0.1")
    trainer = make_trainer(name, *changes)
    groups = trainer.source.groups(0)
    whole, loss = gradients(trainer, groups)
    assert whole.norm() > 0
    for size in (1, 3) if name == "dpo" else (3,):
        trainer.learner.layout = replace(trainer.learner.layout, micro_batch_size=size)
        part, theirs = gradients(trainer, groups)
        assert (part - whole).norm() <= 1e-5 * whole.norm()
        assert theirs == pytest.approx(loss, rel=1e-5, abs=1e-7)


@pytest.fixture(scope="module")
def grpo():
    return make_trainer("grpo", "rollouts.updates=2", "objective.kl=0.1")


def test_a_rollout_is_what_the_policy_wrote(grpo):
    """Old log-probabilities are the policy's own; rewards are the task's; a prompt's answers differ."""
    examples = examples_of(grpo.source.groups(0))
    assert len(examples) == 16 and grpo.source.figures["answers"] == 32
    problems = {problem.id: problem for problem in grpo.plan.problems}
    judge, renderer = get_task("arithmetic"), grpo.plan.renderer
    recalled = grpo.learner.example_logps(examples, 1)
    texts = []
    for example, (logp_T, _) in zip(examples, recalled, strict=True):
        name, _, sample = example.id.rpartition("/")
        problem = problems[name]
        assert sample.startswith("0.")
        assert example.ids[: example.prompt_length] == tuple(renderer.prompt_ids(problem.messages))
        assert torch.allclose(torch.tensor(example.signals["old_logp"]), logp_T, atol=1e-5)
        assert example.ids[-1] in renderer.stop_ids or example.supervised == 48
        texts.append((renderer.decode(example.ids[example.prompt_length :]), problem))
    correct = torch.tensor([float(v.correct) for v in judge.judge_many(texts)]).view(-1, 4)
    advantage = torch.tensor([e.signals["advantage"] for e in examples]).view(-1, 4)
    truth = (correct - correct.mean(1, keepdim=True)) / (correct.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(advantage, truth, atol=1e-5)
    assert advantage.any() and len({text for text, _ in texts[:4]}) > 1


def test_the_reference_is_the_base_and_is_computed_once(grpo, monkeypatch):
    groups = grpo.source.groups(0)
    marked = grpo.learner.with_reference(groups, 1)
    base = grpo.learner.example_logps(examples_of(groups), 1, base=True)
    for (example,), (logp_T, _) in zip(marked, base, strict=True):
        assert torch.allclose(torch.tensor(example.signals["reference_logp"]), logp_T, atol=1e-5)
    policy = grpo.learner.example_logps(examples_of(groups), 1)
    assert not torch.allclose(torch.tensor(marked[0][0].signals["reference_logp"]), policy[0][0], atol=1e-3)
    monkeypatch.setattr(grpo.learner, "example_logps", None)  # a second pass would fail
    assert grpo.learner.with_reference(groups, 2) == marked


def test_ranks_that_share_a_base_pass_through_it_equally_often(grpo, monkeypatch):
    """However much of a step was scored before: a pass needs every rank's part of a layer."""
    learner, rows, recall = grpo.learner, [], grpo.learner.example_logps
    monkeypatch.setattr(learner, "base_logps", BaseLogps(alike=True))
    monkeypatch.setattr(
        learner, "example_logps", lambda some, *a, **k: rows.append(len(some)) or recall(some, *a, **k)
    )
    groups = grpo.source.groups(0)[:4]
    first = learner.with_reference(groups[:2], 1)
    assert learner.with_reference(groups, 2)[:2] == first
    assert learner.with_reference(groups, 3)[:2] == first and rows == [2, 4]


def test_answers_survive_a_checkpoint(grpo):
    groups = grpo.source.groups(0)
    again = unpack_groups(pack_groups(groups))
    assert pack_groups(again)["signals"].keys() == {"old_logp", "advantage"}
    for (one,), (other,) in zip(groups, again, strict=True):
        assert (one.id, one.ids, one.prompt_length) == (other.id, other.ids, other.prompt_length)
        for name, value in one.signals.items():
            assert torch.equal(torch.tensor(value), torch.tensor(other.signals[name])), name


def test_streams_differ_for_every_seed_rollout_and_sample():
    every = product((0, 1, 2**32 - 1), range(4), range(4))
    seeds = [stream_seed(seed, rollout, sample) for seed, rollout, sample in every]
    assert len(set(seeds)) == len(seeds)


def test_no_two_requests_of_a_rollout_are_equal_however_many_ranks_ask_them(grpo, monkeypatch):
    """A problem that is drawn twice; a rank may be left without one."""
    requests = []

    def note(model, asked, **_):
        requests.extend(asked)
        return [Completion([5], False)] * len(asked)

    monkeypatch.setattr(rollouts, "generate", note)
    first, second = grpo.plan.problems[:2]

    def ask(problems, rank, world):
        requests.clear()
        config, mine = grpo.plan.rollouts, slice(rank, None, world)
        answers = sample_answers(
            None, grpo.plan.renderer, get_task("arithmetic"), problems, config, seed=7, rollout=1, mine=mine
        )
        names = [answer.example.id for some in answers for answer in some]
        return list(zip(names, [(r.prompt_ids, r.seed) for r in requests], strict=True))

    once = ask([first, second], 0, 1)
    assert [seed for _, (_, seed) in once] == [stream_seed(7, 1, sample) for sample in range(4)] * 2
    twice = ask([first, second, first], 0, 1)
    assert twice[:8] == once and len(dict(twice)) == len(set(dict(twice).values())) == 12
    assert ask([first, second, first], 0, 2) + ask([first, second, first], 1, 2) == [
        *twice[:4],
        *twice[8:],
        *twice[4:8],
    ]
    assert ask([first, second, first], 3, 4) == []


def test_one_step_for_a_rollout_needs_no_old_log_probabilities(grpo):
    """On policy the ratio is 1: the same gradient without the pass that scores the answers."""
    groups = grpo.source.groups(0)
    bare = [(replace(e, signals={"advantage": e.signals["advantage"]}),) for (e,) in groups]
    (scored, _), (fresh, _) = gradients(grpo, groups), gradients(grpo, bare)
    assert (scored - fresh).norm() <= 1e-4 * scored.norm()
    single = make_trainer("grpo")
    (example,) = single.source.groups(0)[0]
    assert example.signals.keys() == {"advantage"}


def test_supervised_objectives_learn_from_correct_answers_and_dpo_from_pairs():
    judge = get_task("arithmetic")
    for name in ("rft", "dpo"):
        trainer = make_trainer(name, "rollouts.rounds=2", "train.learning_rate=1e-2")
        problems = {problem.id: problem for problem in trainer.plan.problems}
        groups = trainer.source.groups(0)
        sides = list(zip(*groups, strict=True))
        verdicts = []
        for side in sides:
            asked = [problems[example.id.rpartition("/")[0]] for example in side]
            texts = [trainer.plan.renderer.decode(e.ids[e.prompt_length :]) for e in side]
            found = judge.judge_many(list(zip(texts, asked, strict=True)))
            verdicts.append([verdict.correct for verdict in found])
        assert all(verdicts[0]) and len(sides) == (2 if name == "dpo" else 1)
        if name == "dpo":
            assert not any(verdicts[1])
            assert all(a.ids[: a.prompt_length] == b.ids[: b.prompt_length] for a, b in groups)
            assert [e.signals["preference"] for e in groups[0]] == [1, -1]
            continue
        for step in range(3):  # the second round begins with step 3 of four, from another policy
            trainer.step(step)
            assert trainer.source.rollout == step // 2
        assert {e.ids for e in examples_of(trainer.source.fixed.known)} - {e.ids for e in examples_of(groups)}


def test_a_truncated_answer_counts_as_wrong_or_as_it_is_judged():
    """Cut before its end token, an answer may have said the right number already."""
    rewards = {}
    for kind in ("wrong", "judged"):
        changes = ("rollouts.max_new_tokens=14", f"rollouts.truncated={kind}", "train.batch_size=64")
        trainer = make_trainer("grpo", *changes)
        trainer.source.groups(0)
        rewards[kind] = trainer.source.figures["reward"]
        assert 0 < trainer.source.figures["truncated"] < 1
    assert rewards["wrong"] < rewards["judged"]


class StopsAtTwoNewlines(Judge):
    def cut(self, text):
        return text.split("\n\n")[0]


@pytest.mark.parametrize(
    ("text", "end", "kept", "answer", "ended"),
    [
        ("ab\n\ncd", 9, "ab\n\n", "ab", True),  # the stop rule came first: neither `cd` nor the end token
        ("ab\n\ncd", None, "ab\n\n", "ab", True),  # so it is not truncated
        ("ab\ncd", 9, "ab\ncd\t", "ab\ncd", True),
        ("ab\ncd", None, "ab\ncd", "ab\ncd", False),
        ("\n\ncd", 9, "\n\n", "", True),
        ("", 9, "\t", "", True),
    ],
)
def test_an_answer_ends_at_the_stop_rule_of_its_task(text, end, kept, answer, ended):
    """As in evaluation; and no token that came later is learned from."""
    letters = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    completion = Completion([*map(ord, text)], end is not None, end)
    found = up_to_the_stop(completion, letters, StopsAtTwoNewlines())
    assert found == ([*map(ord, kept)], answer, ended)


# --- resuming -------------------------------------------------------------------------------------------


RESUMED = {
    "grpo": {"rollouts": {"updates": 3}, "objective": {"name": "grpo", "kl": 0.05}},
    "ppo": {"rollouts": {"updates": 3}, "objective": {"name": "ppo"}},
    "dpo": {"rollouts": {"rounds": 2}, "objective": {"name": "dpo"}},
}


def recipe_file(path, name):
    """Two rollouts of three steps each, with dropout, accumulation and a checkpoint after every step."""
    changes = RESUMED[name]
    recipe = {
        "model": {"name": "tiny"},
        "adapter": {"r": 8, "dropout": 0.1},
        "data": {"source": "arithmetic", "sample": 16, "max_length": 256},
        "objective": changes["objective"],
        "rollouts": {"samples": 4, "max_new_tokens": 24, "rows": 16, **changes["rollouts"]},
        "train": {
            "learning_rate": 1e-3,
            "batch_size": 8,
            "micro_batch_size": 4,
            "max_steps": 6,
            "save_steps": 1,
            "keep_checkpoints": 9,
        },
        "output": str(path / "run"),
    }
    (path / "r.yaml").write_text(json.dumps(recipe))
    return path / "r.yaml"


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Undisturbed runs by method: (recipe file, folder)."""
    made = {}

    def whole(name):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            file = recipe_file(path, name)
            code, told = run("train", str(file))
            assert code == 0, told
            made[name] = file, (path / "run").rename(path / "whole")
        return made[name]

    return whole


def cut_back(whole, run_dir, step):
    """`run_dir` as the whole run was after `step`."""
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "adapter")
    for later in range(step + 1, 7):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{later:06d}")


@pytest.mark.parametrize(
    "name", ["ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "dpo"))]
)
def test_a_run_resumes_bit_exactly_within_a_rollout(name, whole_runs):
    """The answers that steps 5 and 6 learn from are in the checkpoint of step 4."""
    step = 4
    file, whole = whole_runs(name)
    run_dir = whole.parent / "run"
    cut_back(whole, run_dir, step)
    code, told = run("train", str(file), "--resume")
    assert code == 0 and f"resuming after step {step}" in told, told
    assert adapter(run_dir) == adapter(whole) and lines(run_dir) == lines(whole)


def kill_and_resume(file, whole, after: int, delay: float) -> bool:
    """SIGKILL `delay` seconds after step `after` was logged, then resume; whether it came in time."""
    run_dir = whole.parent / "run"
    cut_back(whole, run_dir, after - 1)
    child = start("train", str(file), "--resume")
    metrics = run_dir / "metrics.jsonl"
    before = metrics.stat().st_ino, metrics.read_bytes()
    wait_for(lambda: metrics.read_bytes() != before[1] and metrics.read_bytes().count(b"\n") >= after)
    child.join(delay)
    child.kill()
    killed = finish(child)[0] < 0
    code, told = run("train", str(file), "--resume")
    assert code == 0, told
    assert adapter(run_dir) == adapter(whole) and lines(run_dir) == lines(whole)
    return killed


def test_sigkill_during_a_rollout(whole_runs):
    """After step 3 a rollout follows."""
    file, whole = whole_runs("grpo")
    assert kill_and_resume(file, whole, after=3, delay=0.1)


@pytest.mark.slow
def test_sigkill_at_20_points(whole_runs):
    """Ten kills within rollouts and ten within updates: a rollout follows step 3, an update step 4."""
    file, whole = whole_runs("grpo")
    seconds = [json.loads(line)["seconds"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    killed = 0
    for i in range(20):
        after = 3 + i % 2
        killed += kill_and_resume(file, whole, after, seconds[after] * (i // 2) / 10)
        print(f"{i + 1} of 20 resumed bit-exactly, {killed} were killed before their end", flush=True)
    assert killed >= 16


def test_the_value_head_learns_and_stays_out_of_the_adapter(whole_runs):
    _, whole = whole_runs("ppo")
    state = load_file(whole / "checkpoints" / "step-000006" / "optimizer.safetensors")
    head = state["extra.value_head.weight"]
    assert head.shape[0] == 1 and head.dtype == torch.float32 and head.any()
    assert all("lora" in name for name in load_file(whole / "adapter" / "adapter_model.safetensors"))
    assert {"reward", "truncated", "answers_used", "generated_tokens"} <= lines(whole)[0].keys()


def test_a_longer_run_whose_rounds_would_begin_elsewhere_is_refused():
    """It would go back a round and sample it again. Online objectives sample as often as they need."""

    def guarded(name, *changes):
        return guarded_fields(
            make_plan(load_recipe(f"tiny_{name}", (*SMALL, *changes))), torch.device("cpu"), 1
        )

    before = guarded("rft", "rollouts.rounds=2")
    with pytest.raises(RequestError, match="steps per rollout was 2, is 4"):
        refuse_differences(before, guarded("rft", "rollouts.rounds=2", "train.max_steps=8"), extend=True)
    refuse_differences(guarded("grpo"), guarded("grpo", "train.max_steps=8"), extend=True)
    of_an_earlier_version = {name: value for name, value in before.items() if name != ROUND}
    refuse_differences(of_an_earlier_version, before, extend=False)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["rollouts.samples=1"], RecipeError, "rollouts.samples: 'grpo' compares answers to a problem"),
        (["rollouts.rounds=2"], RecipeError, "rollouts.rounds: 'grpo' always samples anew"),
        (["train.batch_size=20", "rollouts.samples=8"], RecipeError, "not a multiple of rollouts.samples 8"),
        (
            ["objective={name: sft}", "rollouts.updates=2"],
            RecipeError,
            "rollouts.updates: 'sft' is not",
        ),
        (["objective={name: sft}", "train.max_steps=null"], RecipeError, "train.max_steps: give it"),
        (["train.shard=true"], RecipeError, "train.shard: not where a run samples its own answers"),
        (["model.backend=unsloth"], RecipeError, "model.backend 'unsloth': not where"),
        (
            ["rollouts.max_new_tokens=1000"],
            DataError,
            "the longest prompt and answer",
        ),
        (["objective={name: dpo}", "rollouts=null"], DataError, "a task has no preference pairs"),
    ],
)
def test_contradictions_are_named_before_a_model_is_loaded(changes, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        make_plan(load_recipe("tiny_grpo", [*SMALL, *changes]))


def test_problems_without_a_reference_answer_cannot_be_judged(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"problem": "Why?", "solution": "Because."}) + "\n")
    changes = [f"data.source={file}", "data.sample=null"]
    with pytest.raises(DataError, match=r"no row has a reference answer.*data\.answer"):
        make_plan(load_recipe("tiny_grpo", [*SMALL, *changes]))
    file.write_text(json.dumps({"problem": "What is 2 + 2?", "answer": 4}) + "\n")
    (problem,) = make_plan(load_recipe("tiny_grpo", [*SMALL, *changes])).problems
    assert (problem.answer, problem.solution) == ("4", None)


def test_rollouts_that_are_all_cut_end_the_run_by_name(tmp_path):
    recipe = load_recipe("tiny_grpo", [*SMALL, "rollouts.max_new_tokens=2", f"output={tmp_path / 'run'}"])
    with pytest.raises(RunError, match=r"step 1: all 16 answers were cut at rollouts\.max_new_tokens 2"):
        train(recipe)


RESIDENT = ("weights", "adapter", "gradients", "optimizer")
FITS = {"train.micro_batch_size": 8, "predicted_peak": 2**30}


@pytest.mark.parametrize("name", ["tiny_dpo", "tiny_ppo"])
def test_preflight_measures_a_run_with_rollouts(name):
    from dft_lora.training.preflight import preflight, preflight_table

    found = preflight(load_recipe(name, [*SMALL, "rollouts.rows=256"]))
    assert found["peak"] > 0 and found["longest_micro_batch"][1] >= 48
    resident, decoding = sum(found["bytes"][part] for part in RESIDENT), found["answers"]["bytes"]
    assert found["answers"]["rows"] == 256 and found["peak"] >= resident + decoding
    text = preflight_table(found | {"rollout_rows": 32, "proposal": FITS})
    assert "decoding, at most" in text and "--set rollouts.rows=32" in text


def test_doctor_reads_the_data_of_a_run_with_rollouts():
    from dft_lora.environment import data_report

    assert data_report(load_recipe("tiny_grpo", SMALL))["without answer"] == "0"
