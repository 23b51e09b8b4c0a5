"""Without network: one quick attempt, one line, and the local cache still serves."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import hub_stand_in
import pytest

from dft_lora import RunFolder, hub
from dft_lora.model.tiny import TINY_DIR


@pytest.fixture
def closed_port():
    """A port of this machine where nobody listens."""
    with socket.socket() as held:  # bound and not listening: connections are refused, nobody else takes it
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not asked yet, and whose environment is put back."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "")
    hub.unreachable.cache_clear()
    yield
    hub.unreachable.cache_clear()


def test_an_address_that_answers_is_reached(fresh, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.unreachable() is None
        assert not os.environ["HF_HUB_OFFLINE"]


def test_one_that_does_not_is_told_and_never_tried_again(fresh, monkeypatch, closed_port):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    why = hub.unreachable()
    assert why == f"the Hub cannot be reached (http://127.0.0.1:{closed_port}: Connection refused)"
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.unreachable() == why


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode_asks_nobody(fresh, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.unreachable() == f"the Hub is not asked ({name} is set)"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_the_way_through_a_proxy_is_what_counts(fresh, monkeypatch, closed_port):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("no_proxy", "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.unreachable() is None
    hub.unreachable.cache_clear()
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{closed_port}")
    assert "Connection refused" in hub.unreachable()


def command(tmp_path, address, *arguments):
    """A command in a process of its own that believes in a Hub at `address`."""
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "",
        "HF_HOME": str(tmp_path / "cache"),
        "no_proxy": "*",
    }
    line = [sys.executable, "-m", "dft_lora", *map(str, arguments)]
    return subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("model.name=me/model", "model.name: no model 'me/model'"),
        pytest.param("data.source=me/rows", "data.source 'me/rows'", marks=pytest.mark.slow),
    ],
)
def test_a_name_on_the_hub_fails_in_one_line(tmp_path, closed_port, change, field):
    done = command(tmp_path, f"http://127.0.0.1:{closed_port}", "train", "tiny_dft", "--set", change)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {field}") and "in the local cache, and the Hub cannot be reached" in line


@pytest.mark.slow
def test_a_cached_model_still_serves(tmp_path, closed_port):
    repository = tmp_path / "cache/hub/models--me--model"
    commit = "0123456789" * 4
    shutil.copytree(TINY_DIR, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "Tom has 9 eggs.", "solution": "The answer is 9."}) + "\n")
    changes = ("--set", "model.name=me/model", "--set", f"data.source={rows}")
    done = command(tmp_path, f"http://127.0.0.1:{closed_port}", "diagnose", "tiny_dft", "--json", *changes)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 1 and "Retry" not in done.stderr


@pytest.mark.slow
def test_a_run_stays_at_the_commit_of_its_base(tmp_path):
    """Whatever is committed later, even other weights."""
    first, second = "0123456789" * 4, "abcdef0123" * 4
    other_weights = shutil.copytree(TINY_DIR, tmp_path / "model") / "model.safetensors"
    other_weights.write_bytes(other_weights.read_bytes()[:-4] + bytes(4))

    def train(it, steps, output, *more):
        sets = ["model.name=me/model", "data.sample=16", f"train.max_steps={steps}", f"output={output}"]
        changes = [word for change in sets for word in ("--set", change)]
        return command(tmp_path, it.address, "train", "tiny_dft", *changes, *more)

    def evaluate(it, *runs):
        return command(tmp_path, it.address, "evaluate", *runs, "--task", "arithmetic", "--limit", "1")

    with hub_stand_in.hub() as it:
        it.commits = {first: Path(TINY_DIR)}
        done = train(it, 1, "run", "--set", "model.revision=main")
        assert done.returncode == 0, done.stderr
        it.commits[second] = other_weights.parent
        done = train(it, 2, "run", "--extend")
        assert done.returncode == 0, done.stderr
        run = RunFolder(tmp_path / "run")
        assert run.run()["steps"] == 2 and run.recipe().model.revision == first
        assert json.loads((run.adapter / "adapter_config.json").read_text())["revision"] == first
        done = evaluate(it, "run")
        assert done.returncode == 0, done.stderr
        done = command(tmp_path, it.address, "export", "run", "--to", "vllm")
        assert f"vllm serve me/model --revision {first} " in done.stdout, done.stderr
        assert train(it, 1, "other").returncode == 0
        done = evaluate(it, "run", "other")
        assert done.returncode == 2 and "other has another base than run (model.revision" in done.stderr
        done = train(it, 3, "run", "--set", f"model.revision={second}", "--extend")
        assert done.returncode == 2 and "base was '0123456789" in done.stderr, done.stderr
