"""The commands: thin, each a few lines around one function of the package.

Progress goes to stderr, results to stdout. Exit codes: 0 done, 2 the request was wrong,
1 the run failed; the errors of this package end in one line without a traceback.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import __version__
from .config import SEEDS, load_recipe, shipped_recipes
from .errors import DftLoraError, Interrupted, RequestError, did_you_mean
from .experiments import CONTINUES
from .experiments import NAMES as EXPERIMENTS

OUT_OF_MEMORY = (
    "out of memory: take a smaller model, or fewer rollouts.rows where the run samples; dft-lora preflight "
    "RECIPE measures what fits"
)
"""Where no smaller piece is tried: while a base is loaded, or answers are sampled."""


class Commands(click.Group):
    """A group that turns our errors into one line and an exit code, and suggests near names."""

    def resolve_command(self, context, arguments):
        name = arguments[0] if arguments else ""
        if name and not name.startswith("-") and self.get_command(context, name) is None:
            raise click.UsageError(f"no command {name!r}{did_you_mean(name, self.commands)}")
        return super().resolve_command(context, arguments)

    def invoke(self, context):
        try:
            return super().invoke(context)
        except DftLoraError as error:
            message, code = str(error), error.exit_code
        except KeyboardInterrupt:
            message, code = "stopped by Ctrl-C", 130
        except OSError as error:
            if error.filename is None:  # not about a file of the user's
                raise
            message, code = f"{error.filename}: {error.strerror}", 1
        except (click.Abort, click.exceptions.Exit):  # click's own ways to end, which are RuntimeErrors
            raise
        except (MemoryError, RuntimeError) as error:
            from .training.faults import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            message, code = OUT_OF_MEMORY, 1
        click.echo(f"error: {' '.join(message.splitlines())}", err=True)
        context.exit(code)


class UserPath(click.Path):
    """A path that the system can look up; it need not exist. An empty path is an error."""

    def convert(self, value, param, ctx):
        text = os.fspath(value)
        try:
            os.stat(text)
        except (FileNotFoundError, NotADirectoryError):
            if not text:
                self.fail("the path is empty; give one", param, ctx)
        except (OSError, ValueError) as error:  # too long, a loop of links, not permitted; a NUL character
            self.fail(f"{text[:80]!r}: {getattr(error, 'strerror', None) or error}", param, ctx)
        return super().convert(value, param, ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dft-lora")
def main() -> None:
    """Fine-tune a 4-bit base with LoRA by Dynamic Fine-Tuning (DFT), and compare it with SFT."""
    # Importing torch and transformers makes a million objects that stay. The collector need not look at them
    # so often: a tenth of the time that a command takes to start.
    gc.set_threshold(10_000, 20, 20)


def set_option(example: str, part: str = "a recipe") -> Callable[..., Any]:
    """The option --set, with an example that the command accepts."""
    return click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="FIELD=VALUE",
        help=f"Override {part} field, for example {example}; may be repeated.",
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
runs_argument = click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR...", type=UserPath())


@main.command()
@click.option(
    "--out",
    type=UserPath(),
    help="Output folder.  [default: runs/demo, runs/demo-clean with --clean, runs/real with a real base]",
)
@click.option(
    "--base",
    default="tiny",
    show_default=True,
    type=click.Choice(["tiny", "smollm2-135m", "gemma-3-270m"]),
    help="The embedded base, or a real one, which is fetched once.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, SEEDS - 1),
    help="Seed for training and sampling.",
)
@click.option("--quick", is_flag=True, help="Run a few steps and problems only, as a check.")
@click.option(
    "--clean",
    is_flag=True,
    help="Train on demonstrations without errors; by default 8 % of their steps are wrong.",
)
@json_option
def demo(out: str | None, base: str, seed: int, quick: bool, clean: bool, as_json: bool) -> None:
    """Train SFT and DFT adapters on the embedded base, or on a real one, and compare them.

    Example: dft-lora demo --base smollm2-135m
    """
    from .experiments.demo import run_demo

    folder = Path(out or ("runs/real" if base != "tiny" else "runs/demo-clean" if clean else "runs/demo"))
    try:
        show_report(run_demo(folder, seed=seed, quick=quick, clean=clean, base=base), as_json)
    except Interrupted as stop:
        raise stop.and_then("run the command again to start over") from None


@main.command()
@click.argument("recipe", required=False)
@set_option("train.seed=1")
@click.option("--resume", is_flag=True, help="Resume from the newest intact checkpoint.")
@click.option(
    "--extend",
    is_flag=True,
    help="Resume with a larger train.max_steps or train.epochs. New steps take their learning rates from the "
    "longer run's schedule; those already made had the shorter one's.",
)
@click.option(
    "--sweep",
    metavar="FILE",
    type=UserPath(),
    help="Train and evaluate every combination in FILE; run it again to continue.",
)
def train(
    recipe: str | None, changes: tuple[str, ...], resume: bool, extend: bool, sweep: str | None
) -> None:
    """Train one adapter. RECIPE is a file or the name of a shipped recipe.

    Example: dft-lora train tiny_dft --set train.max_steps=20
    """
    if (recipe is None) == (sweep is None):
        raise RequestError("give either a RECIPE or --sweep FILE, which names its own recipe")
    if sweep is not None:
        if changes or extend:
            raise RequestError("--sweep: put changes into its file, under 'set'")
        if resume:
            raise RequestError("--resume: a sweep always continues where it stopped; leave the option out")
        from .experiments.sweep import Sweep, run_sweep, sweep_markdown

        click.echo(sweep_markdown(run_sweep(Sweep.load(sweep))), nl=False)
        return
    chosen = load_recipe(recipe, changes)
    from .training.loop import train as run

    try:
        click.echo(run(chosen, resume=resume, extend=extend).path)
    except Interrupted as stop:
        raise stop.and_then("resume with --resume") from None


@main.command()
@click.argument("recipe")
@set_option("data.sample=100")
@click.option(
    "--out",
    required=True,
    type=UserPath(dir_okay=False, path_type=Path),
    help="The .jsonl file of correct answers.",
)
@click.option("--run", "run_dir", type=UserPath(), help="Sample with this run's adapter, not from the base.")
@click.option(
    "--samples",
    type=click.IntRange(1),
    help="Answers per problem.  [default: rollouts.samples of the recipe, or 4]",
)
@click.option(
    "--pairs",
    type=UserPath(dir_okay=False, path_type=Path),
    help="Also write pairs of a correct and a wrong answer, for dpo.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that were made with other settings.")
def sample(
    recipe: str,
    changes: tuple[str, ...],
    out: Path,
    run_dir: str | None,
    samples: int | None,
    pairs: Path | None,
    overwrite: bool,
) -> None:
    """Sample answers to the training problems of RECIPE, and write the correct ones as training data.

    Train on the file with data.source=OUT; its columns are problem, solution and answer, so for a recipe with
    other columns also set data.prompt=problem, data.completion=solution and data.answer=answer. For
    own.jsonl, own.made.json records how it was made; files made with the same settings are reused.

    Example: dft-lora sample tiny_dft --out own.jsonl --pairs pairs.jsonl
    """
    for option, file in (("--out", out), ("--pairs", pairs)):
        if file is not None and file.suffix != ".jsonl":
            raise RequestError(f"{option}: {file} must end in .jsonl")
    if pairs is not None and out.resolve() == pairs.resolve():
        raise RequestError("--pairs: give another file than --out")
    chosen = load_recipe(recipe, changes)
    if Path(chosen.data.source).resolve() in {file.resolve() for file in (out, pairs) if file is not None}:
        raise RequestError(f"--out, --pairs: {chosen.data.source} is the data that is sampled from")
    if samples is not None:
        chosen = chosen.override([f"rollouts.samples={samples}"])
    elif chosen.rollouts is None:
        chosen = chosen.override(["rollouts.samples=4"])
    from .experiments.own_samples import own_samples
    from .runs.folder import open_runs

    run = open_runs([run_dir])[0] if run_dir else None
    click.echo(own_samples(chosen, out, run=run, pairs=pairs, overwrite=overwrite))


@main.command()
@runs_argument
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME|FILE",
    help="Task to evaluate, or a .jsonl, .json or .parquet file with your own test set; may be repeated.",
)
@click.option(
    "--samples", type=click.IntRange(1), help="Sampled answers per problem, in addition to the greedy one."
)
@click.option("--temperature", type=float, help="Sampling temperature.")
@click.option("--limit", type=click.IntRange(1), help="Use only the first N problems of each task.")
@click.option("--checkpoints", is_flag=True, help="Also evaluate the kept checkpoints, below RUN_DIR/steps.")
@click.option("--overwrite", is_flag=True, help="Replace answers made with other settings or weights.")
@click.option("--allow-code", is_flag=True, help="Let humaneval and mbpp run the programs that models write.")
@set_option("max_new_tokens=1024", "an evaluate")
@json_option
def evaluate(
    run_dirs, tasks, samples, temperature, limit, checkpoints, overwrite, allow_code, changes, as_json
) -> None:
    """Evaluate one or more runs of the same base on tasks.

    Run the command again to continue a stopped evaluation. Answers belong to the exact weights: if the
    adapter, the base or a setting has changed, the command refuses unless --overwrite replaces the old
    answers. The run must have finished. RUN_DIR/checkpoints/step-N evaluates a checkpoint instead; its
    results go to RUN_DIR/steps/step-N. The run's report.json covers all tasks evaluated so far.

    A file's rows have the columns of the recipe's data, or problem, solution and answer, or messages. Rows
    with an answer are judged; of others the solution is scored token by token, and nothing is sampled.

    Several GPUs: accelerate launch -m dft_lora evaluate ...

    Example: dft-lora evaluate runs/tiny_dft --task arithmetic --samples 4
    """
    from .data.own_tasks import task_title
    from .evaluation.evaluate import evaluate as run
    from .evaluation.report import write_own_report, write_report
    from .evaluation.run_set import asked_tasks, recipes_of
    from .evaluation.shard import Shard

    given = {"samples": samples, "temperature": temperature, "allow_code": allow_code or None}
    changes = (*changes, *(f"{name}={value}" for name, value in given.items() if value is not None))
    try:
        folders = run(run_dirs, tasks, limit=limit, changes=changes, overwrite=overwrite)
        if checkpoints:
            shard = Shard.of_this_process()
            if shard.is_main:  # which alone writes their run folders
                for folder in folders:
                    folder.checkpoint_runs()
            shard.wait()
            if steps := [step.path for folder in folders for step in folder.checkpoint_runs()]:
                run(steps, tasks, limit=limit, changes=changes, overwrite=overwrite)
    except Interrupted as stop:
        again = "without --overwrite" if overwrite else "again"
        raise stop.and_then(f"run the same command {again} to continue") from None
    if not Shard.of_this_process().is_main:
        return
    for folder in folders:
        write_own_report(folder)
    asked = asked_tasks(recipes_of(folders, changes), tasks)
    show_report(write_report(folders, None, tasks=[task_title(name) for name in asked]), as_json)


@main.command()
@runs_argument
@click.option("--out", type=UserPath(), help="Write report.json, report.md and plots to this folder.")
@click.option(
    "--llm-comparator", is_flag=True, help="Also write files for Google's LLM Comparator, below --out."
)
@json_option
def compare(run_dirs, out, llm_comparator, as_json) -> None:
    """Compare runs evaluated on the same problems.

    Example: dft-lora compare runs/demo/sft runs/demo/dft --out runs/comparison
    """
    from .evaluation.report import write_report
    from .runs.folder import RunFolder, open_runs, read_json

    if llm_comparator and not out:
        raise RequestError("--llm-comparator needs --out FOLDER")
    if out and RunFolder(out).begun:
        raise RequestError(f"--out: {out} is a run folder and has its own report; choose another folder")
    folders = open_runs(run_dirs)
    before = Path(out, "report.json") if out else None
    if before and before.is_file() and "paired" not in read_json(before):
        raise RequestError(f"--out: {before} exists and compares no runs; choose another folder")
    show_report(write_report(folders, Path(out) if out else None, comparator=llm_comparator), as_json)
    if out:
        click.echo(f"written to {out}", err=True)


@main.command()
@click.argument("name", type=click.Choice(EXPERIMENTS))
@click.option("--out", type=UserPath(path_type=Path), help="Output folder.  [default: runs/experiments/NAME]")
@click.option("--seeds", default="0,1,2", show_default=True, help="Training seeds, separated by commas.")
@click.option(
    "--only", multiple=True, metavar="PART", help="Run only this part of the experiment; may be repeated."
)
def experiment(name: str, out: Path | None, seeds: str, only: tuple[str, ...]) -> None:
    """Run a whole experiment, from training to verdicts; run it again to continue.

    findings: the paper's claims on the embedded base; real: claims and remedies on real bases; rl: DFT beside
    RL; tasks: multiple choice; lab: every objective.

    Example: dft-lora experiment findings
    """
    numbers = [number.strip() for number in seeds.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise RequestError(f"--seeds {seeds!r}: give distinct whole numbers, such as 0,1,2")
    from .experiments import run_experiment

    try:
        for line in run_experiment(
            name, out or Path("runs/experiments", name), [int(n) for n in numbers], only
        ):
            click.echo(line)
    except Interrupted as stop:
        raise stop.and_then(CONTINUES) from None


@main.command()
@click.argument("recipe")
@set_option("data.source=codebook")
@click.option(
    "--examples", default=256, show_default=True, type=click.IntRange(1), help="Number of examples to score."
)
@json_option
def diagnose(recipe: str, changes: tuple[str, ...], examples: int, as_json: bool) -> None:
    """Check before training how probable your solutions are under the base, and which objective fits.

    Example: dft-lora diagnose tiny_dft --set data.source=codebook
    """
    chosen = load_recipe(recipe, changes)
    from .evaluation.diagnosis import diagnose as run
    from .evaluation.diagnosis import diagnosis_text

    found = run(chosen, examples)
    click.echo(json.dumps(found, indent=1) if as_json else diagnosis_text(found))


@main.command()
@click.argument("run_dirs", nargs=-1, metavar="[RUN_DIR]...", type=UserPath())
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="GRADIO_SERVER_NAME",
    help="Address to listen on.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    envvar="GRADIO_SERVER_PORT",
    help="Port.  [default: the first free one from 7860]",
)
@click.option("--share", is_flag=True, help="Make a public link through Gradio's servers.")
@click.option("--auth", is_flag=True, help="Require a login; set DFT_LORA_USER and DFT_LORA_PASSWORD.")
@click.option(
    "--results-only",
    is_flag=True,
    envvar="DFT_LORA_RESULTS_ONLY",
    help="Show recorded results without loading a model.",
)
@click.option(
    "--public",
    is_flag=True,
    envvar="DFT_LORA_PUBLIC",
    help="Visitors can neither train nor upload. Implied on a Space, and by --share without --auth.",
)
@click.option(
    "--votes",
    default="runs/votes.jsonl",
    show_default=True,
    type=UserPath(path_type=Path),
    help="File that stores blind votes.",
)
def app(run_dirs, **options) -> None:
    """Open the page: compare the runs' answers side by side, token by token.

    Without RUN_DIR it shows the runs of make real, or else of dft-lora demo, or else the shipped ones.

    Example: dft-lora app runs/demo/base runs/demo/sft runs/demo/dft
    """
    from .ui.server import serve

    serve(run_dirs, **options)


@main.command()
@click.argument("run_dir", type=UserPath())
@click.option("--base", is_flag=True, help="Show the untouched base's answers beside the run's.")
@click.option("--system", metavar="TEXT", help="A system turn at the start of the conversation.")
@click.option("--temperature", default=0.0, show_default=True, help="Sampling temperature; 0 is greedy.")
@click.option(
    "--max-new-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(1),
    help="The longest answer.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, SEEDS - 1), help="Seed for sampling."
)
def chat(run_dir: str, temperature: float, **options) -> None:
    """Talk to a run in the terminal.

    Each line is a message; /new starts over. Ctrl-C stops an answer, Ctrl-D ends. Lines from a pipe are
    answered in order.

    Example: dft-lora chat runs/tiny_dft --base
    """
    if not 0 <= temperature < float("inf"):
        raise RequestError(f"--temperature: {temperature}; give 0 (greedy) or more")
    from .chat import chat as run
    from .runs.folder import open_runs

    run(open_runs([run_dir])[0], temperature=temperature, **options)


@main.group(cls=Commands)
def recipes() -> None:
    """The recipes that come with the package."""


@recipes.command("list")
def list_recipes() -> None:
    """List the recipes, each with its first line; those to start from first.

    Example: dft-lora recipes list
    """
    for name, path in sorted(shipped_recipes().items(), key=lambda item: not item[0].startswith("lora_")):
        click.echo(f"{name:28} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
    click.echo(
        "\nWhich objective? `dft-lora diagnose RECIPE` estimates whether SFT or DFT suits your base and\n"
        "data. lora_power is a compromise between the two (docs/lab.md). On two small real bases nothing\n"
        "was reliably better than SFT (docs/real.md)."
    )


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe.

    Example: dft-lora recipes show tiny_dft
    """
    click.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@recipes.command()
@click.argument("name")
@click.argument("path", type=UserPath())
def copy(name: str, path: str) -> None:
    """Copy a recipe to PATH, to edit it there.

    Example: dft-lora recipes copy tiny_dft mine.yaml
    """
    source, target = _shipped(name), Path(path)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise RequestError(f"{target} exists; name another file")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise RequestError(f"cannot write {target}: {error.strerror}") from None
    click.echo(target)


@main.command()
@click.argument("recipe")
@set_option("train.micro_batch_size=8")
@click.option(
    "--gpu-memory", metavar="SIZE", help="Fit a GPU of this size, such as 16GB, on this machine or another."
)
@json_option
def preflight(recipe: str, changes: tuple[str, ...], gpu_memory: str | None, as_json: bool) -> None:
    """Measure the memory and time of a run in advance, and propose settings that fit.

    Example: dft-lora preflight qwen2.5-math-1.5b_dft --gpu-memory 16GB
    """
    chosen = load_recipe(recipe, changes)
    from .training.preflight import preflight as run
    from .training.preflight import preflight_table, read_size

    found = run(chosen, None if gpu_memory is None else read_size(gpu_memory))
    click.echo(json.dumps(found, indent=1) if as_json else preflight_table(found))


run_argument = click.argument("run_dir", type=UserPath())


@main.command()
@run_argument
@click.argument("out", type=UserPath())
@click.option(
    "--dtype",
    default="bfloat16",
    type=click.Choice(["bfloat16", "float16"]),
    show_default=True,
    help="Data type of the merged weights.",
)
@json_option
def merge(run_dir: str, out: str, dtype: str, as_json: bool) -> None:
    """Merge a run's adapter into the 16-bit base, and print how much the logits change.

    Example: dft-lora merge runs/tiny_dft merged/tiny_dft
    """
    from .export import merge as run
    from .runs.folder import open_runs

    drift = run(open_runs([run_dir])[0], Path(out), dtype)
    if as_json:
        click.echo(json.dumps(drift, indent=1))
        return
    for against, far in drift.items():
        click.echo(f"{against.replace('_', ' '):14} " + ", ".join(f"{k} {v:.3g}" for k, v in far.items()))


@main.command()
@run_argument
@click.argument("repository")
@click.option(
    "--merged",
    type=UserPath(exists=True, file_okay=False),
    help="Push this merged model instead of the adapter.",
)
@click.option("--public", is_flag=True, help="Make the repository public; it is private by default.")
def push(run_dir: str, repository: str, merged: str | None, public: bool) -> None:
    """Upload a run's adapter to the Hub, with a model card generated from its metrics.

    Example: dft-lora push runs/tiny_dft me/tiny-dft
    """
    from .export import push as run
    from .runs.folder import RunFolder

    click.echo(run(RunFolder.open(run_dir), repository, Path(merged) if merged else None, private=not public))


@main.command()
@run_argument
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(["vllm", "llama.cpp", "gguf", "ollama"]),
    help="What to export for.",
)
@click.option("--merged", type=UserPath(), help="The merged model, for gguf and ollama.")
@click.option(
    "--out", type=UserPath(), help="The GGUF file.  [default: in RUN_DIR or beside the merged model]"
)
@click.option("--quantize", metavar="TYPE", help="Quantize with llama-quantize, for example to Q4_K_M.")
@click.option("--llama-cpp", type=UserPath(), help="A checkout of llama.cpp.  [default: LLAMA_CPP]")
def export(run_dir, target, merged, out, quantize, llama_cpp) -> None:
    """Export a run: a vLLM command, a llama.cpp adapter, a GGUF file, or a model in Ollama.

    Example: dft-lora export runs/tiny_dft --to vllm
    """
    from .export import to_gguf, to_llama_cpp, to_ollama, vllm_command
    from .runs.folder import open_runs

    run = open_runs([run_dir])[0]
    given = {"--merged": merged, "--out": out, "--quantize": quantize, "--llama-cpp": llama_cpp}
    used = {"vllm": [], "llama.cpp": ["--out"]}.get(target, list(given))
    if unused := [option for option, value in given.items() if value is not None and option not in used]:
        raise RequestError(f"{', '.join(unused)}: not used by --to {target}; leave it out")
    if target == "vllm":
        from .model.load import resolve

        click.echo(vllm_command(run, resolve(run.recipe().model)))
        return
    if target == "llama.cpp":
        adapter, command = to_llama_cpp(run, Path(out) if out else None)
        click.echo(command, err=True)
        click.echo(adapter)
        return
    if merged is None:
        raise RequestError(f"--merged: {target} needs a merged model; dft-lora merge {run_dir} OUT makes one")
    file = Path(out) if out else Path(merged) / f"{run.full_name}.gguf"
    if file.exists():
        raise RequestError(f"--out: {file} exists; name another file")
    file = to_gguf(Path(merged), file, Path(llama_cpp) if llama_cpp else None, quantize)
    if target == "ollama":
        to_ollama(file, run.full_name.lower())
    click.echo(file)


@main.command()
@click.argument("recipe", required=False)
@set_option("data.source=mine.jsonl")
@json_option
def doctor(recipe: str | None, changes: tuple[str, ...], as_json: bool) -> None:
    """Show versions, device, dtype rules and missing packages; with RECIPE, problems in its data.

    Example: dft-lora doctor tiny_dft
    """
    from .environment import data_report, machine_report

    if recipe is None and changes:
        raise RequestError("--set needs a RECIPE to change")
    found = machine_report() if recipe is None else data_report(load_recipe(recipe, changes))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        for part, value in found.items():
            click.echo(f"{part:34} {value}")


def _shipped(name: str) -> Path:
    known = shipped_recipes()
    if name not in known:
        raise RequestError(
            f"no shipped recipe {name!r}{did_you_mean(name, known)}; see dft-lora recipes list"
        )
    return known[name]


def show_report(report: dict[str, Any], as_json: bool) -> None:
    from .evaluation.text import report_table

    click.echo(json.dumps(report, indent=1) if as_json else report_table(report))


if __name__ == "__main__":
    sys.exit(main())
