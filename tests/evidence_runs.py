"""Runs for the tests of evaluation: real adapters, trained for a moment on the embedded base."""

import json
from pathlib import Path

from dft_lora.config import digest, load_recipe
from dft_lora.evaluation.base_run import base_run
from dft_lora.model.fingerprint import base_fingerprint
from dft_lora.runs.folder import RunFolder, write_json
from dft_lora.training.loop import train

QUICK = (
    "train.max_steps=2",
    "train.batch_size=8",
    "train.micro_batch_size=8",
    "train.learning_rate=3e-3",
    "data.sample=40",
)


def trained(out: Path, *changes: str) -> list[Path]:
    """base, sft and dft below `out`: two steps of eight examples, a checkpoint after each."""
    paths = [out / name for name in ("base", "sft", "dft")]
    for path in paths[1:]:
        fields = (*QUICK, "train.save_steps=1", f"objective.name={path.name}", f"output={path}", *changes)
        train(load_recipe("tiny_dft", fields))
    base_run(RunFolder(paths[1]).recipe(), paths[0])
    return paths


def answered(path: Path, correct: list[list[int]], task: str = "arithmetic", **protocol) -> RunFolder:
    """A run folder with judged answers and no adapter; `correct` has a row a problem, greedy in front."""
    folder = RunFolder(path)
    folder.write_run(recipe=load_recipe("tiny_dft").as_dict(), template="chat", template_hash="t")
    names = [f"problem-{i}" for i in range(len(correct))]
    settings = {
        "task": task,
        "problems": len(names),
        "problems_hash": digest(names),
        "samples": len(correct[0]) - 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 96,
        "template": "chat",
        "template_hash": "t",
        "seed": 0,
        "engine": "plain",
        "adapter": None,
        "base": base_fingerprint(load_recipe("tiny_dft").model),
    }
    problems = {name: {"question": f"What is {name}?", "answer": "7", "tags": {}} for name in names}
    file = folder.evaluation(task)
    write_json(file.with_suffix(".json"), {"protocol": settings | protocol, "problems": problems})
    lines = [
        {
            "problem": name,
            "sample": sample,
            "text": f"#### {7 if right else 8}",
            "tokens": 3,
            "truncated": False,
            "verdict": "correct" if right else "wrong",
            "extracted": "7" if right else "8",
        }
        for name, row in zip(names, correct, strict=True)
        for sample, right in enumerate(row, start=-1)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
