"""What the server of `fault_runs.py` has behind it when it forks: heavy imports, and tables built once."""

import gc
from importlib import import_module

HEAVY = ["torch", "transformers.models.qwen2.modeling_qwen2", "transformers.models.llama.modeling_llama"]
HEAVY += ["peft", "bitsandbytes", "accelerate", "tqdm", "matplotlib.figure"]
HEAVY += ["matplotlib.backends.backend_agg"]

gc.disable()
for name in [*HEAVY, "safetensors.torch", "dft_lora.cli", "dft_lora.training.loop"]:
    import_module(name)
# A thousand regular expressions, which transformers compiles when a process first loads a model.
import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
gc.enable()
gc.freeze()
