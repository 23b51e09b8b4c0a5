"""The driver: each stage in a process of its own, its results written down as soon as they are there.

A stage that fails, hangs or takes the CUDA context with it costs only itself: its error is recorded in one
line, and the next stage begins in a fresh process. What the stages print goes to `gpu.log`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ...errors import RunError
from ...runs.folder import write_json
from ...runs.provenance import certificate, versions

PEERS = ("triton", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn", "unsloth")
LEAST = 5
"""Seconds that a stage must have left to be begun."""
NO_TIME = {"missing": "no time left"}
Say = Callable[[str], None]


def run(out: Path, device: str, small: bool, minutes: float, say: Say, stages: Sequence[str] = ()) -> Path:
    """Run the stages, or those named; returns the JSON file in `out`, named after the device."""
    from .stages import STAGES

    ends = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="gpu-", dir=out, ignore_cleanup_errors=True) as folder,
        (out / "gpu.log").open("w") as log,
    ):
        machine = _machine(folder, device, log)
        path = out / f"{slug(machine['name'])}.json"
        result: dict[str, Any] = {
            "kind": "gpu",
            "small": small,
            "minutes": minutes,
            "machine": machine,
            "stages": {},
            "provenance": certificate(peers=versions(PEERS)),
        }
        wanted = stages or [stage.name for stage in STAGES if stage.rehearsed or not small]
        for stage in (stage for stage in STAGES if stage.name in wanted):
            record = result["stages"][stage.name] = {"seconds": 0.0, "results": {}}

            def keep(name: str, value: Any, results=record["results"]) -> None:
                results[name] = value
                write_json(path, result)

            left = ends - time.monotonic()
            share = stage.seconds * minutes / 10 if device == "cuda" else left
            command = stage_command(stage.name, folder, device, str(int(small)))
            started = time.monotonic()
            record |= child(command, min(left, share), log, keep) if left > LEAST else NO_TIME
            record["seconds"] = round(time.monotonic() - started, 1)
            write_json(path, result)
            why = next((f": {record[key]}" for key in ("error", "missing") if key in record), "")
            say(f"{stage.name:32} {record['seconds']:6.1f} s  {len(record['results'])} results{why}")
    return path


def stage_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.child", *arguments]


def child(
    command: Sequence[str], seconds: float, log: IO[str], keep: Callable[[str, Any], None]
) -> dict[str, str]:
    """Run a stage; hands each result to `keep`. Returns why it did not end by itself, or nothing."""
    ended: dict[str, str] = {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)

    def stop() -> None:
        ended["error"] = f"stopped after {seconds:.0f} s, its share of the time"
        _kill(process)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        for line in process.stdout or ():
            try:
                name, value = json.loads(line)
            except ValueError:  # cut off when the stage was stopped
                break
            if name in ("error", "missing"):
                ended.setdefault(name, value)
            else:
                keep(name, value)
        code = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    if code and not ended:
        ended["error"] = f"died of signal {-code}" if code < 0 else f"ended with code {code} (see gpu.log)"
    return ended


def _kill(process: subprocess.Popen) -> None:
    """A stage with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _machine(folder: str, device: str, log: IO[str]) -> dict[str, Any]:
    """What the device is; asked in a process of its own, so that this one takes no memory of the GPU."""
    found: dict[str, Any] = {}
    end = child(stage_command("machine", folder, device, "0"), 300, log, found.__setitem__)
    if end:
        raise RunError(f"the device could not be asked: {end['error']}")
    return found


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
