"""Generated parts are fresh, and the README's commands run."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dft_lora.cli import main
from dft_lora.config import load_recipe

ROOT = Path(__file__).parent.parent


def test_generated_parts_are_fresh():
    run = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_headline_table_rests_on_three_clean_recordings_of_each_training_set():
    """One per seed, from clean commits, with one number of threads; the base answers alike in both."""
    recorded = {}
    for path in sorted((ROOT / "docs" / "results").glob("demo-*.json")):
        report = json.loads(path.read_text())
        provenance, split = report["provenance"], report["runs"]["dft"]["data"]["split"]
        assert report["runs"]["sft"]["data"]["split"] == split
        assert provenance["commit"] and not provenance["commit"].endswith("-dirty"), path
        words = shlex.split(provenance["command"])
        recorded[split, words[words.index("--seed") + 1]] = report
        assert ("--clean" in words) == (split == "train-clean"), path
    assert set(recorded) == {(split, seed) for split in ("train", "train-clean") for seed in "012"}
    assert len({report["provenance"]["omp_num_threads"] for report in recorded.values()}) == 1
    for seed in "012":
        one, other = (recorded[split, seed]["runs"]["base"]["tasks"] for split in ("train", "train-clean"))
        assert one == other


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(document: Path) -> set[str]:
    """The headings of a document as a link names them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(document):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", document.read_text()):
        file, _, anchor = target.partition("#")
        linked = document.parent / file if file else document
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def commands(language="(?:sh)?"):
    """Lines of the README's fenced blocks that start with a command of ours."""
    blocks = re.findall(r"```" + language + r"\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("dft-lora ", "make ", "python -m dft_lora"))]


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in commands():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.M), line


def test_ci_calls_the_readmes_test_command():
    assert "make test" in commands() and "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_command_line_of_the_readme_parses():
    for line in commands():
        if line.startswith("dft-lora "):
            words = shlex.split(line)[1:]
            command = main
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            command.make_context(line, list(words), resilient_parsing=False)


def test_the_readmes_recipe_for_an_own_model_is_no_toys():
    (line,) = (line for line in commands() if line.startswith("dft-lora recipes copy"))
    recipe, toy = load_recipe(line.split()[3]), load_recipe("tiny_dft")
    assert recipe.model.name != "tiny" and not recipe.evaluate.tasks[0].startswith("arithmetic")
    assert recipe.train.learning_rate < toy.train.learning_rate
    assert recipe.data.max_length > toy.data.max_length and recipe.train.max_steps is None


def test_own_data_to_an_answered_task_in_the_readmes_commands(tmp_path, monkeypatch):
    """recipes copy, train, evaluate: as written in the README, at a small size, with an own JSONL."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    lines = [line for line in commands() if line.startswith(("dft-lora recipes copy", "dft-lora train mine"))]
    assert len(lines) == 2
    assert runner.invoke(main, shlex.split(lines[0])[1:]).exit_code == 0
    rows = "\n".join(
        json.dumps({"question": f"Tom has {i} apples. Tom buys 2 more.", "reply": f"#### {i + 2}"})
        for i in range(9)
    )
    Path("mine.jsonl").write_text(rows)
    recipe = yaml.safe_load(Path("mine.yaml").read_text())
    recipe["model"]["name"] = "tiny"
    recipe["data"] = {"source": "mine.jsonl", "prompt": "question", "completion": "reply"}
    recipe["train"] |= {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    result = runner.invoke(main, shlex.split(lines[1])[1:])
    assert result.exit_code == 0, result.output
    result = runner.invoke(
        main, ["evaluate", "runs/mine", "--task", "arithmetic", "--samples", "1", "--limit", "3"]
    )
    assert result.exit_code == 0, result.output
    assert "| mine | arithmetic" in result.stdout


@pytest.mark.slow
def test_the_demo_as_the_readme_says(tmp_path):
    subprocess.run([sys.executable, "-m", "dft_lora", "demo", "--out", str(tmp_path / "demo")], check=True)
    assert (tmp_path / "demo" / "report.json").is_file()


def test_every_shape_letter_is_in_the_legend():
    """No tensor's name ends in an axis letter that docs/shapes.md does not explain."""
    rows = re.findall(r"^\| ([A-Z](?:, [A-Z])*) \|", (ROOT / "docs" / "shapes.md").read_text(), re.M)
    legend = {letter for row in rows for letter in row.split(", ")}
    used = {
        (letter, str(path.relative_to(ROOT)))
        for path in (ROOT / "dft_lora").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (getattr(node, field, None) for field in ("id", "attr", "arg"))
        if isinstance(name, str) and (axes := re.fullmatch(r"[a-z]\w*_([A-Z]{1,4})1?", name))
        for letter in axes[1]
    }
    assert len(used) > 100, "the names are not read"
    assert not {(letter, path) for letter, path in used if letter not in legend}
