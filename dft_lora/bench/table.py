"""Committed results as the README's tables: `python -m dft_lora.bench table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def loss_table(result: dict[str, Any]) -> str:
    """One result of `bench loss` as Markdown: what was measured, then a line a variant."""
    shape, birth, p, skip = result["shape"], result["provenance"], result["probability"], result["skip"]
    threads = f"{result['threads']} thread" + "s" * (result["threads"] > 1)
    lines = [
        f"{result['dtype']}, D = {shape['D']}, V = {shape['V']:,}, {shape['N']} tokens, "
        f"{shape['M']} supervised; {result['input']} (mean p {p['mean']:.2f}); {result['device']}, "
        f"{threads}, {result['clock']}; torch {birth['versions']['torch']}, {birth['date'][:10]}, "
        f"commit {birth['commit']}.",
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


BEGIN, END = "<!-- bench: loss -->\n", "<!-- /bench: loss -->\n"


def insert(document: str, text: str) -> str:
    """`document` with `text` between its two marks; ValueError where it has none."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document must hold the lines {BEGIN.strip()} and {END.strip()}")
    return f"{head}{BEGIN}\n{text}\n\n{END}{tail}"


def tables(folder: Path = RESULTS) -> str:
    """The tables of every loss result of a folder, in the order of their names."""
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("loss-*.json"))]
    return "\n\n".join(loss_table(result) for result in results)
