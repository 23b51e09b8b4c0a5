"""The loop on the embedded base and with the real Qwen2.5 tokenizer: laws of one step, and whole runs."""

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from dft_lora.cli import main
from dft_lora.config import load_recipe
from dft_lora.data.batches import examples_of, ungrouped
from dft_lora.errors import RecipeError
from dft_lora.evaluation.tokens import score
from dft_lora.experiments.shipped import shipped_runs
from dft_lora.loss import objective, objective_names
from dft_lora.loss.objectives import starves
from dft_lora.model.load import load_adapters, load_base
from dft_lora.model.teacher import as_teacher
from dft_lora.training.checkpoints import Checkpoints
from dft_lora.training.learner import Learner
from dft_lora.training.loop import train, warn_of_starved_ends
from dft_lora.training.plan import make_plan
from dft_lora.training.ranks import Ranks
from dft_lora.training.steps import FixedGroups
from dft_lora.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("many_runs")

SMALL = (
    "train.batch_size=8",
    "train.micro_batch_size=4",
    "train.max_steps=3",
    "train.warmup=0.0",
    "data.sample=40",
)


def as_it_is(plan):
    return plan, None


@cache
def one_step(*changes, prepare=as_it_is):
    """Gradients after the first step's micro-batches, before the update, and its figures.

    `prepare` turns the recipe's plan into another one and a source of steps. A step that several tests
    compare with is taken once.
    """
    recipe = load_recipe("tiny_dft", (*SMALL, *changes))
    plan, source = prepare(make_plan(recipe))
    trainer = Trainer(plan, Ranks(recipe), source)
    torch.manual_seed(1)
    for name, parameter in trainer.learner.adapter_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    kept = {}

    def update(loss, _update=trainer.learner.update):
        kept.update(
            {
                n: p.grad.clone()
                for n, p in trainer.learner.adapter_model.named_parameters()
                if p.requires_grad
            }
        )
        return _update(loss)

    trainer.learner.update = update
    return kept, trainer.step(0)


@pytest.mark.parametrize(
    "name",
    [
        "dft",
        "asft",
        "iw-sft",
        "cadft",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("sft", "prift", "gift", "infosft")),
    ],
)
def test_micro_batches_of_any_size_give_the_same_step(name):
    change = f"objective.name={name}"
    whole, figures = one_step(change, "train.micro_batch_size=8")
    parts, theirs = one_step(change, "train.micro_batch_size=3")  # uneven: the last one is smaller
    for key, gradient in whole.items():
        assert (parts[key] - gradient).norm() <= 1e-5 * gradient.norm(), key
    assert theirs["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    assert theirs["supervised_tokens"] == figures["supervised_tokens"]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_step_with_signals_does_not_depend_on_the_arrangement(packing):
    """The signals find their tokens in packed and in padded rows; and the step is not DFT's."""
    changes = ("objective.name=cadft", f"data.packing={packing}")
    padded, _ = one_step("objective.name=cadft", "data.packing=false", "train.micro_batch_size=8")
    dft, _ = one_step("train.micro_batch_size=8")
    for size in (1, 3):
        parts, _ = one_step(*changes, f"train.micro_batch_size={size}")
        for key, gradient in padded.items():
            assert (parts[key] - gradient).norm() <= 1e-5 * gradient.norm(), key
            assert (parts[key] - dft[key]).norm() > 1e-2 * gradient.norm(), key


def test_a_second_look_at_the_step_draws_no_random_numbers():
    """Scoring the step first leaves dropout and its random numbers as they are."""
    (_, dft), (_, cadft) = (
        one_step(f"objective.name={name}", "adapter.dropout=0.5", "train.micro_batch_size=4")
        for name in ("dft", "cadft")
    )
    assert dft["nll"] == cadft["nll"] and dft["loss"] > cadft["loss"]


def leads(scores):
    """How far the first of each pair leads: a loss of whole pairs, each token with a weight of its own."""
    pairs, of_M = scores.signals["pair"].unique(return_inverse=True)
    lead_P = scores.logp.new_zeros(len(pairs)).index_add(0, of_M, scores.signals["weight"] * scores.logp)
    return -torch.nn.functional.logsigmoid(lead_P / 4).sum()


@cache
def in_pairs(divided_by, together=True):
    """Eight examples as four pairs, under `leads`; not `together`, each example is a group of its own."""

    def prepare(plan):
        weigh, chosen = torch.Generator().manual_seed(0), []
        for i, example in enumerate(plan.examples[:8]):
            weight = torch.rand(example.supervised, generator=weigh) * (-1) ** i
            chosen.append(replace(example, signals={"pair": float(i // 2), "weight": tuple(weight.tolist())}))

        def wanted(scores):
            return leads(scores)

        wanted.signals, wanted.divided_by = ("pair", "weight"), divided_by
        pairs = list(zip(chosen[::2], chosen[1::2], strict=True)) if together else ungrouped(chosen)
        source = FixedGroups(pairs, per_step=len(pairs), seed=0)
        return replace(plan, objective=objective(wanted)), source

    return prepare


@pytest.mark.parametrize(
    ("divided_by", "divisor", "arrangements"),
    [
        ("sequences", 8, [(1, "false"), (2, "false"), (1, "true"), (8, "true")]),
        ("groups", 4, [(1, "false"), (8, "true")]),
    ],
    ids=["sequences", "groups"],
)
def test_a_step_of_pairs_is_the_same_in_micro_batches_of_any_size(divided_by, divisor, arrangements):
    """Divided by what the objective says; and pairs that came apart would have given another step."""
    whole, figures = one_step("train.micro_batch_size=8", "data.packing=false", prepare=in_pairs(divided_by))
    for size, packing in arrangements:
        changes = (f"train.micro_batch_size={size}", f"data.packing={packing}")
        parts, theirs = one_step(*changes, prepare=in_pairs(divided_by))
        for key, gradient in whole.items():
            assert (parts[key] - gradient).norm() <= 1e-5 * gradient.norm(), key
        assert theirs["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    per_token, theirs = one_step("train.micro_batch_size=8", "data.packing=false", prepare=in_pairs("tokens"))
    ratio = theirs["supervised_tokens"] / divisor
    for key, gradient in per_token.items():
        assert (ratio * gradient - whole[key]).norm() <= 1e-5 * whole[key].norm(), key
    assert ratio * theirs["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    apart, _ = one_step(
        "train.micro_batch_size=1", "data.packing=false", prepare=in_pairs("sequences", together=False)
    )
    scale = 8 / divisor
    assert all(
        (scale * apart[key] - gradient).norm() > 1e-2 * gradient.norm() for key, gradient in whole.items()
    )


def unlike_one_another():
    """Every online objective, and one for each set of quantities that a step computes for the others."""
    kinds = {}
    for name in objective_names():
        wanted = objective(name)
        source = "solutions" if wanted.learns_from == "solutions" else name
        looks_first = wanted.step_signals is not None
        kinds.setdefault((source, wanted.needs, wanted.toward is None, looks_first), name)
    return list(kinds.values())


@pytest.mark.parametrize("name", unlike_one_another())
def test_objectives_take_a_step(name):
    own = [] if objective(name).learns_from == "solutions" else ["rollouts={samples: 4, max_new_tokens: 48}"]
    own += [f"objective.teacher={shipped_runs()[1].path}"] if objective(name).toward is not None else []
    gradients, figures = one_step(f"objective.name={name}", "train.micro_batch_size=4", *own)
    assert figures["loss"] is not None and figures["nll"] > 0
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_log_probabilities_under_the_base_are_the_same_after_a_resume(tmp_path, monkeypatch):
    """A step's rows are scored when it first needs them; a checkpoint has those that were."""
    changes = (*SMALL, "objective.name=iw-sft", "data.sample=12", "train.batch_size=4", "train.max_steps=5")
    recipe = load_recipe("tiny_dft", changes)
    plan, rows, recall = make_plan(recipe), [], Learner.example_logps
    monkeypatch.setattr(
        Learner,
        "example_logps",
        lambda self, examples, *more, **named: (
            rows.append(len(examples)) or recall(self, examples, *more, **named)
        ),
    )
    whole, checkpoints = Trainer(plan, Ranks(recipe)), Checkpoints(tmp_path, 1)
    whole.step(0)
    whole.save(checkpoints)
    resumed = Trainer(plan, Ranks(recipe), state=checkpoints.newest()[0])
    found = [[trainer.step(step)["loss"] for step in range(1, 5)] for trainer in (whole, resumed)]
    assert rows == [4, *[4, 4] * 2] and found[0] == found[1]
    weights = [trainer.learner.adapter_weights() for trainer in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def test_a_teacher_is_used_and_stays_as_it_is(tmp_path):
    """Its probabilities are those of its run; only the trained adapter moves, is saved, and resumes."""
    teacher = shipped_runs()[1]
    target = ("objective={name: target-sft, eta: 0.7}", f"objective.teacher={teacher.path}", *SMALL)
    whole, parts = (f"output={tmp_path / name}" for name in ("whole", "parts"))
    trainer = Trainer(make_plan(load_recipe("tiny_dft", target)), Ranks(load_recipe("tiny_dft", target)))
    learner, groups = trainer.learner, trainer.source.groups(0)
    frozen = {n: p.clone() for n, p in learner.adapter_model.named_parameters() if ".teacher." in n}
    trainer.step(0)
    now = dict(learner.adapter_model.named_parameters())
    assert frozen and all(torch.equal(now[name], weight) for name, weight in frozen.items())
    assert all(".default." in n for n, p in now.items() if p.requires_grad)
    model = load_adapters(load_base(trainer.plan.recipe.model)[0], {"sft": teacher.adapter})
    table = score(model, examples_of(groups), pad_id=trainer.plan.renderer.pad_id, adapter="sft")
    learner.adapter_model.eval()
    with as_teacher(learner.adapter_model):
        again = [learner.token_scores(learner.adapter_model, b).logp for b in batches_of(learner, groups)]
    assert sorted(torch.cat(again).tolist()) == pytest.approx(sorted(table.logp_M.tolist()), abs=1e-4)
    train(load_recipe("tiny_dft", (*target, whole, "train.save_steps=1")))
    train(load_recipe("tiny_dft", (*target, parts, "train.max_steps=1")))
    train(load_recipe("tiny_dft", (*target, parts)), resume=True, extend=True)
    one, other = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes() and "teacher" not in str(load_file(one).keys())


def batches_of(learner, groups):
    return learner.arrange(groups, learner.layout.micro_batch_size, learner.pad_id)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_p_end_is_the_mean_probability_of_the_end_tokens(packing):
    """As another way of scoring sees them, in padded and in packed rows."""
    recipe = load_recipe("tiny_dft", (*SMALL, f"data.packing={packing}", "data.split=train-boxed"))
    trainer = Trainer(make_plan(recipe), Ranks(recipe))
    chosen = examples_of(trainer.source.groups(0))
    table = score(trainer.learner.adapter_model.eval(), chosen, pad_id=trainer.plan.renderer.pad_id)
    trainer.learner.adapter_model.train()
    assert trainer.step(0)["p_end"] == pytest.approx(table.end_E.mean(), rel=1e-4)


def test_a_run_whose_answers_will_not_end_is_warned_of(tmp_path, caplog):
    def said(*changes):
        caplog.clear()
        train(load_recipe("tiny_dft", (*SMALL, "train.max_steps=1", f"output={tmp_path / 'r'}", *changes)))
        shutil.rmtree(tmp_path / "r")
        return "objective.floor=0.1" in caplog.text

    assert said("data.split=train-boxed")
    assert not said("data.split=train")
    assert not said("data.split=train-boxed", "objective.floor=0.1")
    assert not said("data.split=train-boxed", "objective.name=sft")


@pytest.mark.parametrize("name", [name for name in objective_names() if starves(objective(name), 1e-3)])
def test_the_remedies_of_that_warning_are_accepted_and_work(name, caplog):
    """Only dft has a floor and an end."""
    wanted = objective(name)
    trainer = SimpleNamespace(done=1, learner=SimpleNamespace(objective=wanted))
    trainer.plan = trainer.learner
    warn_of_starved_ends(trainer, {"p_end": 1e-3})
    *before, floor, end = re.findall(r"objective\.\w+=[\w.]+", caplog.text)
    for remedy in (floor, end):
        mended = load_recipe("tiny_dft", (f"objective={{name: {name}}}", *before, remedy)).objective
        assert not starves(objective(mended.name, **mended.numbers), 1e-3)


def test_an_annealed_objective_starts_as_sft_and_ends_as_dft():
    recipe = load_recipe("tiny_dft", (*SMALL, "objective={name: power, anneal: 0.5}"))
    trainer = Trainer(make_plan(recipe), Ranks(recipe))
    exponents = []
    for step in range(3):
        trainer.step(step)
        exponents.append(trainer.learner.objective.a)
    assert exponents == [pytest.approx(0, abs=1e-5), pytest.approx(2 / 3), 1]


def test_skipped_rows_and_their_bound_are_in_the_metrics():
    full, _ = one_step("train.micro_batch_size=8")
    part, figures = one_step("train.micro_batch_size=8", "train.skip_rows=0.01")
    assert figures["skipped_rows"] > 0 and figures["skip_bound"] > 0
    assert sum((full[k] - part[k]).norm() for k in full) > 0


def test_skipping_rows_without_a_weight_is_refused_before_a_model_is_loaded(monkeypatch):
    with pytest.raises(RecipeError, match=r"train\.skip_rows"):
        make_plan(load_recipe("tiny_sft", ["train.skip_rows=0.01"]))


def test_sft_and_dft_start_from_the_same_adapter_and_see_the_same_tokens(tmp_path):
    first = []
    for name in ("sft", "dft"):
        run = train(load_recipe(f"tiny_{name}", [*SMALL, f"output={tmp_path / name}"]))
        lines = run.metrics()
        first.append([(x["step"], x["tokens"], x["supervised_tokens"]) for x in lines])
        assert lines[0]["nll"] == pytest.approx(0.13, abs=0.1)
    assert first[0] == first[1] and len(first[0]) == 3
    start = [
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0])["nll"]
        for n in ("sft", "dft")
    ]
    assert start[0] == start[1]


def test_real_tokenizer_and_gsm8k_nll_falls_and_the_adapter_loads_in_plain_peft(qwen_dir, data_dir, tmp_path):
    from peft import PeftModel

    source = data_dir / "train" / "gsm8k_train.jsonl"
    recipe = load_recipe(
        "tiny_sft",
        [
            f"model.name={qwen_dir}",
            f"data.source={source}",
            "data.prompt=question",
            "data.completion=answer",
            "data.template=qwen-boxed",
            "data.sample=8",
            "evaluate.tasks=[]",
            "train.batch_size=2",
            "train.micro_batch_size=1",
            "train.max_steps=6",
            "train.learning_rate=0.02",
            f"output={tmp_path / 'run'}",
        ],
    )
    run = train(recipe)
    nll = [line["nll"] for line in run.metrics()]
    assert nll[0] == pytest.approx(11.93, abs=0.1)  # ln 151,936: a random model knows nothing
    assert nll[-1] < nll[0] - 0.05
    promised = "step loss nll mean_probability p_end entropy learning_rate grad_norm tokens supervised_tokens"
    assert {*promised.split(), "seconds", "tokens_per_second", "peak_memory_mb"} <= set(run.metrics()[0])

    ids_BL = torch.tensor([[785, 4226, 374, 220, 20]])
    base, _ = load_base(recipe.model)
    with torch.no_grad():
        before = base(input_ids=ids_BL).logits
        plain = PeftModel.from_pretrained(base, run.adapter).eval()
        after = plain(input_ids=ids_BL).logits
        again = (
            PeftModel.from_pretrained(load_base(recipe.model)[0], run.adapter).eval()(input_ids=ids_BL).logits
        )
    assert not torch.equal(before, after) and torch.equal(after, again)

    result = CliRunner().invoke(
        main,
        [
            "evaluate",
            str(run.path),
            "--task",
            "gsm8k",
            "--samples",
            "1",
            "--limit",
            "2",
            "--set",
            "max_new_tokens=8",
        ],
        env={"DFT_LORA_DATA": str(data_dir)},
    )
    assert result.exit_code == 0, result.output
    assert "| run | gsm8k | 0.0 % (n=1)" in result.stdout  # eight random tokens answer nothing
    attempts = [json.loads(line) for line in run.evaluation("gsm8k").read_text().splitlines()]
    assert len(attempts) == 4 and {attempt["verdict"] for attempt in attempts} <= {"wrong", "unparsable"}


@pytest.mark.parametrize("packing", [True, False])
def test_the_base_is_asked_once_per_token(packing):
    """prift over two epochs: each example is scored under the base once, with the values of a batch."""
    recipe = load_recipe(
        "tiny_dft",
        (
            "objective.name=prift",
            "data.sample=12",
            f"data.packing={packing}",
            "train.batch_size=6",
            "train.micro_batch_size=3",
            "train.max_steps=4",
            "model.dtype=float32",
        ),
    )
    trainer = Trainer(make_plan(recipe), Ranks(recipe))
    learner = trainer.learner
    asked, of_batch, scores_at, recall = [], [], learner.scores_at, learner.example_logps

    def counted(examples, step, base):
        asked.extend(example.id for example in examples)
        return recall(examples, step, base)

    def compared(h_BLD, batch, **more):
        scores = scores_at(h_BLD, batch, **more)
        if torch.is_grad_enabled():
            with torch.no_grad(), learner.adapter_model.disable_adapter():
                direct = scores_at(learner.hidden(learner.model, batch), batch)
                of_batch.append((scores.reference_logp, direct.logp))
        return scores

    learner.scores_at, learner.example_logps = compared, counted
    for step in range(4):
        trainer.step(step)
    assert sorted(asked) == sorted(example.id for example in trainer.plan.examples)
    assert len(of_batch) >= 4
    for kept, direct in of_batch:
        assert (kept - direct).abs().max() < 1e-4
