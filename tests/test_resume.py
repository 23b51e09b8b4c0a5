"""A run that was stopped, by whatever, ends with the adapter and metrics of one that was not, bit for bit."""

import functools
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from fault_runs import BASE, adapter, finish, lines, run, start, write_data, write_recipe
from patience import wait_for

from dft_lora.config import load_recipe
from dft_lora.errors import RequestError
from dft_lora.evaluation.evaluate import evaluate
from dft_lora.runs.folder import RunFolder
from dft_lora.training.loop import train
from dft_lora.training.resume_guard import ANSWERS, ROUND, refuse_differences

STEPS = 9
ADAPTER = "adapter_model.safetensors"
SCALE = 2.0**29


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that nothing disturbed; it leaves checkpoints of steps 3, 6 and 9."""
    path = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(path / "r.yaml", data, path / "run", train={"max_steps": STEPS})
    code, told = run("train", str(recipe))
    assert code == 0, told
    return path / "run"


@pytest.fixture
def recipe(data, tmp_path):
    return write_recipe(tmp_path / "r.yaml", data, tmp_path / "run", train={"max_steps": STEPS})


@pytest.fixture
def stopped(whole, recipe):
    """The whole run as if it had been killed while logging step 10, with checkpoints of 3 and 6."""
    run_dir = recipe.parent / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "adapter")
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:06d}")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    for killed_while_writing in (".run.json.123.tmp", "evaluation/.tiny-arith.jsonl.123.tmp"):
        (run_dir / killed_while_writing).parent.mkdir(exist_ok=True)
        (run_dir / killed_while_writing).write_text("{")
    return run_dir


def assert_same(run_dir, whole):
    assert adapter(run_dir) == adapter(whole)
    assert lines(run_dir) == lines(whole)
    assert not list(run_dir.rglob(".*")), "leftovers"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_keeps_it_and_the_run_goes_on_to_the_bit(whole, recipe, number, code):
    run_dir = recipe.parent / "run"
    child = start("train", str(recipe))
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file() and len(lines(run_dir)) >= 4)
    os.kill(child.pid, number)
    exit_code, told = finish(child)
    done = len(lines(run_dir))
    assert exit_code == code and done < STEPS, told
    assert (run_dir / "checkpoints" / f"step-{done:06d}").is_dir() and not (run_dir / "adapter").exists()
    assert "--resume" in told and "Traceback" not in told
    assert run("train", str(recipe), "--resume")[0] == 0
    assert_same(run_dir, whole)


def test_a_second_ctrl_c_stops_at_once(data, tmp_path):
    endless = {"batch_size": 40_000, "max_steps": 2}
    child = start("train", str(write_recipe(tmp_path / "r.yaml", data, tmp_path / "run", train=endless)))
    wait_for((tmp_path / "run" / "run.json").is_file)
    os.kill(child.pid, signal.SIGINT)
    wait_for(lambda: "stopping after this step" in child.log.read_text())
    time.sleep(1.2)  # two within a second are taken for one key pressed
    os.kill(child.pid, signal.SIGINT)
    assert finish(child)[0] == -signal.SIGINT


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(whole, recipe, stopped):
    state = stopped / "checkpoints" / "step-000006" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    code, told = run("train", str(recipe), "--resume")
    assert code == 0 and "step-000006: optimizer.safetensors has" in told and "after step 3" in told
    assert_same(stopped, whole)


def test_without_a_whole_checkpoint_the_run_does_not_start_afresh(recipe, stopped):
    before = (stopped / "metrics.jsonl").read_bytes()
    for checkpoint in (stopped / "checkpoints").iterdir():
        (checkpoint / "optimizer.safetensors").unlink()
    code, told = run("train", str(recipe), "--resume")
    assert code == 1 and "Traceback" not in told
    assert all(f"step-00000{n}: optimizer.safetensors is missing" in told for n in (3, 6))
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, recipe, stopped):
    shutil.rmtree(stopped / "checkpoints")
    code, told = run("train", str(recipe), "--resume")
    assert code == 0 and "after step 0" in told
    assert_same(stopped, whole)


def test_an_objective_that_looks_at_its_step_first_goes_on_to_the_bit(data, tmp_path):
    """cadft scores a step before it trains on it: that look leaves no trace that a checkpoint would miss."""
    train = {"max_steps": 6, "save_steps": 3}
    path = write_recipe(tmp_path / "r.yaml", data, tmp_path / "run", train=train, objective={"name": "cadft"})
    assert run("train", str(path))[0] == 0
    run_dir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    shutil.copytree(run_dir, undisturbed)
    shutil.rmtree(run_dir / "adapter")
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    code, told = run("train", str(path), "--resume")
    assert code == 0 and "resuming after step 3" in told
    assert_same(run_dir, undisturbed)


def test_extending_a_finished_run_goes_on_and_is_remembered(whole, recipe):
    run_dir = recipe.parent / "run"
    shutil.copytree(whole, run_dir)
    longer = ("train", str(recipe), "--set", f"train.max_steps={STEPS + 2}")
    code, told = run(*longer, "--resume")
    assert code == 2 and "steps was 9, is 11" in told and "--extend" in told
    assert run(*longer, "--extend")[0] == 0
    assert lines(run_dir)[:STEPS] == lines(whole) and len(lines(run_dir)) == STEPS + 2
    assert adapter(run_dir) != adapter(whole)
    facts = json.loads((run_dir / "run.json").read_text())
    assert [again["step"] for again in facts["resumed"]] == [STEPS] and facts["steps"] == STEPS + 2


CHANGES = {
    "train.learning_rate=2e-3": "train.learning_rate was 0.001, is 0.002",
    "objective.name=sft": "objective.name was 'dft', is 'sft'",
    "adapter.dropout=0": "adapter.dropout was 0.1, is 0.0",
    "data.template=plain": "template was",
    "model.dtype=bfloat16": "dtype was 'float32', is 'bfloat16'",
    "train.max_steps=8": "steps was 9, is 8",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("extend", [False, True])
def test_another_recipe_is_refused_with_what_differs(recipe, stopped, change, extend):
    with pytest.raises(RequestError) as refused:
        train(load_recipe(recipe, [change]), resume=True, extend=extend)
    assert CHANGES[change] in str(refused.value) and "\n" not in str(refused.value)


def test_other_data_and_another_base_are_refused(recipe, data, stopped, tmp_path):
    from dft_lora.config import ModelConfig
    from dft_lora.model.load import resolve

    base = tmp_path / "base"
    shutil.copytree(resolve(ModelConfig(name=load_recipe(recipe).model.name)), base)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("so so", "so"))
    for change, names in ((f"data.source={other}", "data was"), (f"model.name={base}", "base was")):
        with pytest.raises(RequestError, match=names):
            train(load_recipe(recipe, [change]), resume=True)


ASKED = ("--task", "arithmetic", "--samples", "1", "--limit", "2")


def test_a_run_that_has_not_finished_is_not_evaluated_unless_a_checkpoint_is_named(recipe, stopped):
    newest = stopped / "checkpoints" / "step-000006"
    for command in (("evaluate", str(stopped), *ASKED), ("compare", str(stopped)), ("app", str(stopped))):
        code, told = run(*command)
        assert code == 2 and told.count("\n") == 1, told
        assert "has not finished" in told and "--resume" in told and str(newest) in told
    code, told = run("evaluate", str(newest), *ASKED)
    assert code == 0, told
    assert adapter(stopped / "steps" / "step-000006") == (newest / "adapter" / ADAPTER).read_bytes()
    assert (stopped / "steps" / "step-000006" / "report.json").is_file()
    code, told = run("evaluate", str(stopped / "checkpoints" / "step-000007"), *ASKED)
    assert code == 2 and "available: step-000003, step-000006" in told
    assert run("train", str(recipe), "--resume")[0] == 0
    code, told = run("evaluate", str(stopped), *ASKED)
    assert code == 0, told


def test_a_run_that_is_being_extended_has_not_finished(whole, recipe):
    """Its adapter is still that of fewer steps."""
    run_dir = recipe.parent / "run"
    shutil.copytree(whole, run_dir)
    assert RunFolder(run_dir).finished
    child = start("train", str(recipe), "--set", "train.max_steps=400", "--extend")
    wait_for(lambda: len(lines(run_dir)) > STEPS)
    os.kill(child.pid, signal.SIGINT)
    assert finish(child)[0] == 130
    assert adapter(run_dir) == adapter(whole) and not RunFolder(run_dir).finished
    code, told = run("evaluate", str(run_dir), *ASKED)
    assert code == 2 and "no adapter of step 400" in told


def test_a_damaged_final_adapter_is_mended_from_the_last_checkpoint(whole, recipe):
    run_dir = recipe.parent / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert run("train", str(recipe), "--resume")[0] == 0
    assert_same(run_dir, whole)


def test_where_it_is_written_and_how_it_is_judged_are_free(whole, recipe, stopped):
    moved = stopped.rename(stopped.with_name("moved"))
    free = ("evaluate.samples=3", "train.save_steps=100", f"output={moved}")
    assert run("train", str(recipe), "--resume", *(x for f in free for x in ("--set", f)))[0] == 0
    assert_same(moved, whole)


def kill_and_resume(recipe, whole, after: int, delay: float, draws: bool = False) -> bool:
    """SIGKILL `delay` seconds after `after` steps were logged, then resume; whether it came in time."""
    run_dir = recipe.parent / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    child = start("train", str(recipe), draws=draws)
    metrics = run_dir / "metrics.jsonl"
    wait_for(lambda: not after or (metrics.is_file() and metrics.read_bytes().count(b"\n") >= after))
    child.join(delay)
    child.kill()
    killed = finish(child)[0] == -signal.SIGKILL
    code, told = run("train", str(recipe), "--resume")
    assert code == 0, told
    assert_same(run_dir, whole)
    return killed


def test_sigkill(whole, recipe):
    rng = random.Random(0)
    assert kill_and_resume(recipe, whole, 0, rng.uniform(0, 0.5))
    assert kill_and_resume(recipe, whole, 5, rng.uniform(0, 0.05))


def test_sigkill_in_float16_keeps_the_loss_scale(data, tmp_path):
    """The scale begins so high that the run's first steps overflow, one before and one after the kill."""
    settings = {"max_steps": 12, "save_steps": 3, "batch_size": 2, "micro_batch_size": 1}
    changes = {"model": {"name": BASE, "dtype": "float16"}, "train": settings}
    recipe = write_recipe(tmp_path / "r.yaml", data, tmp_path / "run", **changes)
    assert run("train", str(recipe), setup=_scale_high)[0] == 0
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    skipped = [line["skipped"] for line in lines(whole)]
    assert skipped[:4] == [True] * 4 and not skipped[-1]
    assert RunFolder(whole).run()["skipped_steps"] == sum(skipped)
    child = start("train", str(recipe), setup=_scale_high)
    run_dir = tmp_path / "run"
    wait_for((run_dir / "checkpoints" / "step-000003" / "manifest.json").is_file)
    child.kill()
    assert finish(child)[0] == -signal.SIGKILL and len(lines(run_dir)) < 12
    assert run("train", str(recipe), "--resume")[0] == 0  # without the high scale: the checkpoint has it
    assert_same(run_dir, whole)
    assert RunFolder(run_dir).run()["skipped_steps"] == sum(skipped)


def _scale_high() -> None:
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = functools.partial(scaler, init_scale=SCALE)


@pytest.mark.slow
def test_sigkill_at_50_random_points_of_a_30_step_run(data, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", data, tmp_path / "run")
    assert run("train", str(recipe))[0] == 0
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    step_seconds = sorted(line["seconds"] for line in RunFolder(whole).metrics())
    rng, killed = random.Random(0), 0
    for i in range(50):
        after = rng.randrange(31)
        delay = rng.uniform(0, 2 * step_seconds[15] if after else 2)
        killed += kill_and_resume(recipe, whole, after, delay, draws=True)
        print(f"{i + 1} of 50 ended bit-equal; {killed} were killed before their end", flush=True)
    assert killed >= 40


def test_a_field_that_an_earlier_version_did_not_have_counts_as_its_default():
    now = {"steps": 3, "model.gguf": None, "train.optimizer": "adamw"}
    refuse_differences({"steps": 3}, now, extend=False)
    with pytest.raises(RequestError, match=r"train\.optimizer was 'adamw', is 'adamw8bit'"):
        refuse_differences({"steps": 3}, now | {"train.optimizer": "adamw8bit"}, extend=False)
    rollouts = {"rollouts.samples": 4, "rollouts.rows": 64}
    refuse_differences({"steps": 3, "rollouts.samples": 4}, {"steps": 3} | rollouts, extend=False)
    unset = {"steps": 3, "rollouts": None, ROUND: 1}
    written_out = {"steps": 3, "rollouts.samples": 8, ROUND: 1}
    refuse_differences(unset, written_out, extend=False)
    with pytest.raises(RequestError, match=r"rollouts\.samples was 8, is 4"):
        refuse_differences(unset, written_out | {"rollouts.samples": 4}, extend=False)


def test_a_field_that_no_longer_counts_may_differ():
    refuse_differences({"steps": 3, "train.logging_steps": 1}, {"steps": 3}, extend=False)


def test_other_reference_answers_are_another_run():
    """They judge the answers of a rollout. Runs of earlier versions did not record them."""
    refuse_differences({"steps": 3}, {"steps": 3, ANSWERS: "a"}, extend=False)
    with pytest.raises(RequestError, match="reference answers was 'a', is 'b'"):
        refuse_differences({"steps": 3, ANSWERS: "a"}, {"steps": 3, ANSWERS: "b"}, extend=False)


def test_two_processes_never_write_to_one_run(whole, recipe, tmp_path):
    """Refused before a model is loaded; nothing is left of a run that never began."""
    busy = "another process is training or evaluating this run"
    folder, other = RunFolder(recipe.parent / "run"), shutil.copytree(whole, tmp_path / "copy")
    with folder.held(), pytest.raises(RequestError, match=busy):
        train(load_recipe(recipe))
    assert not folder.path.exists()
    with RunFolder(other).held(), pytest.raises(RequestError, match=busy):
        evaluate([other], ["arithmetic"])
    assert not (other / "evaluation").exists()


def test_a_file_that_marks_a_lock_is_no_lock(tmp_path):
    """It stays behind when a process is killed; where a file system cannot lock, a run is not held."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / ".lock").write_text("1234\nanother-host\n")
    with folder.held():
        pass
