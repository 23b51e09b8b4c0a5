"""Wrong requests, as a table: the command, its exit code, and the line that the person reads.

Each row runs in one folder, `world`, made once. Beside its line it asserts that there is no traceback, that
exactly one line says what was wrong, and that every file is as it was. To add a row, write the command as one
would type it; if it needs a file that is not there yet, add that to `world`.
"""

import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from evidence_runs import answered

from dft_lora.bench.__main__ import main as bench
from dft_lora.cli import main
from dft_lora.config import load_recipe
from dft_lora.training.loop import train

LONG = "x" * 300
QUESTION = {"problem": "Tom has 9 eggs. Tom sells 4.", "solution": "9 - 4 = 5\nThe answer is 5."}

DEMO = [
    ("demo --out ''", 2, "'--out': the path is empty"),
    ("demo --out precious.txt", 2, "--out: precious.txt is not a folder"),
    ("demo --out precious.txt/demo", 2, "--out: cannot write precious.txt/demo: Not a directory"),
    ("demo --out /proc/demo", 2, "--out: cannot write /proc/demo"),
    ("demo --out /dev/full", 2, "--out: /dev/full is not a folder"),
    (f"demo --out {LONG}", 2, "File name too long"),
    ("demo --out loop/demo", 2, "Too many levels of symbolic links"),
    ("demo --out taken", 2, "--out: taken contains files that the demo did not write (mine.txt, rows.jsonl)"),
    ("demo --out cut-demo", 2, "cut-demo/demo.json: broken JSON"),
    ("demo --out odd-demo", 2, "--out: odd-demo contains files that the demo did not write"),
    ("demo --seed -1", 2, "'--seed': -1 is not in the range"),
    ("demo --seed 4294967296", 2, "'--seed': 4294967296 is not in the range"),
    ("demo --seed many", 2, "'--seed': 'many' is not a valid integer"),
    ("demo taken", 2, "unexpected extra argument"),
]

TRAIN = [
    ("train", 2, "give either a RECIPE or --sweep FILE"),
    ("train nope.yaml", 2, "no recipe file or shipped recipe 'nope.yaml'"),
    ("train tiny_dtf", 2, "did you mean 'tiny_dft'?"),
    ("train taken", 2, "'taken' is a folder; name a recipe file"),
    (f"train {LONG}", 2, "no recipe file or shipped recipe 'xxx"),
    ("train unclosed.yaml", 2, "unclosed.yaml: not readable as YAML: expected ',' or '}'"),
    ("train latin.yaml", 2, "latin.yaml: not readable as YAML: it is not UTF-8 text"),
    ("train utf16.yaml", 2, "utf16.yaml: not readable as YAML: it is not UTF-8 text"),
    ("train list.yaml", 2, "list.yaml: a recipe must be a mapping of fields, this is a list"),
    ("train twice.yaml", 2, "twice.yaml: not readable as YAML: train is given twice, line 2, column 1"),
    ("train large.yaml", 2, "bytes are too many for a recipe"),
    ("train tag.yaml", 2, "could not determine a constructor"),
    ("train mine.yaml --set", 2, "'--set' requires an argument"),
    ("train mine.yaml --set train.seed", 2, "--set 'train.seed': write it as field.name=value"),
    ("train mine.yaml --set 'name=[unclosed'", 2, "--set 'name=[unclosed': not readable as YAML"),
    ("train mine.yaml --set name=a/b", 2, "field 'name': must be usable as the name of a folder"),
    ("train mine.yaml --set name=..", 2, "field 'name': must be usable as the name of a folder"),
    (r"""train mine.yaml --set 'name="a\0b"'""", 2, "field 'name': must not contain a NUL character"),
    (f"train mine.yaml --set name={LONG}", 2, "field 'name': must not be longer than 200 bytes"),
    ("train mine.yaml --set train.epochs=.inf", 2, "field 'train.epochs': input should be a finite number"),
    ("train mine.yaml --set train.learning_rate=.nan", 2, "field 'train.learning_rate'"),
    ("train mine.yaml --set train.betas=[.inf,0.9]", 2, "field 'train.betas.0'"),
    ("train mine.yaml --set train.seed=100000000000000000000", 2, "field 'train.seed': input should be less"),
    ("train mine.yaml --set train.batch_size=yes", 2, "'train.batch_size': must not be true or false"),
    ("train mine.yaml --set train.schedule=wavy", 2, "'cosine', 'linear' or 'constant', got 'wavy'"),
    ("train mine.yaml --set train.micro_batch_size=9", 2, "is larger than train.batch_size (2)"),
    ("train mine.yaml --set objective.name=dfft", 2, "objective.name: there is no objective 'dfft' (did you"),
    ("train mine.yaml --set objective.a=1", 2, "objective.a: 'dft' has no such number"),
    ("train mine.yaml --set objective={name:power,a:.nan}", 2, "objective"),
    ("train mine.yaml --set data.source=nope.jsonl", 2, "data.source: no file 'nope.jsonl'"),
    ("train mine.yaml --set data.source=taken", 2, "data.source 'taken' is a folder, not a .jsonl, .json"),
    ("train mine.yaml --set data.source=precious.txt", 2, "is not a .jsonl, .json, .parquet file; name one"),
    (f"train mine.yaml --set data.source={LONG}.json", 2, "data.source: no file 'xxx"),
    ("train mine.yaml --set data.source=me/rows", 2, "in the local cache, and the Hub is not asked"),
    ("train mine.yaml --set data.prompt=question", 2, "no column 'question'"),
    ("train mine.yaml --set 'data.prompt=\"{question}\"'", 2, "no column 'question'"),
    ("train mine.yaml --set data.template=chatt", 2, "template 'chatt' is unknown (did you mean 'chat'?)"),
    ("train mine.yaml --set data.template=nope.jinja", 2, "or a file with such a text or a chat template"),
    ("train mine.yaml --set adapter.init=pissa", 2, "adapter.init: pissa moves a part of the base"),
    ("train mine.yaml --set adapter.init=svd", 2, "field 'adapter.init': input should be 'default'"),
    ("train mine.yaml --set adapter.rslora=2", 2, "field 'adapter.rslora'"),
    ("train mine.yaml --set adapter.lora_plus_ratio=0", 2, "field 'adapter.lora_plus_ratio'"),
    ("train mine.yaml --set model.quantization=int4", 2, "field 'model.quantization': input should be 'nf4'"),
    ("train mine.yaml --set objective={name:psft,clip:-1}", 2, "objective"),
    ("train mine.yaml --set 'objective={name: gift, beta: 0}'", 2, "objective.beta: must lie in (0, 80]"),
    ("train mine.yaml --set objective.name=target-sft", 2, "objective.teacher: 'target-sft' needs one"),
    ("train mine.yaml --set objective.teacher=run", 2, "objective.teacher: 'dft' has no teacher; leave it"),
    ("train mine.yaml --set 'objective={name: target-sft, teacher: nope}'", 2, "nope: not a run folder"),
    ("train mine.yaml --set 'objective={name: target-sft, teacher: answered}'", 2, "answered has no adapter"),
    ("train mine.yaml --set 'objective={name: target-sft, eta: 0, teacher: run}'", 2, "must lie in (0, 1]"),
    ("train mine.yaml --set model.name=me/model", 2, "in the local cache, and the Hub is not asked"),
    ("train mine.yaml --set model.name=taken", 2, "model.name: 'taken' has no config.json"),
    ("train mine.yaml --set model.name=./nope", 2, "model.name: no folder './nope'"),
    (f"train mine.yaml --set model.name=./{LONG}", 2, "model.name: no folder './xxx"),
    ("train mine.yaml --set model.name=~nobody-here/base", 2, "model.name: no folder '~nobody-here/base'"),
    ("train mine.yaml --set evaluate.tasks=[gsm9k]", 2, "unknown task 'gsm9k' (did you mean 'gsm8k'?)"),
    ("train mine.yaml --set evaluate.tasks=[nope.jsonl]", 2, "--task: no file 'nope.jsonl'"),
    ("train mine.yaml --set output=taken", 2, "output: taken exists; name another folder"),
    ("train mine.yaml --set output=precious.txt/run", 2, "output: cannot write precious.txt/run"),
    ("train mine.yaml --set output=/proc/run", 2, "output: cannot write /proc/run"),
    (f"train mine.yaml --set output={LONG}", 2, "output: cannot write xxx"),
    ("train mine.yaml --set output=loop/run", 2, "output: cannot write loop/run: Too many levels"),
    (
        "train mine.yaml --set output=run",
        2,
        "output: run exists; name another folder, or continue",
    ),
    ("train mine.yaml --resume --set output=run --set train.seed=5", 2, "train.seed was 0, is 5"),
    ("train mine.yaml --resume --set output=cut-run", 2, "cut-run/run.json: broken JSON"),
    ("train mine.yaml --resume --set output=list-run", 2, "list-run/run.json: not the record of a run"),
]

SWEEP = [
    ("train mine.yaml --sweep sweep.yaml", 2, "give either a RECIPE or --sweep FILE"),
    ("train --sweep nope.yaml", 2, "--sweep nope.yaml: No such file"),
    ("train --sweep taken", 2, "--sweep taken: Is a directory"),
    ("train --sweep list.yaml", 2, "--sweep list.yaml: the file"),
    ("train --sweep unclosed.yaml", 2, "--sweep unclosed.yaml: not readable as YAML"),
    ("train --sweep sweep.yaml --resume", 2, "--resume: a sweep always continues where it stopped"),
    ("train --sweep sweep.yaml --set train.seed=1", 2, "--sweep: put changes into its file, under 'set'"),
    ("train --sweep sweep-of-data.yaml", 2, "grid.data.source: the runs of a sweep see the same data"),
    ("train --sweep sweep-of-nothing.yaml", 2, "grid.train.epochs: no values"),
    ("train --sweep sweep-of-twins.yaml", 2, "grid: two runs would be named 'epochs=1'"),
    ("train --sweep sweep-of-typos.yaml", 2, "did you mean 'epochs'?"),
    ("train --sweep sweep-for-no-task.yaml", 2, "unknown task 'nope'"),
]

EXPERIMENT = [
    ("experiment", 2, "Missing argument"),
    ("experiment nope", 2, "'nope' is not one of 'findings', 'real', 'rl'"),
    ("sample tiny_dft", 2, "Missing option '--out'"),
    ("sample nope --out own.jsonl", 2, "no recipe file or shipped recipe 'nope'"),
    ("experiment findings --seeds '0, 0'", 2, "--seeds '0, 0': give distinct whole numbers"),
    ("experiment findings --seeds -1", 2, "--seeds '-1': give distinct whole numbers"),
    ("experiment findings --seeds ''", 2, "--seeds '': give distinct whole numbers"),
    ("experiment findings --seeds 4294967296", 2, "input should be less than 4294967296"),
    ("experiment findings --only nothing", 2, "--only 'nothing': no such finding"),
    ("experiment rl --only smol", 2, "--only 'smol': not one of 'tiny', 'smollm2-135m'"),
    ("experiment findings --out fresh --only above-sft", 2, "fresh/findings.json: No such file"),
    ("experiment lab --only 'no priors'", 2, "--only 'no priors': not one of 'strong prior', '8 %"),
    ("experiment lab --out precious.txt", 2, "--out: cannot write precious.txt"),
    ("experiment tasks --only smollm2", 2, "--only 'smollm2': not one of 'smollm2-135m'"),
    ("experiment tasks --out precious.txt", 2, "--out: cannot write precious.txt"),
    ("experiment findings --out precious.txt", 2, "--out: cannot write precious.txt"),
]

EVALUATE = [
    ("evaluate", 2, "Missing argument 'RUN_DIR...'"),
    ("evaluate nope", 2, "nope: not a run folder (no run.json)"),
    ("evaluate precious.txt", 2, "precious.txt: not a run folder"),
    ("evaluate run/checkpoints", 2, "run/checkpoints: not a run folder"),
    ("evaluate cut-run", 2, "cut-run/run.json: broken JSON"),
    ("evaluate list-run", 2, "list-run/run.json: not the record of a run"),
    ("evaluate bare-run", 2, "bare-run/run.json: not the record of a run (template, template_hash missing)"),
    ("evaluate future-run", 2, "field 'train.speed' does not exist (did you mean 'seed'?)"),
    ("evaluate run --task gsm9k", 2, "unknown task 'gsm9k' (did you mean 'gsm8k'?)"),
    ("evaluate run", 2, "no task: give --task NAME"),
    ("evaluate run --task arithmetic --samples 0", 2, "'--samples': 0 is not in the range"),
    ("evaluate run --task arithmetic --limit 0", 2, "'--limit': 0 is not in the range"),
    ("evaluate run --task arithmetic --temperature nan", 2, "'evaluate.temperature'"),
    ("evaluate run --task arithmetic --temperature 0", 2, "'evaluate.temperature': input should be greater"),
    ("evaluate run --task arithmetic --set max_new_tokens=0", 2, "'evaluate.max_new_tokens'"),
    ("evaluate run --task arithmetic --set engine=warp", 2, "'evaluate.engine'"),
    ("evaluate run --task arithmetic --set shots=-1", 2, "'evaluate.shots': input should be greater"),
    ("evaluate run --task arithmetic --set shots=65", 2, "'evaluate.shots': input should be less"),
    ("evaluate run --task arithmetic --set stop=Q", 2, "'evaluate.stop': must be a list, such as [a, b]"),
    (
        "evaluate run --task arithmetic --set 'stop=[\"\"]'",
        2,
        "'evaluate.stop': must not contain an empty",
    ),
    ("evaluate run --task codebook --set shots=2", 2, "codebook has 0 solved training problems that are not"),
    ("evaluate run --task humaneval", 2, "humaneval: its answers are programs"),
    ("evaluate run --task mbpp --set allow_code=no", 2, "set evaluate.allow_code: true or give"),
    ("evaluate run --task arithmetic --set allow_code=7", 2, "'evaluate.allow_code'"),
    ("evaluate run --task arc-chalenge", 2, "unknown task 'arc-chalenge' (did you mean 'arc-challenge'?)"),
    ("evaluate run --task piqa", 2, "and its source 'baber/piqa' could not be loaded"),
    ("evaluate run --task openbookqa --set engine=vllm", 2, "openbookqa: scores its choices"),
    ("evaluate run --task arithmetic --set template=nope", 2, "template"),
    ("evaluate run --task nope.jsonl", 2, "--task: no file 'nope.jsonl'"),
    ("evaluate run --task precious.txt", 2, "--task precious.txt: not a .jsonl, .json, .parquet file"),
    ("evaluate run --task empty.jsonl", 2, "empty.jsonl: has no rows"),
    ("evaluate run --task gsm8k.jsonl", 2, "--task gsm8k.jsonl: 'gsm8k' is the name of a task that comes"),
    ("evaluate run --task my.test.jsonl", 2, "--task my.test.jsonl: a test set is named after its file"),
    ("evaluate run --task taken", 2, "--task taken: is a folder"),
    ("evaluate run --set train.seed=1", 2, "an evaluation takes the fields of `evaluate` only"),
    ("evaluate run --task no-column.jsonl", 2, "or problem, solution and answer"),
    ("evaluate run --task wrong-type.jsonl", 2, "row 1: column 'answer' is list, not text"),
    ("evaluate run --task broken.json", 2, "broken.json: broken JSON"),
    ("evaluate run --task rows.jsonl --task taken/rows.jsonl", 2, "two test sets are named 'rows'; rename"),
    ("evaluate run --task rows.jsonl --task rows.jsonl", 2, "two test sets are named 'rows'; rename"),
    ("evaluate run --task texts.jsonl --set engine=vllm", 2, "scores solutions of rows without a reference"),
    ("evaluate --help-me run", 2, "No such option '--help-me'"),
]

COMPARE = [
    ("compare", 2, "Missing argument 'RUN_DIR...'"),
    ("compare nope", 2, "nope: not a run folder"),
    ("compare run", 2, "run: not evaluated yet; run dft-lora evaluate run"),
    ("compare answered cut-answers", 2, "cut-answers/evaluation/arithmetic.jsonl: line 2 is broken"),
    ("compare answered odd-answers", 2, "odd-answers/evaluation/arithmetic.jsonl: not in the format"),
    ("compare answered few-answers", 2, "answers to 'arithmetic' are missing"),
    ("compare answered --out answered", 2, "--out: answered is a run folder and has its own report"),
    ("compare answered --out precious.txt", 2, "report: cannot write precious.txt: File exists"),
    ("compare answered --out precious.txt/report", 2, "report: cannot write precious.txt/report"),
    ("compare answered --llm-comparator", 2, "--llm-comparator needs --out FOLDER"),
]

BEFORE = [
    ("diagnose", 2, "Missing argument 'RECIPE'"),
    ("diagnose nope", 2, "no recipe file or shipped recipe 'nope'"),
    ("diagnose mine.yaml --examples 0", 2, "'--examples': 0 is not in the range"),
    ("diagnose mine.yaml --set data.max_length=2", 2, "no example is left"),
    ("preflight mine.yaml --gpu-memory 0GB", 2, "--gpu-memory '0GB': give a size above zero"),
    ("preflight mine.yaml --gpu-memory -5GB", 2, "--gpu-memory '-5GB': give a size above zero"),
    ("preflight mine.yaml --gpu-memory infGB", 2, "--gpu-memory 'infGB'"),
    ("preflight mine.yaml --gpu-memory ''", 2, "--gpu-memory ''"),
    ("preflight nope", 2, "no recipe file or shipped recipe 'nope'"),
    ("doctor nope", 2, "no recipe file or shipped recipe 'nope'"),
    ("doctor --set train.seed=1", 2, "--set needs a RECIPE to change"),
    ("doctor mine.yaml --set data.source=nope.jsonl", 2, "data.source: no file 'nope.jsonl'"),
]

AFTER = [
    ("merge nope out", 2, "nope: not a run folder"),
    ("merge answered out", 2, "answered: no adapter of a finished run"),
    ("merge run taken", 2, "OUT: taken exists; name another folder"),
    ("merge run precious.txt/out", 2, "OUT: cannot write precious.txt/out: Not a directory"),
    ("merge run /proc/out", 2, "OUT: cannot write /proc/out"),
    (f"merge run {LONG}", 2, "File name too long"),
    ("merge run out --dtype int8", 2, "'int8' is not one of 'bfloat16', 'float16'"),
    ("merge headless-run out", 2, "no adapter_model.safetensors"),
    ("merge damaged-run out", 2, "the adapter is damaged"),
    ("push nope me/model", 2, "nope: not a run folder"),
    ("push answered me/model", 2, "answered: no adapter of a finished run"),
    ("push run 'no name'", 2, "'no name' is not a repository name"),
    ("push run me/model", 1, "me/model was not pushed: the Hub is not asked (HF_HUB_OFFLINE is set)"),
    ("push run me/model --merged nope", 2, "'nope' does not exist"),
    ("push run me/model --merged taken", 2, "--merged: taken holds no merged model"),
    ("export run", 2, "Missing option '--to'"),
    ("export run --to onnx", 2, "'onnx' is not one of"),
    ("export run --to gguf", 2, "--merged: gguf needs a merged model"),
    ("export run --to gguf --merged taken", 2, "convert_hf_to_gguf.py was not found"),
    ("export run --to gguf --merged taken --out precious.txt", 2, "--out: precious.txt exists"),
    ("export nope --to vllm", 2, "nope: not a run folder"),
    ("chat", 2, "Missing argument 'RUN_DIR'"),
    ("chat nope", 2, "nope: not a run folder"),
    ("chat taken", 2, "taken: not a run folder"),
    ("chat answered", 2, "answered: has no adapter; name a trained run"),
    ("chat damaged-run", 2, "the adapter is damaged"),
    ("chat run --temperature nan", 2, "--temperature: nan; give 0 (greedy) or more"),
    ("chat run --temperature -1", 2, "--temperature: -1.0; give 0 (greedy) or more"),
    ("chat run --max-new-tokens 0", 2, "'--max-new-tokens': 0 is not in the range"),
    ("chat run --seed -1", 2, "'--seed': -1 is not in the range"),
    ("app nope", 2, "nope: not a run folder"),
    ("app run --port 0", 2, "'--port': 0 is not in the range"),
    ("app run --port many", 2, "'--port': 'many' is not a valid integer"),
    ("app run --auth", 2, "--auth: set DFT_LORA_USER and DFT_LORA_PASSWORD"),
    ("app nope --results-only", 2, "nope: not a run folder"),
]

REST = [
    ("trian", 2, "no command 'trian' (did you mean 'train'?)"),
    ("recipes lst", 2, "no command 'lst' (did you mean 'list'?)"),
    ("recipes show nope", 2, "no shipped recipe 'nope'"),
    ("recipes show ../tiny_dft", 2, "no shipped recipe '../tiny_dft'"),
    ("recipes copy tiny_dft precious.txt", 2, "precious.txt exists; name another file"),
    ("recipes copy tiny_dft nowhere/mine.yaml", 2, "cannot write nowhere/mine.yaml: No such file"),
    ("recipes copy tiny_dft precious.txt/mine.yaml", 2, "cannot write precious.txt/mine.yaml"),
    ("bench loss --device cuda", 2, "--device cuda: torch sees no CUDA GPU here; use --device cpu"),
    ("bench loss --device tpu", 2, "'tpu' is not one of 'cpu', 'cuda'"),
    ("bench loss --tokens 0", 2, "'--tokens': 0 is not in the range"),
    ("bench loss --out taken", 2, "--out: taken is a folder; name the JSON file"),
    ("bench loss --out precious.txt/loss.json", 2, "--out: cannot write precious.txt"),
    ("bench train --only nobody", 2, "--only 'nobody': in none of"),
    ("bench rl --only nobody", 2, "--only 'nobody': in none of"),
    ("bench packing --rows -1", 2, "'--rows': -1 is not in the range"),
    ("bench choices --base gpt", 2, "'gpt' is not one of 'smollm2-135m', 'gemma-3-270m', 'tiny'"),
    ("bench choices --set piqa", 2, "--set 'piqa': not one of arc-challenge, openbookqa"),
    ("bench choices --limit 0", 2, "'--limit': 0 is not in the range"),
    ("bench gpu", 2, "--device cuda: torch sees no CUDA GPU here; use --device cpu"),
    ("bench gpu --device cpu", 2, "--device cpu: add --small"),
    ("bench gpu --device cpu --small --stage speed", 2, "--stage 'speed': not one of tests; float16"),
    ("bench gpu --device cpu --small --minutes 0", 2, "'--minutes': 0.0 is not in the range"),
    ("bench gpu --device cpu --small --out precious.txt", 2, "--out: cannot write precious.txt"),
    ("bench lose", 2, "no command 'lose' (did you mean 'loss'?)"),
]

TABLE = [*DEMO, *TRAIN, *SWEEP, *EXPERIMENT, *EVALUATE, *COMPARE, *BEFORE, *AFTER, *REST]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a finished run, a small recipe and data, and everything that can be wrong with them."""
    home = tmp_path_factory.mktemp("world")
    future = {"recipe": {"train": {"speed": 1}}, "template": "chat", "template_hash": "t"}
    files = {
        "precious.txt": "mine",
        "taken/mine.txt": "mine",
        "cut-demo/demo.json": '{"wrote": [',
        "odd-demo/demo.json": '{"wrote": 5}',
        "rows.jsonl": json.dumps(QUESTION) + "\n" + json.dumps(QUESTION | {"problem": "1 + 1?"}) + "\n",
        "taken/rows.jsonl": json.dumps(QUESTION) + "\n",
        "texts.jsonl": json.dumps(QUESTION) + "\n",
        "empty.jsonl": "\n",
        "gsm8k.jsonl": json.dumps(QUESTION),
        "my.test.jsonl": json.dumps(QUESTION),
        "no-column.jsonl": '{"q": "1 + 1?", "a": "2"}',
        "wrong-type.jsonl": '{"problem": "1 + 1?", "answer": [2]}',
        "broken.json": "[1,",
        "mine.yaml": "data: {source: rows.jsonl, max_length: 256}\n"
        "train: {batch_size: 2, micro_batch_size: 2, max_steps: 1}\noutput: fresh/run\n",
        "unclosed.yaml": "train: {seed: 1",
        "list.yaml": "- train",
        "twice.yaml": "train: {seed: 1}\ntrain: {epochs: 2}\n",
        "tag.yaml": "name: !!python/object/apply:os.getcwd []\n",
        "large.yaml": "#" * (2**20 + 1),
        "cut-run/run.json": '{"recipe": {',
        "list-run/run.json": "[1, 2]",
        "bare-run/run.json": '{"recipe": {}}',
        "future-run/run.json": json.dumps(future),
    }
    sweep = {
        "recipe": "mine.yaml",
        "grid": {"train.epochs": [1]},
        "task": "arithmetic",
        "output": "fresh/sweep",
    }
    sweeps = {
        "sweep": {},
        "sweep-of-data": {"grid": {"data.source": ["a.jsonl"]}},
        "sweep-of-nothing": {"grid": {"train.epochs": []}},
        "sweep-of-twins": {"grid": {"train.epochs": [1, 1]}},
        "sweep-of-typos": {"grid": {"train.epoch": [1]}},
        "sweep-for-no-task": {"task": "nope"},
    }
    files |= {f"{name}.yaml": json.dumps(sweep | change) for name, change in sweeps.items()}
    for name, text in files.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text)
    (home / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    (home / "utf16.yaml").write_bytes("name: x".encode("utf-16"))
    (home / "loop").symlink_to("loop")

    recipe = load_recipe(home / "mine.yaml", [f"data.source={home / 'rows.jsonl'}", f"output={home / 'run'}"])
    run = train(recipe)
    facts = (run.path / "run.json").read_text().replace(str(home) + "/", "")
    (run.path / "run.json").write_text(facts)  # as if it had been trained by a command within the folder
    for name in ("headless-run", "damaged-run"):
        shutil.copytree(run.path, home / name)
    (home / "headless-run/adapter/adapter_model.safetensors").unlink()
    (home / "damaged-run/adapter/adapter_config.json").write_text("{}")

    for name in ("answered", "cut-answers", "odd-answers", "few-answers"):
        file = answered(home / name, [[1, 0], [0, 1]]).evaluation("arithmetic")
        lines = file.read_text().splitlines()
        if name == "cut-answers":
            lines[1] = lines[1][:20]
        elif name == "odd-answers":
            lines[1] = '{"verdict": 7}'
        elif name == "few-answers":
            lines = lines[:2]
        file.write_text("\n".join(lines) + "\n")
    return home


def test_the_table_is_large_and_names_every_command():
    assert len(TABLE) >= 60 and len({request for request, _, _ in TABLE}) == len(TABLE)
    first = {shlex.split(request)[0] for request, _, _ in TABLE}
    assert set(main.commands) <= first and "bench" in first


@pytest.mark.parametrize(("request_", "code", "line"), TABLE, ids=[row[0][:60] for row in TABLE])
def test_a_wrong_request_is_one_line_and_changes_nothing(request_, code, line, world, monkeypatch):
    monkeypatch.chdir(world)
    for name in ("DFT_LORA_USER", "DFT_LORA_PASSWORD", "LLAMA_CPP"):
        monkeypatch.delenv(name, raising=False)
    before = tree(world)
    command, *arguments = shlex.split(request_)
    program, arguments = (bench, arguments) if command == "bench" else (main, [command, *arguments])
    result = CliRunner().invoke(program, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    said = [text for text in result.stderr.splitlines() if text.lower().startswith("error: ")]
    assert len(said) == 1 and line in said[0], result.stderr
    assert result.exit_code == code and result.stdout == "" and "Traceback" not in result.stderr
    assert tree(world) == before


def tree(home: Path) -> dict[str, str]:
    """Every entry below a folder, with the digest of its content."""
    entries = {}
    for folder, names, files in os.walk(home):
        for name in (*names, *files):
            path = Path(folder, name)
            content = path.read_bytes() if path.is_file() else b""
            entries[str(path.relative_to(home))] = hashlib.sha256(content).hexdigest()
    return entries
