"""Export a trained adapter: merged model, Hub, vLLM, llama.cpp, Ollama, each with the tool made for it.

An adapter is merged into the 16-bit base. Merging into the 4-bit base would round each weight to 4 bits
again, which would lose much of what was learned.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .config import ModelConfig
from .errors import MissingPart, RequestError, RunError, one_line
from .evaluation.run_set import unchanged_base
from .hub import unreachable
from .runs.folder import RunFolder, new_folder, read_json, write_text

PROBES = 8


def refuse_unfinished(run: RunFolder) -> None:
    """Raises RequestError for a bare base, a run before its last step, and a checkpoint without figures; also
    where the weights of the run's base have changed."""
    if not (run.has_adapter and run.finished and "figures" in run.run()):
        raise RequestError(
            f"{run.path}: no adapter of a finished run; train it, or continue it with --resume"
        )
    unchanged_base([run], run.recipe().model)


def merge(run: RunFolder, out: Path, dtype: str = "bfloat16") -> dict[str, Any]:
    """Write base and adapter as one 16-bit model, with tokenizer and card, to the new folder `out`.

    Returns the drift: how far its logits are from those of the model as trained (over the base as the recipe
    holds it), and from those of the unmerged 16-bit model. Raises RequestError when `out` exists or cannot be
    written, or when there is no adapter.
    """
    refuse_unfinished(run)
    with new_folder(out, "OUT"):
        return _merge(run, out, dtype)


def _merge(run: RunFolder, out: Path, dtype: str) -> dict[str, Any]:
    import torch

    from .model.load import load_adapters, load_base, load_tokenizer

    config, cpu = run.recipe().model, torch.device("cpu")
    tokenizer = load_tokenizer(config)
    rows = probe_rows(tokenizer, run.run()["template"])

    def adapted(config: ModelConfig) -> Any:
        return load_adapters(load_base(config, cpu)[0], {"default": run.adapter})

    trained = logits_of(adapted(config), rows)
    model = adapted(config.model_copy(update={"quantization": "none", "dtype": dtype}))
    unmerged = logits_of(model, rows)
    model = model.merge_and_unload(safe_merge=True)
    merged = logits_of(model, rows)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    drift = {"from_training": difference(trained, merged), "from_unmerged": difference(unmerged, merged)}
    write_text(out / "README.md", card(run, merged=True, drift=drift))
    return drift


def probe_rows(tokenizer: Any, template: str) -> list[list[int]]:
    """Token ids of a few problems of the embedded task with their solutions, in the run's template."""
    from .data.templates import Renderer
    from .tasks import get_task

    renderer = Renderer(tokenizer, template)
    return [list(renderer.render(p).ids) for p in get_task("arithmetic").problems("train")[:PROBES]]


def logits_of(model: Any, rows: Sequence[Sequence[int]]) -> list[Any]:
    """The float32 logits [L, V] of each row, computed one row at a time."""
    import torch

    with torch.no_grad():
        return [model(input_ids=torch.tensor([list(row)])).logits[0].float() for row in rows]


def difference(before: Sequence[Any], after: Sequence[Any]) -> dict[str, float]:
    """The largest logit change, the mean KL(before || after) in nats, and how often the top token agrees."""
    import torch

    b_NV, a_NV = torch.cat(list(before)), torch.cat(list(after))
    logp_NV, logq_NV = b_NV.log_softmax(-1), a_NV.log_softmax(-1)
    return {
        "largest_logit_change": float((b_NV - a_NV).abs().max()),
        "mean_kl": float((logp_NV.exp() * (logp_NV - logq_NV)).sum(-1).mean()),
        "same_top1": float((b_NV.argmax(-1) == a_NV.argmax(-1)).float().mean()),
    }


def push(run: RunFolder, repository: str, merged: Path | None = None, private: bool = True) -> str:
    """Upload the adapter, or a merged model, with its card; returns the URL.

    Raises RequestError when the run has no adapter, RunError with the Hub's reason when the upload fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    if merged is None:
        refuse_unfinished(run)
    elif not (merged / "config.json").is_file():
        raise RequestError(f"--merged: {merged} holds no merged model; make one with dft-lora merge")
    try:
        validate_repo_id(repository)
        if why := unreachable():
            raise RunError(f"{repository} was not pushed: {why}; connect and push again")
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        if merged is not None:
            api.upload_folder(repo_id=repository, folder_path=merged)
        else:
            with tempfile.TemporaryDirectory() as folder:
                shutil.copytree(run.adapter, folder, dirs_exist_ok=True)
                write_text(Path(folder) / "README.md", card(run, repository=repository))
                api.upload_folder(repo_id=repository, folder_path=folder)
    except HFValidationError as error:
        raise RequestError(f"{repository!r} is not a repository name: {one_line(error)}") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise RunError(
            f"the Hub did not accept {repository}: {one_line(error)} (log in with hf auth login)"
        ) from None
    return str(address)


def card(
    run: RunFolder, merged: bool = False, drift: dict[str, Any] | None = None, repository: str | None = None
) -> str:
    """The model card, from run.json and, if the run was evaluated, report.json.

    `repository`: where it will be read; then the card names no folder of this machine.
    """
    from .loss import objective

    metadata, recipe = run.run(), run.recipe()
    base, name, held = recipe.model.name, run.full_name, recipe.model.quantization
    quantized = held != "none"
    over = f"a base in {held}" if quantized else "a base that was not quantized"
    header: dict[str, Any] = {
        "base_model": base,
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["dft", "dynamic-fine-tuning", "lora", *(["qlora"] if quantized and not merged else [])],
    }
    if recipe.data.source.count("/") == 1 and not Path(recipe.data.source).exists():
        header["datasets"] = [recipe.data.source]
    wanted, train, source = recipe.objective.name, recipe.train, recipe.data.source
    source = Path(source).name if "datasets" not in header else source
    formula = (type(objective(wanted)).__doc__ or "").splitlines()[0]
    numbers = "".join(f", {name} {value}" for name, value in recipe.objective.numbers.items())
    rows = "pairs" if objective(wanted).learns_from == "pairs" else "examples"
    made, last = metadata["provenance"], metadata["figures"]["last"]
    kind = "A LoRA adapter, merged into its 16-bit base." if merged else "A LoRA adapter; it needs its base."
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        f"`{base}` fine-tuned on `{source}` with the objective `{wanted}`{numbers}. {kind}",
        "## Use",
        *_usage(run, merged, repository),
        "## Evaluation",
        _results(run),
    ]
    if drift:
        far = drift["from_training"]
        lines += [
            f"The adapter was trained over {over} and merged into the 16-bit base. Compared with the model "
            f"as trained, the largest logit change is {far['largest_logit_change']:.3g}, the mean KL is "
            f"{far['mean_kl']:.2g} nats, and the most probable token is the same at "
            f"{far['same_top1']:.1%} of positions. The results above are those of the model as trained."
        ]
    lines += [
        "## Training",
        f"- Objective: `{wanted}`{numbers}: {formula}\n"
        f"- Adapter: r {recipe.adapter.r}, alpha {recipe.adapter.alpha:g}, over {over}\n"
        f"- Data: `{source}`, split `{recipe.data.split}`\n"
        f"- Steps: {last['step']} of {train.batch_size} {rows}, AdamW {train.learning_rate:g}, "
        f"{train.schedule}, seed {train.seed}; {metadata['figures']['seconds']:.0f} s on {made['device']} in "
        f"{made['dtype']}\n"
        f"- Last step: NLL {_figure(last['nll'])}, mean target probability "
        f"{_figure(last['mean_probability'])}",
        f"Made with dft-lora {made['versions']['dft-lora']} (commit {made['commit']}), "
        f"torch {made['versions']['torch']}, transformers {made['versions']['transformers']}, "
        f"{made['date'][:10]}.",
        "## Limits",
        f"What is not under Evaluation was not measured. Weaknesses and licence of `{base}` are inherited. "
        "Fine-tuning on a few solutions teaches a form and sharpens what the base half knows; expect no new "
        "facts from it, and check for overlap before comparing on a public test set.",
    ]
    return "\n\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    """A metric of `metrics.jsonl`, which has None for what is not finite."""
    return "not finite" if value is None else f"{value:.3f}"


def _usage(run: RunFolder, merged: bool, repository: str | None) -> list[str]:
    """The prompt that the model was trained with, in Python, and a command that serves it."""
    from .data.templates import TEMPLATES, own_template, shown

    recipe, name = run.recipe(), repository or run.full_name
    given = run.run()["template"]
    template = TEMPLATES.get(given) or own_template(given)
    if template.text is not None:
        system = ".replace('{system}', '')" if "{system}" in template.text else ""
        prompt = f"prompt = {template.text!r}{system}.replace('{{question}}', question)"
    else:
        asked = f"question + {template.suffix!r}" if template.suffix else "question"
        chat = "" if template.chat is None else f", chat_template={template.chat!r}"
        prompt = (
            f'turns = [{{"role": "user", "content": {asked}}}]\n'
            f"prompt = tokenizer.apply_chat_template(turns{chat}, tokenize=False, add_generation_prompt=True)"
        )
    bos = "" if template.text is not None else ", add_special_tokens=False"
    kind = "AutoModelForCausalLM" if merged else "AutoPeftModelForCausalLM"
    model = recipe.model
    at = f', revision="{model.revision}"' if model.revision and model.gguf is None else ""
    tokenizer = f'"{name}"' if merged else f'"{model.name}"{at}'
    python = (
        (f"from transformers import {kind}, AutoTokenizer\n" if merged else f"from peft import {kind}\n")
        + ("" if merged else "from transformers import AutoTokenizer\n")
        + f'\nmodel = {kind}.from_pretrained("{name}")  # this repository or folder\n'
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n"
        f'question = "What is 2 + 3?"\n{prompt}\n'
        f'ids = tokenizer(prompt, return_tensors="pt"{bos})\n'
        "answer = model.generate(**ids, max_new_tokens=256)[0, ids.input_ids.shape[1] :]\n"
        "print(tokenizer.decode(answer, skip_special_tokens=True))"
    )
    if recipe.adapter.dora and not merged:  # vLLM does not serve DoRA
        folder, whole = shlex.quote(name), shlex.quote(f"{name}-merged")
        command = f"dft-lora merge {folder} {whole} && vllm serve {whole}"
    else:
        command = f"vllm serve {shlex.quote(name)}" if merged else vllm_command(run, adapter=repository)
    lines = [f"Prompt template: {shown(given)}. Another prompt gives worse answers."]
    if "/" not in recipe.model.name and not merged:
        lines.append(f"`{recipe.model.name}` is a base of dft-lora: `dft-lora chat RUN_DIR` loads both.")
    else:
        lines.append(f"```python\n{python}\n```")
    return [*lines, f"```sh\n{command}\n```"]


def _results(run: RunFolder) -> str:
    reported = read_json(run.report_file)["runs"] if run.report_file.is_file() else {}
    runs = {name: r for name, r in reported.items() if r.get("adapter") == run.adapter_digest}
    if not runs:  # also if the report is on an adapter that has since been trained further
        return "Not evaluated."
    lines = [
        "| run | task | sampled accuracy | 95 % interval | greedy | problems |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {task} | {r['avg']:.1%} | {r['ci95'][0]:.1%} to {r['ci95'][1]:.1%} | "
        f"{r['greedy']:.1%} | {r['problems']} |"
        for name, run_ in runs.items()
        for task, r in run_["tasks"].items()
    ]
    texts = [(name, task, r) for name, run_ in runs.items() for task, r in run_.get("texts", {}).items()]
    if texts:
        lines = lines if len(lines) > 2 else []
        lines += ["", "| run | text | NLL | 95 % interval | token accuracy |", "|---|---|---:|---:|---:|"]
        lines += [
            f"| {name} | {task} | {r['nll']:.3f} | {r['nll_ci95'][0]:.3f} to {r['nll_ci95'][1]:.3f} | "
            f"{r['token_accuracy']:.1%} |"
            for name, task, r in texts
        ]
    return "\n".join(
        [*lines, "", "Intervals are over problems. Sampled accuracy is a mean, not the best of n."]
    )


def vllm_command(run: RunFolder, base: str | None = None, adapter: str | None = None) -> str:
    """The command that serves the adapter with vLLM, over `base` or else the recipe's base, in 16 bits.

    `adapter`: a repository to take the adapter from, not the run's folder.
    """
    from .model.vllm import lora_rank, vllm_rank

    refuse_unfinished(run)
    recipe, rank = run.recipe(), lora_rank([vllm_rank(run.adapter)])
    served, module = base or recipe.model.name, f"{run.full_name}={adapter or run.adapter}"
    at = recipe.model.revision if served == recipe.model.name else None
    return (
        f"vllm serve {shlex.quote(served)} {f'--revision {shlex.quote(at)} ' if at else ''}"
        f"--enable-lora --max-lora-rank {rank} "
        f"--lora-modules {shlex.quote(module)}"
    )


def to_llama_cpp(run: RunFolder, out: Path | None = None) -> tuple[Path, str]:
    """Write the adapter as a GGUF file for llama.cpp; returns the file and the command that loads it.

    Raises RequestError when there is no adapter, `out` exists, or llama.cpp does not support a part of it.
    """
    from .model.gguf import write_adapter
    from .model.load import gguf_file, load_model_config

    refuse_unfinished(run)
    out = out or run.path / f"{run.name}.adapter.gguf"
    if out.exists():
        raise RequestError(f"{out} exists; name another file with --out")
    model = run.recipe().model
    aside = out.with_name(f".{out.name}.new")
    try:
        write_adapter(run.adapter, load_model_config(model), aside)
        aside.rename(out)
    except OSError as error:
        raise RunError(f"{out} could not be written ({error.strerror or error})") from None
    finally:
        aside.unlink(missing_ok=True)
    return out, shlex.join(["llama-cli", "-m", str(gguf_file(model) or "BASE.gguf"), "--lora", str(out)])


def to_gguf(merged: Path, out: Path, llama_cpp: Path | None = None, quantize: str | None = None) -> Path:
    """Convert a merged model to a GGUF file with llama.cpp's converter; `quantize` is a type such as Q4_K_M.

    Raises MissingPart when llama.cpp is not found, RunError when one of its tools fails.
    """
    home = llama_cpp or (Path(os.environ["LLAMA_CPP"]) if "LLAMA_CPP" in os.environ else None)
    converter = home / "convert_hf_to_gguf.py" if home else None
    if home is None or converter is None or not converter.is_file():
        raise MissingPart(
            "convert_hf_to_gguf.py was not found: git clone https://github.com/ggml-org/llama.cpp, "
            "install its requirements.txt with pip, and name the folder with --llama-cpp or LLAMA_CPP"
        )
    if not (merged / "config.json").is_file():
        raise RequestError(f"{merged}: no merged model; make one with dft-lora merge RUN_DIR {merged}")
    convert = (sys.executable, str(converter), str(merged), "--outtype", "bf16", "--outfile")
    if quantize is None:
        _call(*convert, str(out))
        return out
    tool = shutil.which("llama-quantize") or shutil.which("llama-quantize", path=str(home / "build/bin"))
    if tool is None:
        raise MissingPart(f"llama-quantize was not found: build llama.cpp in {home}, or put it on PATH")
    whole = out.with_suffix(".bf16.gguf")
    if whole.exists():
        raise RequestError(f"{whole} exists; name another file with --out")
    try:
        _call(*convert, str(whole))
        _call(tool, str(whole), str(out), quantize)
    finally:
        whole.unlink(missing_ok=True)
    return out


def to_ollama(gguf: Path, name: str) -> None:
    """Register a GGUF file with Ollama. Raises MissingPart when Ollama is not installed."""
    if shutil.which("ollama") is None:
        raise MissingPart("ollama is not installed: https://ollama.com/download")
    modelfile = gguf.with_suffix(".Modelfile")
    write_text(modelfile, f"FROM {gguf.resolve()}\n")
    _call("ollama", "create", name, "-f", str(modelfile))


def _call(*command: str) -> None:
    """Run a tool with its output on stderr. Raises RunError naming the tool when it fails."""
    with _naming(command[0]):
        code = subprocess.run(command, stdout=sys.stderr.fileno()).returncode
    if code:
        raise RunError(f"{' '.join(command)} failed with exit code {code}")


@contextmanager
def _naming(tool: str) -> Iterator[None]:
    """Turn an OSError at the start of a tool into a RunError that names it."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{tool} could not be started: {error.strerror}") from None
