"""Faults put into real steps and real runs: bad numbers, no memory, no disk, bad rows, hostile files."""

import functools
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import statistics
import time

import pytest
import torch
from fault_runs import lines, run, write_data, write_recipe

from dft_lora.config import ModelConfig, load_recipe
from dft_lora.data.batches import step_indices, ungrouped
from dft_lora.data.doctor import findings_table
from dft_lora.data.templates import Example
from dft_lora.errors import DataError, ModelError, RequestError, RunError
from dft_lora.model.hardware import RULES, choose
from dft_lora.model.load import load_adapters, load_base, load_tokenizer, resolve
from dft_lora.runs.folder import RunFolder, steps_in
from dft_lora.tasks import get_task
from dft_lora.training import learner as learner_module
from dft_lora.training import trainer as trainer_module
from dft_lora.training.checkpoints import Checkpoints
from dft_lora.training.faults import LIMIT_IN_A_ROW, Layout, SaveClock, is_out_of_memory
from dft_lora.training.metrics import Sums
from dft_lora.training.plan import make_plan
from dft_lora.training.ranks import Ranks
from dft_lora.training.steps import FixedGroups
from dft_lora.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("many_runs")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def make_trainer(data, tmp_path):
    """A trainer of four micro-batches a step; changes are recipe fields."""
    torch.set_num_threads(1)

    def make(*changes: str) -> Trainer:
        recipe = write_recipe(tmp_path / "r.yaml", data, tmp_path / "run", train={"batch_size": 8})
        recipe = load_recipe(recipe, ("adapter.dropout=0", *changes))
        return Trainer(make_plan(recipe), Ranks(recipe))

    return make


def first_layer(trainer) -> torch.nn.Module:
    return trainer.learner.adapter_model.get_base_model().get_decoder().layers[0]


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.learner.trainable])


def optimizer_state(trainer) -> list:
    """Every value of the optimizer's state, tensors as bytes."""
    found = []

    def walk(value):
        if isinstance(value, dict):
            for key in value:
                walk(value[key])
        else:
            found.append(value.numpy().tobytes() if isinstance(value, torch.Tensor) else value)

    walk(trainer.learner.optimizer.state_dict()["state"])
    return found


# --- numbers that are not finite --------------------------------------------------------------


def poison(trainer, where: str, value: float, at: set[int]):
    """Let `value` into the hidden state (`loss`) or its gradient, in micro-batches `at`; returns the hook."""
    count = iter(range(10**6))

    def hook(_module, _arguments, h_BLD):
        if next(count) not in at:
            return None
        if where == "loss":
            return h_BLD * value
        h_BLD.register_hook(lambda gradient: gradient * value)
        return None

    return first_layer(trainer).register_forward_hook(hook)


PAIRWISE = {("loss", "nan", "adamw"), ("loss", "inf", "adamw8bit")}
PAIRWISE |= {("gradient", "nan", "adamw8bit"), ("gradient", "inf", "adamw")}
"""Every two of place, value and optimizer meet in one of these; the other four are slow."""


@pytest.mark.parametrize(
    ("where", "value", "optimizer"),
    [
        pytest.param(*case, marks=[] if case in PAIRWISE else pytest.mark.slow)
        for case in itertools.product(("loss", "gradient"), ("nan", "inf"), ("adamw", "adamw8bit"))
    ],
)
def test_one_bad_micro_batch_of_four_changes_nothing(make_trainer, where, value, optimizer):
    trainer = make_trainer(f"train.optimizer={optimizer}")
    trainer.step(0)
    before, state = weights(trainer), optimizer_state(trainer)
    for at in range(4):
        hook = poison(trainer, where, float(value), {at})
        line = trainer.step(1)
        hook.remove()
        assert line["skipped"] is True
        assert torch.equal(weights(trainer), before) and optimizer_state(trainer) == state
        json.dumps(line, allow_nan=False)
        trainer.skips.in_a_row = 0
    assert trainer.skips.total == 4 and trainer.progress()["skipped_steps"] == 4
    line = trainer.step(1)
    assert line["skipped"] is False and not torch.equal(weights(trainer), before)


def test_five_bad_steps_in_a_row_stop_with_a_diagnosis(make_trainer):
    trainer = make_trainer()
    bad = set(range(4 * (LIMIT_IN_A_ROW - 1)))  # every micro-batch of four steps, then a sound one
    hook = poison(trainer, "loss", math.nan, bad)
    for step in range(LIMIT_IN_A_ROW):
        trainer.step(step)
    assert (trainer.skips.total, trainer.skips.in_a_row) == (LIMIT_IN_A_ROW - 1, 0)
    hook.remove()
    poison(trainer, "loss", math.nan, {4 * i + 1 for i in range(100)})  # the second micro-batch of each step
    with pytest.raises(RunError) as stopped:
        for step in range(5, 10):
            trainer.step(step)
    chosen = [trainer.plan.examples[i] for i in step_indices(len(trainer.plan.examples), 8, 0, 9)]
    guilty = trainer.learner.arrange(ungrouped(chosen), 2, trainer.plan.renderer.pad_id)[1].ids
    text = str(stopped.value)
    assert ", ".join(guilty) in text and "float32" in text and "up to step 10" in text and "\n" not in text


def test_weights_that_are_not_finite_are_never_written(data, tmp_path):
    """Two sound steps, each with a checkpoint, then an update by infinity."""
    settings = {"max_steps": 3, "save_steps": 1, "optimizer": "adamw"}
    recipe = write_recipe(tmp_path / "r.yaml", data, tmp_path / "run", train=settings)
    code, told = run("train", str(recipe), setup=_third_update_breaks)
    errors = [line for line in told.splitlines() if "error" in line.lower()]
    assert code == 1 and len(errors) == 1 and "Traceback" not in told, told
    assert "step 3: the adapter's weights are not finite" in errors[0] and "train.learning_rate" in errors[0]
    left = Checkpoints(tmp_path / "run" / "checkpoints", 3)
    assert [path.name for path in steps_in(left.path).values()] == ["step-000001", "step-000002"]
    state, _ = left.newest()
    assert all(weight.isfinite().all() for weight in state.adapter.values())
    assert not (tmp_path / "run" / "adapter").exists()


def _third_update_breaks() -> None:
    """A learning rate that the recipe itself would refuse."""
    trainer_module.schedule = lambda step, *_: 1.0 if step < 2 else math.inf


@pytest.mark.parametrize(
    "field", ["train.learning_rate", "train.weight_decay", "adapter.alpha", "train.warmup"]
)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_numbers_that_are_not_finite_are_refused_by_name(field, value):
    with pytest.raises(RequestError, match=field):
        load_recipe("tiny_dft", [f"{field}={value}"])


# --- float16: the loss is scaled --------------------------------------------------------------


def wrap_as_on_a_gpu(trainer, monkeypatch) -> None:
    """Put around the forward what accelerate puts there for fp16 on CUDA: autocast and outputs in float32.

    The run asks for none of it; a trainer that does must still get the right step.
    """
    accelerator, model = trainer.learner.accelerator, trainer.learner.adapter_model
    with monkeypatch.context() as gpu:
        gpu.setattr(accelerator, "native_amp", True)
        gpu.setitem(accelerator.state.__dict__, "_mixed_precision", "fp16")
        model._is_accelerate_prepared = False
        accelerator.prepare_model(model)


def set_scale(trainer, **state) -> None:
    scaler = trainer.ranks.scaler
    scaler.load_state_dict(scaler.state_dict() | state)


@pytest.mark.parametrize(
    ("wrapped", "changes"),
    [
        (False, ()),
        pytest.param(True, (), marks=pytest.mark.slow),
        (True, ("objective.name=asft", "train.optimizer=adamw", "train.gradient_checkpointing=true")),
        pytest.param(True, ("objective.name=iw-sft",), marks=pytest.mark.slow),
    ],
)
def test_float16_overflows_skips_and_recovers(make_trainer, monkeypatch, changes, wrapped):
    changes = ("adapter.target_modules=all-linear", "model.dtype=float16", *changes)
    changes = ("train.batch_size=2", "train.micro_batch_size=1", *changes)
    calm, trainer = make_trainer(*changes), make_trainer(*changes)
    set_scale(calm, scale=2.0**8)
    expected = calm.step(0)
    if wrapped:
        wrap_as_on_a_gpu(trainer, monkeypatch)
    autocast = []
    first_layer(trainer).register_forward_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    line = trainer.step(0)
    assert set(autocast) == {wrapped}
    assert line["skipped"] is False and trainer.ranks.scaler.get_scale() == 2**16
    for key in ("loss", "nll", "grad_norm"):
        assert line[key] == pytest.approx(expected[key], rel=0.01), key

    before, state, skipped, scale = weights(trainer), optimizer_state(trainer), 0, 2.0**29
    set_scale(trainer, scale=scale)
    while (line := trainer.step(1))["skipped"]:
        skipped, scale = skipped + 1, scale / 2
        assert trainer.ranks.scaler.get_scale() == scale
        assert torch.equal(weights(trainer), before) and optimizer_state(trainer) == state
        assert line["grad_norm"] is None and line["loss"] is not None
        json.dumps(line, allow_nan=False)
    assert LIMIT_IN_A_ROW < skipped < 32, "more in a row than a run without a scaler survives"
    assert trainer.progress()["skipped_steps"] == skipped and trainer.skips.in_a_row == 0
    assert math.isfinite(line["grad_norm"]) and not torch.equal(weights(trainer), before)
    set_scale(trainer, scale=2.0**10, growth_interval=2, _growth_tracker=0)
    assert not trainer.step(2)["skipped"] and not trainer.step(3)["skipped"]
    assert trainer.ranks.scaler.get_scale() == 2**11


def test_float16_stops_where_scaling_does_not_help(make_trainer):
    trainer = make_trainer("model.dtype=float16")
    poison(trainer, "gradient", math.nan, set(range(10**4)))
    set_scale(trainer, scale=4.0)
    with pytest.raises(RunError, match="up to step 7; base in float16"):
        for step in range(10):
            trainer.step(step)
    assert (trainer.skips.total, trainer.skips.in_a_row) == (7, LIMIT_IN_A_ROW)


def test_float16_loss_that_is_not_finite_leaves_the_scale(make_trainer):
    trainer = make_trainer("model.dtype=float16")
    hook = poison(trainer, "loss", math.inf, {1})
    assert trainer.step(0)["skipped"] is True and trainer.skips.in_a_row == 1
    hook.remove()
    assert trainer.step(1)["skipped"] is False and trainer.ranks.scaler.get_scale() == 2**16


# --- memory -----------------------------------------------------------------------------------


def starve(trainer, monkeypatch, where: str, error: Exception, rows: int = 2) -> None:
    """Raise `error` where memory would run out: over `rows` rows in the model, a large chunk in the loss."""

    def too_wide(tensor):
        if len(tensor) > rows:
            raise error

    def hook(_module, _arguments, h_BLD):
        if where == "forward":
            too_wide(h_BLD)
        elif h_BLD.requires_grad:  # a look ahead has no backward pass
            h_BLD.register_hook(too_wide)

    def narrow_loss(*arguments, chunk_bytes, **more):
        if chunk_bytes is None or chunk_bytes > 60_000:
            raise error
        return token_logps(*arguments, chunk_bytes=chunk_bytes, **more)

    token_logps = learner_module.token_logps
    if where == "loss":
        monkeypatch.setattr(learner_module, "token_logps", narrow_loss)
    else:
        first_layer(trainer).register_forward_hook(hook)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("objective", ["dft", "cadft", "iw-sft"])
@pytest.mark.parametrize(
    ("where", "error"),
    zip(["forward", "loss", "backward"], ERRORS, strict=True),
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_step_that_runs_out_of_memory_is_done_in_smaller_pieces(
    make_trainer, monkeypatch, where, error, objective
):
    """cadft looks at its step first, iw-sft at the base: they may run out of memory there, or later."""
    four_rows = ("train.micro_batch_size=4", "data.packing=false", f"objective.name={objective}")
    rounding = {"dft": 1e-6, "cadft": 1e-5, "iw-sft": 1e-5}[
        objective
    ]  # a standard score multiplies that of the NLLs
    calm, trainer = make_trainer(*four_rows), make_trainer(*four_rows)
    expected = [calm.step(step) for step in range(2)]
    starve(trainer, monkeypatch, where, error)
    for step in range(2):
        line = trainer.step(step)
        for key in ("loss", "nll", "grad_norm", "tokens", "supervised_tokens", "skipped"):
            assert line[key] == pytest.approx(expected[step][key], rel=rounding), key
    assert (weights(trainer) - weights(calm)).norm() <= 1e-3 * weights(
        calm
    ).norm()  # 8-bit states round apart
    learner = trainer.learner
    assert {retreat["step"] for retreat in learner.retreats} == {1} and len(learner.retreats) <= 3
    row_bytes = len(learner.head.weight_VD) * 4
    if where == "loss":
        assert learner.layout.micro_batch_size == 4
        assert row_bytes <= learner.layout.chunk_bytes < 512 * row_bytes
    else:
        assert learner.layout.micro_batch_size == 2
    assert trainer.progress()["micro_batch_size"] == learner.layout.micro_batch_size


def test_a_run_resumed_after_a_retreat_compares_with_the_same_base(make_trainer, monkeypatch, tmp_path):
    """Rows that were scored under the base before the retreat come again after the resume."""
    changes = ("train.micro_batch_size=4", "data.packing=false", "data.sample=16", "objective.name=iw-sft")
    whole = make_trainer(*changes)
    whole.step(0)
    starve(whole, monkeypatch, "forward", ERRORS[0])
    whole.step(1)
    assert whole.learner.retreats
    whole.save(Checkpoints(tmp_path / "kept", 1))
    resumed = make_trainer(*changes)
    resumed.restore(Checkpoints(tmp_path / "kept", 1).newest()[0])
    found = [[trainer.step(step)["loss"] for step in (2, 3)] for trainer in (whole, resumed)]
    assert found[0] == found[1] and torch.equal(weights(whole), weights(resumed))


def test_after_three_retreats_it_says_what_may_fit(make_trainer, monkeypatch):
    trainer = make_trainer("train.micro_batch_size=8")
    first_layer(trainer).register_forward_hook(lambda *_: (_ for _ in ()).throw(ERRORS[0]))
    with pytest.raises(RunError) as stopped:
        trainer.step(0)
    assert len(trainer.learner.retreats) == 3
    for part in ("2 example(s)", "gradient_checkpointing: true", "micro_batch_size: 1", "data.max_length"):
        assert part in str(stopped.value)


@pytest.mark.parametrize("fits", [2, 0], ids=["pairs fit", "nothing fits"])
def test_pairs_are_never_separated_where_memory_runs_out(make_trainer, monkeypatch, fits):
    trainer = make_trainer("train.micro_batch_size=4", "data.packing=false")
    examples, learner = trainer.plan.examples, trainer.learner
    pairs = list(zip(examples[::2], examples[1::2], strict=True))
    trainer.source = FixedGroups(pairs, per_step=4, seed=0)
    starve(trainer, monkeypatch, "forward", ERRORS[0], rows=fits)
    seen, arrange = [], learner.arrange

    def arranged(*arguments):
        batches = arrange(*arguments)
        seen.append([set(batch.ids) for batch in batches])
        return batches

    learner.arrange = arranged
    if fits:
        trainer.step(0)
    else:
        with pytest.raises(RunError, match="out of memory"):
            trainer.step(0)
    assert learner.layout.micro_batch_size == 2
    assert [len(batches) for batches in seen] == [2, 2, 4] if fits else [2, 2, 4, 4]
    wanted = {frozenset(example.id for example in pair) for pair in trainer.source.groups(0)}
    for batches in seen:
        assert all(sum(pair <= ids for ids in batches) == 1 for pair in wanted)


def test_layouts_shrink_to_one_row_of_one_example_and_no_further():
    layout, seen = Layout(5), []
    while layout is not None:
        seen.append((layout.micro_batch_size, layout.chunk_bytes))
        layout = layout.smaller(rows=8, row_bytes=100, first=len(seen) == 1)
    assert seen == [(5, None), (5, 400), (3, 400), (2, 400), (1, 400), (1, 200), (1, 100)]


def test_other_errors_pass_through(make_trainer):
    for said in ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory"):
        assert is_out_of_memory(RuntimeError(said))
    handle = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    assert is_out_of_memory(RuntimeError(handle))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    trainer = make_trainer()
    first_layer(trainer).register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        trainer.step(0)


def limit_memory(megabytes: int) -> None:
    """Leave this process so much more address space than it has."""
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.slow
def test_memory_that_really_runs_out(tmp_path):
    """Ever smaller address spaces, until 64 rows of 250 tokens do not fit at once but fewer do."""
    rows = [{"problem": f"{i} + 1?", "solution": f"{i} " * 60} for i in range(1000, 1064)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"batch_size": 64, "micro_batch_size": 64, "max_steps": 1}
    change = ("--set", "data.max_length=512", "--set", "adapter.dropout=0")

    def within(megabytes):
        out = tmp_path / f"run{megabytes}"
        recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "d.jsonl", out, train=settings)
        code, told = run("train", str(recipe), *change, setup=functools.partial(limit_memory, megabytes))
        assert code == 0, told
        return RunFolder(out).run(), lines(out)[0]["loss"]

    facts, loss = within(8000)
    assert not facts["retreats"]
    for megabytes in (1200, 1050, 900, 800, 700):
        facts, retreated = within(megabytes)
        if facts["retreats"]:
            break
    assert facts["retreats"] and facts["micro_batch_size"] < 64
    assert retreated == pytest.approx(loss, rel=1e-6)
    print(f"{megabytes} MB: {facts['retreats']}")


# --- disk -------------------------------------------------------------------------------------


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_ends_the_run_in_one_line_and_the_run_can_go_on(data, tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yaml", data, tmp_path / "run", train={"max_steps": 4, "save_steps": 2}
    )
    code, told = run("train", str(recipe), setup=functools.partial(limit_files, 50_000))
    errors = [line for line in told.splitlines() if "error" in line.lower()]
    assert code == 1 and len(errors) == 1 and "step-000002" in errors[0] and "Traceback" not in told
    assert run("train", str(recipe), "--resume")[0] == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_checkpoints_come_by_steps_or_by_minutes(monkeypatch):
    assert [step for step in range(1, 10) if SaveClock(3).due(step)] == [3, 6, 9]
    clock = SaveClock(None)
    assert not clock.due(1)
    clock.last -= 301
    assert clock.due(2)
    clock.saved()
    assert not clock.due(3)


# --- odd examples -----------------------------------------------------------------------------


def test_all_masked_and_one_token_rows_add_nothing_and_break_nothing(make_trainer):
    trainer = make_trainer()
    normal, eos = trainer.plan.examples[:6], trainer.plan.renderer.eos_id
    odd = [Example("masked", (7, 8, 9), 3), Example("one", (eos,), 0), Example("one", (eos,), 1)]

    def gradients(chosen):
        trainer.learner.optimizer.zero_grad()
        supervised = sum(example.supervised for example in normal)
        totals, _ = trainer.learner.accumulate(ungrouped(chosen), supervised, step=1)
        return totals, torch.cat([parameter.grad.flatten() for parameter in trainer.learner.trainable])

    (alone, expected), (mixed, found) = gradients(normal), gradients([*odd, *normal])
    assert sum(example.supervised for example in odd) == 0
    assert mixed.loss == pytest.approx(alone.loss, rel=1e-6) and mixed.scored == alone.scored
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    trainer.source = FixedGroups(ungrouped(odd), per_step=8, seed=0)
    line = trainer.step(0)
    assert line["loss"] == 0 and line["supervised_tokens"] == 0
    assert torch.isfinite(weights(trainer)).all()


GOOD = {"problem": "What is 1 + 1?", "solution": "2"}
CORRUPT = {
    "missing field": json.dumps({"problem": "x"}),
    "empty field": json.dumps(GOOD | {"solution": " "}),
    "number": json.dumps(GOOD | {"solution": 5}),
    "null": json.dumps(GOOD | {"problem": None}),
    "broken JSON": '{"problem": "x", ',
    "not an object": "[1]",
    "lone surrogate": '{"problem": "\\ud800", "solution": "x"}',
    "NUL": '{"problem": "a\\u0000b", "solution": "x"}',
    "10 MB string": json.dumps(GOOD | {"solution": "x" * 10_000_000}),
    "wrong role": json.dumps({"messages": [{"role": "wizard", "content": "x"}]}),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_ten_kinds_of_corrupt_rows_are_refused_by_number_or_skipped_and_told(tmp_path, kind):
    rows = [json.dumps(GOOD)] * 4
    rows[2] = CORRUPT[kind]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tmp_path / "d.jsonl", tmp_path / "run"))
    with pytest.raises(DataError, match="row 3"):
        make_plan(recipe)
    plan = make_plan(recipe.override(["data.skip_bad_rows=0.25"]))
    assert (plan.counts["bad_rows"], plan.counts["examples"]) == (1, 3)
    assert "row-3" in findings_table(plan.findings) and "skipped" in findings_table(plan.findings)


def test_the_data_doctor_counts_and_names_rows(tmp_path):
    asked = get_task("arithmetic").problems()[0]
    rows = [
        GOOD,
        GOOD | {"problem": asked.question.upper() + " \n"},
        GOOD,
        GOOD | {"solution": "so " * 400},
        GOOD | {"problem": "so " * 400},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        tmp_path / "r.yaml", tmp_path / "d.jsonl", tmp_path / "run", evaluate={"tasks": ["arithmetic"]}
    )
    plan = make_plan(load_recipe(recipe, ["data.max_length=256"]))
    expected = {
        "over_long": 2,
        "prompts_that_fill_max_length": 1,
        "duplicates": 1,
        "overlap_with_arithmetic": 1,
    }
    assert expected.items() <= plan.counts.items() and plan.counts["examples"] == 3
    by_what = {finding.what: finding.rows for finding in plan.findings}
    assert by_what["longer than data.max_length 256: left out"] == ("row-4", "row-5")
    assert by_what["same text as an earlier row: kept"] == ("row-3",)
    assert by_what["same question as in the evaluation task arithmetic: kept"] == ("row-2",)
    code, told = run("doctor", str(recipe), "--set", "data.max_length=256")
    assert code == 0 and "row-4, row-5" in told


# --- hostile files ----------------------------------------------------------------------------


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "executed"
    yield path
    assert not path.exists()
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload works"


def test_pickles_anywhere_in_a_run_folder_are_never_executed(data, tmp_path, canary):
    run_dir, payload = tmp_path / "run", pickle.dumps(Payload(canary))
    recipe = write_recipe(tmp_path / "r.yaml", data, run_dir, train={"max_steps": 2})
    assert run("train", str(recipe))[0] == 0
    for folder in [run_dir, *(path for path in run_dir.rglob("*") if path.is_dir())]:
        for name in ("adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", "x.pkl"):
            (folder / name).write_bytes(payload)
    assert run("train", str(recipe), "--set", "train.max_steps=3", "--extend")[0] == 0
    base, _ = load_base(load_recipe(recipe).model)
    load_adapters(base, {"run": RunFolder(run_dir).adapter})
    (run_dir / "adapter" / "adapter_model.safetensors").unlink()
    (run_dir / "adapter" / "adapter_model.bin").write_bytes(payload)
    (run_dir / "adapter" / "manifest.json").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_adapters(base, {"run": RunFolder(run_dir).adapter})


def test_a_damaged_adapter_is_refused_by_evaluation(data, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", data, tmp_path / "run", train={"max_steps": 1})
    assert run("train", str(recipe))[0] == 0
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    base, _ = load_base(load_recipe(recipe).model)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged"):
        load_adapters(base, {"run": tmp_path / "run" / "adapter"})


def test_a_models_own_code_is_not_run(tmp_path, canary):
    base = tmp_path / "base"
    shutil.copytree(resolve(ModelConfig()), base)
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "hostile",
        "auto_map": {"AutoConfig": "hostile.C", "AutoModelForCausalLM": "hostile.M"},
    }
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "HostileTokenizer", "auto_map": {"AutoTokenizer": ["hostile.T", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (base / "hostile.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nC = M = T = object\n")
    for load in (load_base, load_tokenizer):
        with pytest.raises(ModelError):
            load(ModelConfig(name=str(base)))


@pytest.mark.parametrize("name", ["../arithmetic", "/etc/passwd", "a/../../b", "..", ""])
def test_names_of_tasks_never_become_paths(name):
    with pytest.raises(RequestError):
        get_task(name)


# --- dtype ------------------------------------------------------------------------------------


def test_the_dtype_is_decided_by_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    for capability, dtype in {(7, 5): torch.float16, (8, 0): torch.bfloat16, (9, 0): torch.bfloat16}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        chosen = choose(parameters=10**9, device=torch.device("cuda"))
        assert chosen.dtype == dtype and chosen.scales_loss == (dtype == torch.float16)
    assert choose(parameters=10**6, device=torch.device("cpu")).dtype == torch.float32
    assert choose("bfloat16", 10**6, torch.device("cpu")).dtype == torch.bfloat16
    code, told = run("doctor")
    assert code == 0 and all(rule.where in told and rule.consequence in told for rule in RULES)


# --- what it costs ----------------------------------------------------------------------------


def bare_step(trainer, step: int) -> None:
    """The step without any of this: no look at the numbers, no way back, no figures kept safe."""
    learner, settings = trainer.learner, trainer.recipe.train
    groups, sums = trainer.source.groups(step), Sums(torch.device("cpu"))
    divisor = learner.divisor(groups)
    for batch in learner.arrange(groups, learner.layout.micro_batch_size, learner.pad_id):
        trainer.ranks.backward(learner.score(batch, sums) / divisor)
    learner.accelerator.clip_grad_norm_(learner.trainable, settings.max_grad_norm)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    sums.values.tolist()


@pytest.mark.slow
def test_all_of_this_costs_at_most_3_percent_of_a_step(make_trainer, tmp_path):
    trainer = make_trainer("adapter.target_modules=all-linear", "train.max_steps=1000")
    folder, clock = RunFolder.create(tmp_path / "timed"), SaveClock(None)

    def guarded_step(trainer, step: int) -> None:
        folder.log(trainer.step(step))
        trainer.ranks.any(False, clock.due(step))

    times = {bare_step: [], guarded_step: []}
    rng = random.Random(0)
    for step in range(60):
        for work in rng.sample(list(times), 2):
            started = time.process_time()
            work(trainer, step)
            times[work].append(time.process_time() - started)
    bare, guarded = (statistics.median(seconds[10:]) for seconds in times.values())
    started = time.process_time()
    trainer.save(Checkpoints(folder.checkpoints, 2))
    save = time.process_time() - started
    print(f"step {bare * 1e3:.1f} ms bare, {guarded * 1e3:.1f} ms guarded ({guarded / bare - 1:+.2%}); ")
    print(f"a checkpoint {save * 1e3:.0f} ms, {save / 300:.3%} of five minutes")
    assert guarded / bare - 1 + save / 300 <= 0.03
