"""`python -m dft_lora.bench`: the loss engine, the training step and answering against their peers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ..cli import Commands, UserPath
from ..errors import MissingPart, RequestError
from ..runs.folder import make_writable
from .table import (
    TABLES,
    choices_table,
    generation_table,
    gpu_table,
    longest_table,
    loss_table,
    memory_table,
    packing_table,
    rl_table,
    tables,
    train_table,
)

POSITIVE = click.IntRange(1)


def writable(_context: click.Context, _parameter: click.Parameter, out: Path | None) -> Path | None:
    """--out, proven before anything is measured. Raises RequestError where no file can be written there."""
    if out is not None:
        if out.is_dir():
            raise RequestError(f"--out: {out} is a folder; name the JSON file")
        make_writable(out.parent, "--out")
    return out


def available(_context: click.Context, _parameter: click.Parameter, device: str) -> str:
    """--device. Raises MissingPart for cuda where torch sees no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MissingPart("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    return device


out_option = click.option(
    "--out",
    type=UserPath(path_type=Path),
    default=None,
    callback=writable,
    help="the JSON  [default: in runs/bench]",
)


def keep(result: dict, out: Path | None, name: str) -> None:
    """Write a result where it was asked for, or to runs/bench under its name; say so the first time."""
    out = out or Path("runs/bench") / f"{name}.json"
    if out not in _kept:
        click.echo(f"{out}\n", err=True)
        _kept.add(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


_kept: set[Path] = set()


@click.group(cls=Commands, invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Measure, print a table, write JSON with its provenance."""
    if context.invoked_subcommand is None:
        context.invoke(loss)


@main.command()
@click.option("--input", "source", default="prescribed", type=click.Choice(["prescribed", "forward"]))
@click.option("--tokens", default=2048, type=POSITIVE, help="N; about 60 % are supervised")
@click.option("--hidden", default=896, type=POSITIVE, help="D")
@click.option("--vocabulary", default=151_936, type=POSITIVE, help="V")
@click.option("--dtype", default="bfloat16", type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), callback=available)
@click.option("--rounds", default=5, type=POSITIVE, help="measured rounds; one more is thrown away")
@click.option("--threads", default=1, type=POSITIVE)
@click.option("--only", default="", help="only variants whose name contains this, and the floor")
@out_option
def loss(source, tokens, hidden, vocabulary, dtype, device, rounds, threads, only, out) -> None:
    """Time, memory and error of the head's forward and backward pass."""
    from .loss import measure

    result = measure(
        source=source,
        N=tokens,
        D=hidden,
        V=vocabulary,
        dtype=dtype,
        device=device,
        rounds=rounds,
        threads=threads,
        only=only,
    )
    keep(result, out, f"loss-{device}-{source}-{dtype}")
    click.echo(loss_table(result))


STEP_OPTIONS = (
    click.option("--dtype", default="auto", type=click.Choice(["auto", "bfloat16", "float16", "float32"])),
    click.option(
        "--steps", default=3, type=POSITIVE, help="measured steps of a round; one more is thrown away"
    ),
    click.option("--rounds", default=3, type=POSITIVE, help="rounds, each in fresh processes"),
    click.option("--threads", default=2, type=POSITIVE),
    click.option("--only", default="", help="only variants whose name contains this"),
    click.option("--model", default=None, help="a base to train on word problems, instead of a random Qwen2"),
    click.option("--hidden", default=512, type=POSITIVE, help="D of the random Qwen2"),
    click.option("--layers", default=8, type=POSITIVE),
    click.option("--vocabulary", default=151_936, type=POSITIVE, help="V"),
    click.option("--batch", default=4, type=POSITIVE, help="examples a step"),
    click.option("--max-length", default=512, type=POSITIVE, help="longest example, tokens"),
    out_option,
)


def step_options(command: Any) -> Any:
    """What every measurement of a training step takes."""
    for option in reversed(STEP_OPTIONS):
        command = option(command)
    return command


def measure_steps(
    variants,
    kind,
    dtype,
    steps,
    rounds,
    threads,
    only,
    model,
    hidden,
    layers,
    vocabulary,
    batch,
    max_length,
    out,
):
    """Measure the variants that were asked for; keep the result as `KIND-DTYPE` and print it."""
    from .train import Measurement, Shape, measure

    shape = Shape(hidden, layers, vocabulary, hidden * 11 // 2, batch, max_length)
    chosen = tuple(variant for variant in variants if only in variant.name)
    if not chosen:
        raise RequestError(f"--only {only!r}: in none of {', '.join(repr(v.name) for v in variants)}")
    result = measure(chosen, Measurement(shape, dtype, steps, rounds, threads, model))
    base = f"-{Path(model).name}" if model else ""
    keep(result, out, f"{kind}{base}-{result['dtype']}")
    click.echo(train_table(result))


@main.command("train")
@click.option(
    "--ladder", is_flag=True, help="our techniques, each on top of the one before, instead of peers"
)
@step_options
def train_step(ladder, **options):
    """Seconds and memory of a whole training step, against TRL's SFTTrainer where it is installed."""
    from .train import COMPARISON, LADDER

    measure_steps(LADDER if ladder else COMPARISON, "train-ladder" if ladder else "train-peers", **options)


@main.command("trainer")
@step_options
def trainer_step(**options):
    """Seconds and memory of a step of transformers' and TRL's trainers, with and without `patch`."""
    from .train import TRAINERS

    measure_steps(TRAINERS, "trainer", **options)


@main.command()
@click.option("--capacity", default=2048, type=POSITIVE, help="tokens of a packed row")
@click.option("--batch", default=256, type=POSITIVE, help="examples a step")
@click.option("--rows", default=4, type=POSITIVE, help="rows of a micro-batch")
@click.option("--examples", default=32, type=POSITIVE, help="examples that are timed")
@click.option("--threads", default=1, type=POSITIVE)
@out_option
def packing(capacity, batch, rows, examples, threads, out) -> None:
    """Padding waste and tokens per second of packed rows and padded ones."""
    from .packing import measure

    result = measure(capacity, batch, rows, examples, threads)
    keep(result, out, f"packing-{capacity}")
    click.echo(packing_table(result))


@main.command()
@click.option("--model", default="tiny", help="a folder, a known name or `random-qwen2` (D = 896, 24 layers)")
@click.option("--rows", multiple=True, type=POSITIVE, default=(1, 8, 64, 256), help="may be repeated")
@click.option("--prompt", "prompts", multiple=True, type=POSITIVE, default=(32, 1000), help="may be repeated")
@click.option("--tokens", default=16, type=click.IntRange(2), help="decoded per row")
@click.option("--rounds", default=3, type=POSITIVE, help="each side runs so often, in turn")
@click.option("--threads", default=2, type=POSITIVE)
@click.option("--as-is", is_flag=True, help="also model.generate without its slice mended: slow, much memory")
@click.option("--quick", is_flag=True, help="1 and 8 rows, 32-token prompts, 6 tokens, one round")
@out_option
def generation(model, rows, prompts, tokens, rounds, threads, as_is, quick, out) -> None:
    """Tokens per second and memory of answering, against model.generate and the bare products."""
    import torch

    from .decode import measure

    torch.set_num_threads(threads)
    if quick:
        rows, prompts, tokens, rounds = (1, 8), (32,), 6, 1
    sizes = {"rows": rows, "prompts": prompts, "tokens": tokens, "rounds": rounds}
    for result in measure(model, **sizes, as_is=as_is):
        keep(result, out, f"generation-{result['model']}-{result['dtype']}")
    click.echo(generation_table(result))


@main.command()
@click.option("--hidden", default=512, type=POSITIVE, help="D of the random Qwen2")
@click.option("--layers", default=8, type=POSITIVE)
@click.option("--vocabulary", default=151_936, type=POSITIVE, help="V")
@click.option("--prompts", default=8, type=POSITIVE, help="prompts of the GRPO step, pairs of the DPO step")
@click.option("--answers", default=8, type=click.IntRange(2), help="answers to each prompt")
@click.option("--tokens", default=128, type=click.IntRange(2), help="tokens of an answer")
@click.option("--rounds", default=3, type=POSITIVE, help="rounds, each in fresh processes")
@click.option("--threads", default=2, type=POSITIVE)
@click.option("--only", default="", help="only sides whose name contains this")
@click.option(
    "--small", is_flag=True, help="a check: the embedded base, little work, one round; keeps no JSON"
)
@out_option
def rl(hidden, layers, vocabulary, prompts, answers, tokens, rounds, threads, only, small, out) -> None:
    """Time and memory of a GRPO and of a DPO step, stage by stage, beside TRL's where it is installed."""
    from .rl import SIDES, Work, measure
    from .train import Shape

    if not any(only in side.name for side in SIDES):
        raise RequestError(f"--only {only!r}: in none of {', '.join(repr(s.name) for s in SIDES)}")
    if small:
        work = Work(
            Shape(), "tiny", prompts=2, answers=2, tokens=24, micro_batch=2, rounds=1, threads=threads
        )
    else:
        shape = Shape(hidden, layers, vocabulary, hidden * 11 // 2)
        work = Work(shape, None, prompts, answers, tokens, rounds=rounds, threads=threads)
    result = measure(work, only)
    if out or not small:
        keep(result, out, f"rl-{result['dtype']}")
    click.echo(rl_table(result))


@main.command()
@click.option(
    "--recipe", "names", multiple=True, help="a shipped recipe; may be repeated (default: all large)"
)
@out_option
def memory(names, out) -> None:
    """Peak memory of the large recipes' training steps, traced on shapes alone, without a GPU."""
    from .memory import GPUS, measure_recipes

    if unknown := set(names) - set(GPUS):
        raise RequestError(f"--recipe {min(unknown)!r}: not one of {', '.join(GPUS)}")
    result = measure_recipes(names or tuple(GPUS))
    keep(result, out, "memory-recipes")
    click.echo(memory_table(result))


@main.command()
@click.option(
    "--base",
    "bases",
    multiple=True,
    type=click.Choice(["smollm2-135m", "gemma-3-270m", "tiny"]),
    default=("smollm2-135m", "gemma-3-270m"),
    show_default=True,
    help="may be repeated",
)
@click.option("--set", "names", multiple=True, default=None, help="may be repeated  [default: all at hand]")
@click.option("--limit", default=200, show_default=True, type=POSITIVE, help="first problems of each set")
@click.option("--harness", is_flag=True, help="also count equal choices of lm-evaluation-harness (lm-eval)")
@click.option("--threads", default=1, show_default=True, type=POSITIVE)
@out_option
def choices(bases, names, limit, harness, threads, out) -> None:
    """Multiple choice by log-likelihood on the real bases, against published figures."""
    import torch

    from .choices import SETS, measure

    if unknown := set(names) - set(SETS):
        raise RequestError(f"--set {min(unknown)!r}: not one of {', '.join(SETS)}")
    if harness and find_spec("lm_eval") is None:
        raise MissingPart("--harness: lm-evaluation-harness is not installed; pip install lm-eval")
    torch.set_num_threads(threads)
    for result in measure(bases, names or SETS, limit, harness=harness):
        keep(result, out, f"choices-{'-'.join(bases)}")
    click.echo(choices_table(result))


@main.command()
@click.option("--out", type=UserPath(path_type=Path), default=Path("runs/gpu"), help="folder of the JSON")
@click.option("--minutes", default=10.0, type=click.FloatRange(0.5, 600), help="for all stages together")
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]), callback=available)
@click.option("--small", is_flag=True, help="small sizes: a rehearsal, also without a GPU")
@click.option("--stage", "stages", multiple=True, help="only this one; may be repeated")
def gpu(out, minutes, device, small, stages) -> None:
    """Prove on a GPU what this project claims of one: exactness, speed, memory. Needs no network."""
    from .gpu.run import run
    from .gpu.stages import STAGES

    names = [stage.name for stage in STAGES]
    if unknown := set(stages) - set(names):
        raise RequestError(f"--stage {min(unknown)!r}: not one of {'; '.join(names)}")
    if device == "cpu" and not small:
        raise RequestError("--device cpu: add --small; the sizes of a GPU would take hours")
    make_writable(out, "--out")
    path = run(out, device, small, minutes, lambda line: click.echo(line, err=True), stages)
    click.echo(f"{path}\n", err=True)
    click.echo(gpu_table(json.loads(path.read_text())))


@main.command()
@out_option
def longest(out) -> None:
    """The longest row that GPUs of several sizes can train on, traced on shapes alone, without a GPU."""
    from .memory import measure_longest

    for result in measure_longest():
        keep(result, out, "longest-rows")
    click.echo(longest_table(result))


@main.command()
def table() -> None:
    """The committed results as Markdown."""
    for kind in TABLES:
        click.echo(tables(kind=kind))


if __name__ == "__main__":
    main()
