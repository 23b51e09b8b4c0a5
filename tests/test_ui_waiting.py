"""The page before there are runs: a bar that tells the truth, and a start that goes on where it stopped."""

import socket

import httpx
import pytest

from dft_lora.errors import Interrupted, RequestError
from dft_lora.runs.folder import RunFolder
from dft_lora.training import loop
from dft_lora.ui.server import default_runs, make_runs, page_recipes
from dft_lora.ui.waiting import free_port, progress, waiting


def test_the_bar_is_read_from_the_run_folders(tmp_path):
    recipes = page_recipes(tmp_path)
    assert progress(recipes) == {"done": 0, "total": 240, "said": "sft: loading the base"}
    folder = RunFolder.create(recipes[0].output_dir)
    for step in range(1, 5):
        folder.log({"step": step, "seconds": 0.5})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 5, "sec')  # a visitor looks while the line is written
    assert progress(recipes) == {
        "done": 4,
        "total": 240,
        "said": "sft: step 4 of 120, about 118 s left",  # 236 steps of 0.5 s
    }
    folder.metrics_file.write_text('{"seconds": 0.25}\n' * 120)
    assert progress(recipes) == {
        "done": 120,
        "total": 240,
        "said": "dft: loading the base, about 30 s left",
    }
    RunFolder.create(recipes[1].output_dir).metrics_file.write_text('{"seconds": 0.25}\n' * 120)
    assert progress(recipes) == {"done": 240, "total": 240, "said": "Opening the page"}


def test_every_visitor_sees_the_bar_and_its_port_is_free_for_the_page(tmp_path):
    recipes = page_recipes(tmp_path)
    with waiting(recipes, "127.0.0.1", None) as port:
        address = f"http://127.0.0.1:{port}"
        for _ in range(2):
            assert httpx.get(f"{address}/progress").json() == {**progress(recipes), "failed": ""}
            assert "<progress" in httpx.get(address).text
        with pytest.raises(RequestError, match="--host, --port"), waiting(recipes, "127.0.0.1", port):
            pass
    with waiting(recipes, "127.0.0.1", port) as again:
        assert again == port


def test_a_first_start_goes_on_with_what_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = [recipe.override(["train.max_steps=2", "data.sample=64"]) for recipe in page_recipes()]
    assert default_runs() == []
    made = make_runs(quick)
    before = [(folder.path / "run.json").read_bytes() for folder in made]
    assert [folder.name for folder in made] == ["base", "sft", "dft"] == [f.name for f in default_runs()]
    again = make_runs(quick)
    assert [(folder.path / "run.json").read_bytes() for folder in again] == before


def test_a_port_that_is_free_is_taken_and_another_than_7860_is_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"--port: {port} at 127.0.0.1 is in use; name another"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port and capsys.readouterr().err == ""
    found = free_port("127.0.0.1", None)
    with socket.create_server(("127.0.0.1", found)):
        other = free_port("127.0.0.1", None)
        assert other > found and f"the page will be at port {other}" in capsys.readouterr().err
    with pytest.raises(RequestError, match="--host, --port: cannot serve at nowhere"):
        free_port("nowhere.invalid", None)


def test_a_first_start_that_is_stopped_names_the_way_on(tmp_path, monkeypatch):
    """`dft-lora app` has no --resume: starting it again is what goes on."""

    def stopped(recipe, resume):
        raise Interrupted("runs/page/sft: stopped after step 3 of 120", 2)

    monkeypatch.setattr(loop, "train", stopped)
    with pytest.raises(Interrupted, match="step 3 of 120; start it again, it goes on from there") as raised:
        make_runs(page_recipes(tmp_path))
    assert raised.value.exit_code == 130 and "--resume" not in str(raised.value)
