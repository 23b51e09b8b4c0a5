"""Training on the page, without a browser: limits, turns, ordinary run folders, checkpoints as a film."""

import gzip
import io
import json
import re
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from ui_cases import HOSTILE, PROBLEM, QUICK, session

from dft_lora.config import load_recipe
from dft_lora.errors import RequestError, RunError
from dft_lora.training.loop import train
from dft_lora.ui import workshop as ui_workshop
from dft_lora.ui.film import Film
from dft_lora.ui.session import Question
from dft_lora.ui.train_views import inspection_view, moment_view
from dft_lora.ui.workshop import LONGEST_ROW, MAX_ROWS, MAX_UPLOAD, Setup, Upload, Workshop

pytestmark = pytest.mark.usefixtures("many_runs")

ROW = json.dumps({"question": "1+1?", "answer": "2"}).encode()


def zipped(content: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", content)
    return held.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("bomb.zip", zipped(b"0" * 10_000_000), "bomb.zip is not a .jsonl file"),
        ("bomb.jsonl", zipped(b"0" * 10_000_000), "bomb.jsonl is not UTF-8 text"),
        ("rows.jsonl", gzip.compress(ROW, mtime=0), "not UTF-8 text"),
        ("rows.jsonl", b"x" * (MAX_UPLOAD + 1), r"2,097,153 bytes; at most 2,097,152"),
        ("rows.jsonl", ROW + b"\n" + b"x" * (LONGEST_ROW + 1), r"row 2 of rows.jsonl has 20,001 characters"),
        ("rows.jsonl", (ROW + b"\n") * (MAX_ROWS + 1), r"5,001 rows; 1 to 5,000"),
        ("rows.jsonl", b"\n\n", "0 rows"),
        ("rows.jsonl", b"[" * 10_000, "row 1 of rows.jsonl is not JSON"),
        ("rows.jsonl", b"[1]", "not an object with named columns"),
        ("rows.jsonl", b"{}", "not an object with named columns"),
        ("<img src=x>.parquet", b"PAR1", r"\?img src\?x\?.parquet is not a .jsonl"),
    ],
)
def test_a_wrong_upload_is_refused_in_one_line(name, content, message):
    with pytest.raises(RequestError, match=message) as error:
        Upload.read(name, content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"base": "../../etc"}, "base: '../../etc' is not one of tiny"),
        ({"source": "/etc/passwd"}, "data: '/etc/passwd' is not one of arithmetic"),
        ({"first": "grpo"}, "objective A: 'grpo' is not one of sft, dft"),
        ({"second": "sft"}, "objective B: choose another"),
        ({"steps": 10_000}, "steps: give a whole number from 1 to 1000"),
        ({"steps": 2.5}, "steps: give a whole number"),
        ({"learning_rate": float("nan")}, "learning rate: give a number"),
        ({"learning_rate": None}, "learning rate: give a number"),
        ({"base": None}, "base: None is not one of"),
        ({"prompt": 3}, "prompt column is int, not text"),
    ],
)
def test_a_wrong_wish_is_refused_by_name(wrong, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        Setup(**wrong)


@pytest.mark.parametrize(
    "rows, guess", [(ROW, ("question", "answer")), (b'{"a": "x", "b": "y"}', ("a", "b"))]
)
def test_columns_are_guessed(rows, guess):
    assert Upload.read("rows.jsonl", rows).guess() == guess


def test_a_column_that_is_missing_is_reported_without_our_paths(tmp_path):
    upload = Upload.read("mine.jsonl", ROW)
    with pytest.raises(RequestError, match=r"^mine.jsonl: 1 of 1 rows cannot be used \(row 1: no column 'x'"):
        Workshop(tmp_path).inspect(Setup(upload=upload, prompt="x", completion="answer"))


def hostile_rows() -> Upload:
    rows = [{"question": text, "answer": text} for text in HOSTILE[:12] if text.strip()]
    return Upload.read("rows.jsonl", "\n".join(map(json.dumps, rows)).encode())


def tags(view: str) -> set[str]:
    return set(re.findall(r"<(\w+)", view))


def test_an_upload_is_trained_as_an_ordinary_run(tmp_path):
    """Paused by a closed page, refused to a second visitor, continued: the same adapters as `train` makes, of
    the recipe that the page wrote. Hostile rows are shown as text."""
    shop = Workshop(tmp_path / "page", [*QUICK, "data.sample=null"])
    setup = Setup(steps=3, upload=hostile_rows(), prompt="question", completion="answer")
    view = inspection_view(shop.inspect(setup))
    assert tags(view) <= {"h2", "p", "ul", "li", "div", "span", "header"}
    watched = shop.watch(setup, PROBLEM)
    for now in watched:
        if now.done == 1:
            break
    training = shop.running
    with pytest.raises(RequestError, match=r"a training is running \(step 1 of 3\)"):
        next(shop.watch(setup, ""))
    assert not shop.unfinished(), "the one that runs is not offered to others, and theirs was not begun"
    watched.close()
    assert [folder.checkpoints.joinpath("step-000001").is_dir() for folder in training.folders] == [True] * 2
    damaged = shop.begin(setup).folders[0].path
    damaged.mkdir(parents=True)
    (damaged / "run.json").write_text("{")
    (again,) = shop.unfinished()  # the damaged one hides no other
    *_, last = shop.watch(shop.open(again.number), "")
    assert last.state == "done" and last.done == 3 and not shop.unfinished()
    assert {name: len(lines) for name, lines in last.metrics.items()} == {"sft": 3, "dft": 3}
    assert tags(moment_view(last)) <= {
        *("p", "span", "progress", "section", "header", "div", "h2", "i"),
        *("figure", "figcaption", "button", "svg", "line", "polyline", "title", "text"),
    }
    for name in ("sft", "dft"):
        file = training.path / f"{name}.yaml"
        alone = train(load_recipe(str(file), [f"output={tmp_path / name}"]))
        ours = load_file(training.path / name / "adapter" / "adapter_model.safetensors")
        theirs = load_file(alone.adapter / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_nothing_stays_of_a_training_that_cannot_begin(tmp_path):
    shop = Workshop(tmp_path, QUICK)
    with pytest.raises(RequestError, match="no column 'x'"):
        list(shop.watch(Setup(upload=hostile_rows(), prompt="x", completion="answer"), ""))
    assert not list(tmp_path.iterdir()) and shop.running is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training on the embedded base, in columns of the shared session."""
    shop = Workshop(tmp_path_factory.mktemp("page"), QUICK)
    training = shop.begin(Setup(steps=4, learning_rate=0.05))
    for _ in shop.watch(training, ""):
        pass
    return training, [session().add(folder) for folder in training.shown(stopped=False)]


def test_a_training_of_another_server_with_the_same_home_stays(tmp_path):
    """It takes the number between our look and our folder; ours takes the next one."""

    def recipes(path, changes):
        if path.name == "1":
            path.mkdir()
            (path / "theirs").touch()
        return []

    training = Workshop(tmp_path).begin(SimpleNamespace(recipes=recipes, upload=None))
    assert training.path == tmp_path / "2" and (tmp_path / "1" / "theirs").is_file()


def test_a_stopped_training_is_shown_as_it_was_stopped(tmp_path):
    shop = Workshop(tmp_path, QUICK)
    training = shop.begin(Setup(steps=4))
    for now in shop.watch(training, ""):
        if now.done == 1:
            shop.ask(training.number + 1, "stopped")  # another visitor's button changes nothing
        if now.done == 2:
            shop.ask(training.number, "stopped")
    assert (now.state, now.done) == ("stopped", 2)
    assert "dft-lora train" in moment_view(now)
    shown = training.shown(stopped=True)
    assert [folder.run()["step"] for folder in shown] == [2, 2] and not training.shown(stopped=False)


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ui_workshop, "write_text", full)
    with pytest.raises(RunError, match=r"could not be written \(No space left on device\); free some space"):
        Workshop(tmp_path, QUICK).begin(Setup())
    assert not list(tmp_path.iterdir())


def test_a_film_begins_at_the_base_and_ends_at_the_run(trained, monkeypatch):
    _, names = trained
    it, film = session(), Film(session())
    assert set(names) <= set(film.runs) and film.steps(names) == [0, 1, 2, 3, 4]
    ids = it.text_ids("12+7=19")

    def p(rows):
        return [[token.probability for token in tokens] for tokens in rows]

    first, last = (p(film.tokens(names, step, PROBLEM, ids).values()) for step in (0, 4))
    assert first == p(it.tokens(PROBLEM, [("base", ids)] * 2))
    assert last == p(it.tokens(PROBLEM, [(name, ids) for name in names])) and last[0] != first[0]
    *_, said = film.answers(names, 0, Question(PROBLEM, max_new_tokens=3))
    assert [answer.run for answer in said] == names and said[0].ids == said[1].ids
    counts = film.histograms(names, 4)
    assert sum(counts[names[0]]) == sum(counts[names[1]]) > 0
    monkeypatch.setattr("dft_lora.ui.film.KEPT", 2)
    again = [p(film.tokens(names, step, PROBLEM, ids).values()) for step in (1, 2, 0, 4)]
    assert again[2:] == [first, last] and len(it.held) == len(film._loaded) <= 2
    with pytest.raises(RequestError, match="step 9: choose one of 0, 1, 2, 3, 4"):
        film.tokens(names, 9, PROBLEM, ids)
    with pytest.raises(RequestError, match="run 'nobody' has no kept checkpoints"):
        film.steps(["nobody"])


def test_columns_of_the_page_stay_its_own(trained):
    training, names = trained
    assert not set(names) & set(session().runs) and set(names) <= set(session().every)
    assert [session().add(folder) for folder in training.folders] == names, "a run is loaded once"
