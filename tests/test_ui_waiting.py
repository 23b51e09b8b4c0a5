"""The page before there are runs: a bar that tells the truth, and a start that goes on where it stopped."""

import httpx
import pytest

from dft_lora.errors import RequestError
from dft_lora.run_folder import RunFolder
from dft_lora.ui.server import default_runs, make_runs, page_recipes
from dft_lora.ui.waiting import waiting


def test_a_first_start_shows_how_far_it_is_and_makes_way(tmp_path):
    """The bar's numbers come from the run folders; its port is free for the page that follows."""
    recipes = page_recipes(tmp_path)
    with waiting(recipes, "127.0.0.1", None) as port:
        address = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{address}/progress").json() == {
            "done": 0,
            "total": 240,
            "said": "sft: loading the base",
        }
        folder = RunFolder.create(recipes[0].output_dir)
        for step in range(1, 4):
            folder.log({"step": step})
        assert httpx.get(f"{address}/progress").json()["said"] == "sft: step 3 of 120"
        folder.metrics_file.write_text("{}\n" * 120)
        found = httpx.get(f"{address}/progress").json()
        assert (found["done"], found["said"]) == (120, "dft: loading the base")
        assert "progress" in httpx.get(address).text
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
