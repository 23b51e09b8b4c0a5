"""The page of a first start: a bar while the adapters that the page shows are trained.

It stands on the port of the page that follows and is gone before that one opens; the browser then reloads.
How far the training is, is read from the run folders: nothing in it knows that it is watched. What ends it
before its time is told on the bar's page too.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..errors import RequestError
from ..runs.folder import RunFolder

PAGE = Path(__file__).with_name("waiting.html")
PORTS = range(7860, 7960)  # as Gradio chooses: the first one that is free
LINGER = 2.0  # seconds that a failure stands there: the bar looks twice a second


def progress(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Optimizer steps done and in all over the runs of `recipes`, one after the other; and in words."""
    done, total, seconds = 0, 0, 0.0
    said = "Opening the page"
    for recipe in reversed(recipes):
        steps, times = recipe.train.max_steps, _step_seconds(RunFolder(recipe.output_dir).metrics_file)
        done, total, seconds = done + len(times), total + steps, seconds + sum(times)
        if len(times) < steps:
            where = f"step {len(times)} of {steps}" if times else "loading the base"
            said = f"{recipe.name}: {where}"
    if 0 < done < total:
        said += f", about {seconds / done * (total - done):.0f} s left"
    return {"done": done, "total": total, "said": said}


def _step_seconds(file: Path) -> list[float]:
    """Seconds of every step that is logged whole: the last line may be half written."""
    if not file.is_file():
        return []
    return [json.loads(line)["seconds"] for line in file.read_bytes().rpartition(b"\n")[0].splitlines()]


@contextmanager
def waiting(recipes: Sequence[Recipe], host: str, port: int | None) -> Iterator[int]:
    """Serve the bar within, or what failed there; yields the port.

    Raises RequestError where the address cannot be used.
    """
    failed = ""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/progress":
                self.reply(json.dumps(progress(recipes) | {"failed": failed}).encode(), "application/json")
            else:
                self.reply(PAGE.read_bytes(), "text/html; charset=utf-8")

        def reply(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.send_header("cache-control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """The terminal belongs to the training's own bar."""

    server = _listen(host, [port] if port else PORTS, Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    except Exception as error:
        failed = str(error) or type(error).__name__
        time.sleep(LINGER)
        raise
    finally:
        server.shutdown()
        server.server_close()


def _listen(host: str, ports: Sequence[int], handler: type) -> ThreadingHTTPServer:
    refused: OSError | None = None
    for port in ports:
        try:
            return ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            refused = error
    raise RequestError(f"--host, --port: cannot serve there ({refused})")
