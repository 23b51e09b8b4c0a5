"""A base that comes as a GGUF file, and an adapter that leaves as one. The only folder that knows the format.

llama.cpp's files hold the weights in blocks of its own, under its own names, with config and tokenizer as
metadata. Such a file is unpacked once into a folder of 16-bit safetensors in the cache, named by the file's
sha256; from there it is a base like any other. transformers reads GGUF too, but marks the model as quantized
(so that it can be neither trained nor saved), holds all of it in float32, and does not read all that a file
says: the head width of Qwen3, Llama 3's rope factors, the split of SmolLM's tokenizer.

    file.py        the format: metadata and tensors
    layouts.py     the architectures: LAYOUTS
    tokenizer.py   the tokenizers: SPLITS
    unpack.py      from a file to a folder in the cache
    adapter.py     from a peft adapter to a file
"""

from .adapter import write_adapter
from .file import FLOATS, GgufFile, Stored, read, weights
from .layouts import LAYOUTS, Layout, model_config
from .tokenizer import PROBE, SPLITS
from .unpack import VERSION, facts, folder_of, sha256, unpacked

__all__ = [
    "FLOATS",
    "LAYOUTS",
    "PROBE",
    "SPLITS",
    "VERSION",
    "GgufFile",
    "Layout",
    "Stored",
    "facts",
    "folder_of",
    "model_config",
    "read",
    "sha256",
    "unpacked",
    "weights",
    "write_adapter",
]
