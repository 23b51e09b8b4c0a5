"""One stage in a process of its own: `python -m dft_lora.bench.gpu.child STAGE FOLDER DEVICE SMALL`.

It prints one line of JSON for each result, [name, value]; everything else that is printed goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import MissingPart


def machine(device: str) -> Iterator[tuple[str, Any]]:
    """The device's name and what torch says about it."""
    import torch

    from ...model.hardware import choose

    if device == "cpu":
        yield "name", f"CPU rehearsal {choose(device=torch.device('cpu')).name}"
        return
    facts = torch.cuda.get_device_properties(0)
    yield "name", facts.name
    yield "capability", f"{facts.major}.{facts.minor}"
    yield "memory_gb", round(facts.total_memory / 2**30, 1)
    yield "multiprocessors", facts.multi_processor_count
    yield "cuda", torch.version.cuda


def results(name: str, folder: Path, device: str, small: bool) -> Iterator[tuple[str, Any]]:
    if name == "machine":
        yield from machine(device)
        return
    import torch

    from .lab import Lab
    from .stages import STAGES

    (stage,) = (stage for stage in STAGES if stage.name == name)
    chosen = torch.device(device, 0) if device == "cuda" else torch.device(device)
    yield from stage.work(Lab(folder, chosen, small))


def main(name: str, folder: str, device: str, small: str) -> None:
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print is not a result

        def put(*line: Any) -> None:
            print(json.dumps(line), file=out, flush=True)

        try:
            for result in results(name, Path(folder), device, bool(int(small))):
                put(*result)
        except MissingPart as missing:
            put("missing", str(missing))
        except Exception as error:
            from .lab import one_line

            traceback.print_exc()
            put("error", one_line(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
