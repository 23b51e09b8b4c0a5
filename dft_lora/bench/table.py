"""Committed results as Markdown tables: `python -m dft_lora.bench table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def loss_table(result: dict[str, Any]) -> str:
    """One result of `bench loss` as Markdown: what was measured, then one line per variant."""
    shape, made, p, skip = result["shape"], result["provenance"], result["probability"], result["skip"]
    threads = f"{result['threads']} thread" + "s" * (result["threads"] > 1)
    lines = [
        f"{result['dtype']}, D = {shape['D']}, V = {shape['V']:,}, {shape['N']} tokens, "
        f"{shape['M']} supervised; {result['input']} (mean p {p['mean']:.2f}); {result['device']}, "
        f"{threads}, {result['clock']}; torch {made['versions']['torch']}, {made['date'][:10]}, "
        f"commit {made['commit']}.",
        "",
        "| forward + backward | time / bare GEMMs | seconds | peak MiB | gradient error |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in result["variants"].items():
        if row["missing"]:
            lines.append(f"| {name} | not run: {row['missing']} | | | |")
            continue
        error = f"{row['gradient_error']:.1e}" if "gradient_error" in row else ""
        cells = f"{row['ratio']:.2f} | {row['median']:.2f} | {row['peak_mb']:.0f} | {error}"
        lines.append(f"| {name} | {cells} |")
    lines += [
        "",
        f"`skip=1e-3` leaves out {skip['rows']:.0%} of the rows; that adds an error of {skip['error']:.1e} "
        f"under a reported bound of {skip['bound']:.1e}; the gradient's norm is {skip['gradient']:.1e}.",
    ]
    return "\n".join(lines)


def train_table(result: dict[str, Any]) -> str:
    """One result of `bench train` as Markdown; ratios against the first variant that ran."""
    shape, made = result["shape"], result["provenance"]
    base = result.get("model") or (
        f"Qwen2 of random weights, D = {shape['D']}, {shape['layers']} layers, V = {shape['V']:,}"
    )
    lines = [
        f"A training step: {base}, nf4, LoRA r 8, {result['dtype']}; {result['data']}, "
        f"batch {shape['batch']} (up to {shape['max_length']} tokens, {result['tokens_a_step']:.0f} a step); "
        f"{result['device']}, "
        f"{result['threads']} threads; torch {made['versions']['torch']}, "
        f"TRL {made['peers']['trl'] or 'not installed'}, {made['date'][:10]}, commit {made['commit']}.",
        "",
        "| | seconds per step | ratio | MB above the loaded model | ratio | MB in all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    counted = any(row.get("tensors_mb") for row in result["variants"].values())
    if counted:
        lines[-2:] = [f"{lines[-2]} of which tensors |", f"{lines[-1]}---:|"]
    digits = {"seconds": 2, "above_loaded_mb": 0}
    first = next((row for row in result["variants"].values() if row["runs"]), {})
    for name, row in result["variants"].items():
        if not row["runs"]:
            lines.append(f"| {name} | not run: {row['missing']} |" + " |" * (4 + counted))
            continue
        cells = [f"{row[key]:.{n}f} | {row[key] / first[key]:.2f}" for key, n in digits.items()]
        cells.append(f"{row['loaded_mb'] + row['above_loaded_mb']:.0f}")
        if counted:
            cells.append(f"{row['tensors_mb']:.0f}" if row.get("tensors_mb") else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if floor := first.get("products_cpu_seconds"):
        ours = first["cpu_seconds"]
        text = f"{ours:.2f} CPU seconds: {ours / floor:.2f} times its matrix products alone ({floor:.2f})"
        lines += ["", f"The first line takes {text}."]
    return "\n".join(lines)


def packing_table(result: dict[str, Any]) -> str:
    """One result of `bench packing` as Markdown."""
    made = result["provenance"]
    lines = [
        f"{result['data']}, {result['examples']:,} examples, steps of {result['batch_size']}, micro-batches "
        f"of {result['micro_batch_size']} rows, packed rows of {result['capacity']:,} tokens; "
        f"{result['device']}, {result['threads']} thread(s), {result['clock']}; {made['date'][:10]}, "
        f"commit {made['commit']}.",
        "",
        "| | padding | tokens per second |",
        "|---|---:|---:|",
    ]
    for name, row in result["arrangements"].items():
        lines.append(f"| {name} | {row['waste']:.1%} | {row['tokens_per_second']:,.0f} |")
    return "\n".join(lines)


def generation_table(result: dict[str, Any]) -> str:
    """One result of `bench generation` as Markdown: one line per case, two columns per side."""
    made = result["provenance"]
    sides = list(result["cases"][0]["sides"])
    with_attention = all("attention_seconds" in case for case in result["cases"])
    floors = ["step / floor", "step / (floor + attention)"][: 1 + with_attention]
    added = "; the column after it adds the attention kernel" if with_attention else ""
    rounds = "one round" if result["rounds"] == 1 else f"medians of {result['rounds']} rounds"
    lines = [
        f"{result['model']}, {result['dtype']}, {result['tokens']} tokens decoded per row, "
        f"{rounds}; {result['device']}, {result['threads']} thread(s); torch "
        f"{made['versions']['torch']}, {made['date'][:10]}, commit {made['commit']}. Decoded tokens per "
        "second, in brackets prompt tokens per second of the prefill. The floor is the step's bare matrix "
        f"products{added}; memory is what our unpacked side takes beside the weights, and the bound stated "
        "before.",
        "",
        f"| rows | prompt | adapters | T | {' | '.join(sides + floors)} | MB (stated) |",
        "|---:|---:|---:|---:|" + "---:|" * (len(sides + floors) + 1),
    ]
    for case in result["cases"]:
        cells = [
            f"{side['decode_tokens_per_second']:,.1f} ({side['prefill_tokens_per_second']:,.0f})"
            for side in case["sides"].values()
        ]
        first = case["sides"][sides[0]]
        floor = case["floor_seconds"]
        for least in (floor, floor + case["attention_seconds"]) if with_attention else (floor,):
            cells.append(f"{first['step_seconds'] / least:.2f}")
        lines.append(
            f"| {case['rows']} | {case['prompt']} | {case['adapters']} | {case['temperature']:g} | "
            f"{' | '.join(cells)} | {first['peak_mb']:,.0f} ({case['stated_mb']:,.0f}) |"
        )
    return "\n".join(lines)


def memory_table(result: dict[str, Any]) -> str:
    """One result of `bench memory` as Markdown: a line for each recipe and GPU."""
    made, GB = result["provenance"], 2**30
    version = made["versions"]
    lines = [
        "| recipe | model | tokens | weights | one row at a time | GPU | rows by the fit | peak with those |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["recipes"].items():
        for gpu in row["gpus"]:
            cells = [f"`{name}`", row["model"], f"{row['max_length']:,}"]
            cells += [f"{row['bytes']['weights'] / GB:.1f}", f"{row['one_row'] / GB:.1f}"]
            peak = f"{gpu['peak'] / GB:.1f}" if gpu["rows"] else "does not fit"
            each = f"{row['processes']} x " if row["processes"] > 1 else ""
            lines.append(f"| {' | '.join(cells)} | {each}{gpu['gb']} | {gpu['rows']} | {peak} |")
    return "\n".join(
        [
            *lines,
            "",
            "GB of tensors on each GPU, traced on shapes alone (nf4, LoRA in float32, gradient "
            "checkpointing, every row as long as the longest), not measured on a GPU; 0.6 GB for the CUDA "
            f"context come on top. torch {version['torch']}, transformers {version['transformers']}, "
            f"bitsandbytes {version['bitsandbytes']}, {made['date'][:10]}, commit {made['commit']}.",
        ]
    )


def choices_table(result: dict[str, Any]) -> str:
    """One result of `bench choices` as Markdown: ours, what was published, and the difference in points."""
    made = result["provenance"]
    lines = [
        "| base | held as | set | problems | rule | ours, % (interval) | chance | published | difference |",
        "|---|---|---|---:|---|---:|---:|---:|---:|",
    ]
    sources = []
    for row in result["rows"]:
        share, (low, high) = row["accuracy"][row["rule"]], row["ci95"]
        cells = [row["base"], row["quantization"], row["set"], str(row["problems"]), f"`{row['rule']}`"]
        cells += [f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})", f"{100 * row['chance']:.0f}"]
        if row["published"]:
            figure, source = row["published"]
            sources += [] if source in sources else [source]
            cells += [f"{100 * figure:.1f} [{sources.index(source) + 1}]"]
            cells += [
                f"{100 * (share - figure):+.1f} ({100 * (low - figure):+.1f} to {100 * (high - figure):+.1f})"
            ]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    compared = [
        f"{row['equal_choices'][row['rule']]} of {row['problems']} ({row['base']}, {row['set']})"
        for row in result["rows"]
        if "equal_choices" in row
    ]
    same = ""
    if compared:
        same = f" lm-evaluation-harness {made['peers']['lm-eval']}, with its own tasks on the same rows and "
        same += f"unpacked weights, chose the same: {', '.join(compared)}."
    notes = "; ".join(f"[{number}] {source}" for number, source in enumerate(sources, start=1))
    versions = made["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"Published: {notes}. 95 % intervals over our problems, the first of each set; no examples in "
            f"the prompt. Made by `{made['command']}` on {made['date'][:10]}, commit {made['commit']}, torch "
            f"{versions['torch']}, transformers {versions['transformers']}.{same}",
        ]
    )


def rl_table(result: dict[str, Any]) -> str:
    """One result of `bench rl` as Markdown: one line per side, with the seconds of each stage."""
    work, made = result["work"], result["provenance"]
    shape = work["shape"]
    base = work["base"] or (
        f"Qwen2 of random weights, D = {shape['D']}, {shape['layers']} layers, V = {shape['V']:,}"
    )
    stages = ("rollout", "reward", "reference", "loss", "update", "whole")
    lines = [
        f"A step of {work['prompts']} prompts with {work['answers']} answers of {work['tokens']} tokens "
        f"(grpo), or of {work['prompts']} pairs (dpo): {base}, nf4, LoRA r 8, {result['dtype']}, "
        f"micro-batches of {work['micro_batch']}; {result['device']}, {work['threads']} thread(s), "
        f"{work['rounds']} round(s); torch {made['versions']['torch']}, "
        f"TRL {made['peers']['trl'] or 'not installed'}, "
        f"{made['date'][:10]}, commit {made['commit']}. Seconds, in brackets processor seconds.",
        "",
        f"| | {' | '.join(stages)} | ratio | MB above the loaded model | ratio |",
        "|---|" + "---:|" * (len(stages) + 3),
    ]
    for name, side in result["sides"].items():
        if not side["runs"]:
            lines.append(f"| {name} | not run: {side['missing']} |" + " |" * (len(stages) + 2))
            continue
        first = result["sides"].get(f"{name.split(',')[0]}, ours", {})
        first = first if first.get("runs") else side
        cells = [f"{side['stages'][s][0]:.2f} ({side['stages'][s][1]:.2f})" for s in stages]
        ratios = [a / b for a, b in zip(side["stages"]["whole"], first["stages"]["whole"], strict=True)]
        cells.append(f"{ratios[0]:.2f} ({ratios[1]:.2f})")
        more = side["above_loaded_mb"]
        cells += [f"{more:.0f}", f"{more / first['above_loaded_mb']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, side in result["sides"].items():
        if floor := side.get("products_cpu_seconds"):
            ratio = side["stages"]["whole"][1] / floor
            lines += [
                "",
                f"{name}: {ratio:.2f} times the processor seconds of its matrix products ({floor:.2f}).",
            ]
    return "\n".join(lines)


def gpu_table(result: dict[str, Any]) -> str:
    """One result of `bench gpu` as Markdown: a line for each result of each stage."""
    machine, made = result["machine"], result["provenance"]
    peers = ", ".join(f"{name} {v}" for name, v in made["peers"].items() if v and name != "python")
    words = {"memory_gb": "{} GB", "capability": "compute capability {}", "cuda": "CUDA {}"}
    facts = [text.format(machine[key]) for key, text in words.items() if key in machine]
    lines = [
        f"**{', '.join([machine['name'], *facts])}**; torch {made['versions']['torch']}, transformers "
        f"{made['versions']['transformers']}, bitsandbytes {made['versions']['bitsandbytes']}"
        f"{', ' + peers if peers else ''}; {made['date'][:10]}, commit {made['commit']}.",
        "",
        "| stage | seconds | | |",
        "|---|---:|---|---|",
    ]
    for stage, found in result["stages"].items():
        rows = [(name, _figures(value)) for name, value in found["results"].items()]
        rows += [("", f"{key}: {found[key]}") for key in ("error", "missing") if key in found]
        for i, (name, text) in enumerate(rows):
            head = f"{stage} | {found['seconds']:.0f}" if i == 0 else " | "
            lines.append(f"| {head} | {name} | {text} |")
    return "\n".join(lines)


def _figures(found: dict[str, Any]) -> str:
    """`seconds 0.12, peak mb 345, equal yes` of a result's figures."""

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "**no**"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    return ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in found.items())


def longest_table(result: dict[str, Any]) -> str:
    """One result of `bench longest` as Markdown: a line for each model and technique."""
    made, GB = result["provenance"], 2**30
    version, gpus = made["versions"], list(result["rows"][0]["longest"])
    head = [f"peak at {tokens:,} tokens" for tokens in result["lengths"]]
    head += [f"longest row on {gb} GB" for gb in gpus]
    lines = [f"| model | | {' | '.join(head)} |", "|---|---|" + "---:|" * len(head)]
    for row in result["rows"]:
        cells = [f"{size / GB:.1f}" for size in row["peaks"].values()]
        cells += [_longest_cell(tokens, result["most"]) for tokens in row["longest"].values()]
        lines.append(f"| {row['model']} | {row['option']} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "GB of tensors and tokens of a single row, traced on shapes alone (nf4, LoRA r 16 in float32, "
            "each line with what the line before has), not measured on a GPU; 0.6 GB for the CUDA context and"
            f" 6 % for fragmentation are kept free. torch {version['torch']}, transformers "
            f"{version['transformers']}, bitsandbytes {version['bitsandbytes']}, {made['date'][:10]}, commit "
            f"{made['commit']}.",
        ]
    )


def _longest_cell(tokens: int, most: int) -> str:
    return "none" if not tokens else f"{tokens:,} or more" if tokens == most else f"{tokens:,}"


TABLES = {
    "choices": choices_table,
    "rl": rl_table,
    "memory": memory_table,
    "longest": longest_table,
    "loss": loss_table,
    "train": train_table,
    "trainer": train_table,
    "packing": packing_table,
    "generation": generation_table,
}


def tables(folder: Path = RESULTS, kind: str = "loss") -> str:
    """The tables of every result of a kind in a folder, in the order of their names."""
    results = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{kind}-*.json"))]
    return "\n\n".join(TABLES[kind](result) for result in results)
