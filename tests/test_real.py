"""`experiment real`, small: its parts, what is recorded, and that finished parts are kept."""

import json
from dataclasses import replace

import pytest

from dft_lora.errors import RequestError
from dft_lora.experiments import real
from dft_lora.experiments.findings import STUDY
from dft_lora.experiments.study import Runs
from dft_lora.tasks import get_task

pytestmark = pytest.mark.usefixtures("many_runs")

FEW = {kind: real.REMEDIES[kind] for kind in ("plain dft", "dft")}
SMALL = {"train.batch_size": 2, "train.micro_batch_size": 2, "train.max_steps": 1, "evaluate.samples": 1}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of the part "tiny", and the lines that two runs of it printed."""
    out = tmp_path_factory.mktemp("real")
    study = replace(
        STUDY,
        settings=SMALL | {"data.sample": 8, "evaluate.max_new_tokens": 8},
        rates=(1e-3,),
        tasks=("arithmetic",),
        problems=3,
        objectives=FEW,
        swept=("sft", "dft"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "STUDIES", {"tiny": lambda: study})
        first = list(real.run(out, [0], ["tiny"]))
        times = {file: file.stat().st_mtime_ns for file in out.rglob("*.json")}
        again = list(real.run(out, [0], ["tiny"]))
        assert times == {file: file.stat().st_mtime_ns for file in times}
        (file,) = out.glob("parts/*remedies.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seeds": [0, 1], "found": None}))
        list(real.run(out, [0], ["tiny"]))
    return out, first, again


def test_each_remedy_is_compared_with_sft_and_with_plain_dft(recorded):
    out, _, _ = recorded
    parts = json.loads((out / "real.json").read_text())["bases"]["tiny"]
    assert set(parts) == {"diagnosis", "rates/sft", "rates/dft", "remedies"}
    found = parts["remedies"]["found"]
    assert list(found) == ["sft", *FEW]
    for kind, line in found.items():
        assert 0 <= line["ended"]["arithmetic"] <= 1 and 0 < line["p_end"] <= 1, kind
        assert line["against_sft"]["verdict"] in ("confirmed", "refuted", "not shown")
        assert line["other_text_nll"] > 0
    assert parts["remedies"]["commit"] and parts["remedies"]["fingerprint"]


def test_finished_parts_are_kept(recorded):
    _, first, again = recorded
    assert first == again and len(first) == 4


def test_a_part_of_other_seeds_is_made_again(recorded):
    out, _, _ = recorded
    remedies = json.loads((out / "real.json").read_text())["bases"]["tiny"]["remedies"]
    assert remedies["seeds"] == [0] and remedies["found"]


def test_the_runs_differ_in_their_objective(recorded):
    out, _, _ = recorded
    recipes = {f.parent.name: json.loads(f.read_text())["recipe"] for f in out.rglob("run.json")}
    objectives = {
        name: {number: value for number, value in recipe["objective"].items() if value is not None}
        for name, recipe in recipes.items()
        if name != "base"
    }
    assert objectives["dft-0.001"] == {"name": "dft", "floor": 0.1}
    assert objectives["plain dft-0.001"] == {"name": "dft"}
    assert len({json.dumps(objective) for objective in objectives.values()}) == 3


SHARES = {1e-4: [0.1, 0.9, 0.9], 3e-4: [0.5, 0.4, 0.6], 1e-3: [0.6, 0.6, 0.1], 2e-3: [0.2, 0.9, 0.9]}


class Validated(Runs):
    """Runs whose accuracies on the validation set are known: those of SHARES."""

    def _validated(self, group, kind, rates, seeds):
        return {rate: SHARES[rate][:seeds] for rate in rates}


@pytest.mark.parametrize(
    ("finalists", "kind", "rate"), [(1, "dft", 1e-3), (2, "dft", 3e-4), (2, "far", 1e-3)]
)
def test_the_two_best_rates_of_the_first_seed_are_compared_with_all(tmp_path, finalists, kind, rate):
    study = replace(STUDY, rates=tuple(SHARES), finalists=finalists, once=("far",))
    runs = Validated(study, tmp_path, [0, 1, 2])
    assert runs.rate(kind) == rate
    compared = {rate: len(by_seed) for rate, by_seed in runs.tried(kind).items()}
    assert compared == {1e-4: 1, 3e-4: 1, 1e-3: 1, 2e-3: 1} | ({3e-4: 3, 1e-3: 3} if finalists == 2 else {})


def test_an_unknown_part_is_refused():
    with pytest.raises(RequestError, match=r"--only 'gemma'.*gemma-3-270m"):
        list(real.run(None, [0], ["gemma"]))


def test_word_problems_share_no_chain_between_training_and_test():
    train = {p.question for p in get_task("word-problems").problems("train")}
    for task in ("word-problems", "word-problems-hard", "word-problems-validation"):
        problems = get_task(task).problems()
        assert not train & {p.question for p in problems}
        assert all(p.solution.endswith(f"#### {p.answer}") for p in problems)


def test_school_problems_have_small_whole_numbers(data_dir, monkeypatch):
    monkeypatch.setenv("DFT_LORA_DATA", str(data_dir))
    problems = get_task("school-problems").problems()
    assert len(problems) > 600 and all(problem.answer.isdigit() for problem in problems)
    assert "12" in " ".join(p.question for p in problems) and "13 " not in " ".join(
        p.question for p in problems
    )
