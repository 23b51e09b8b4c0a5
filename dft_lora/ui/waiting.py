"""The page of a first start: a bar while the adapters that the page shows are trained.

It stands on the port of the page that follows and is gone before that one opens; the browser then reloads.
How far the training is, is read from the run folders: nothing in it knows that it is watched. What ends it
before its time is told on the bar's page too.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
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


def free_port(host: str, port: int | None) -> int:
    """The port to serve on: `port`, or the first free one of PORTS, said on stderr where that is not 7860.

    Raises RequestError where there is none: before a model is loaded, which may take minutes.
    """
    refused: OSError | None = None
    for candidate in [port] if port else PORTS:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host.strip("[]"), candidate), family=family).close()
        except OSError as error:
            refused = error
            if error.errno != errno.EADDRINUSE:
                break  # another port would not help
        else:
            if candidate != (port or PORTS[0]):
                print(f"port {PORTS[0]} is in use; the page will be at port {candidate}", file=sys.stderr)
            return candidate
    raise _cannot_serve(host, port, refused)


def _cannot_serve(host: str, port: int | None, error: OSError | None) -> RequestError:
    wanted = port or f"{PORTS[0]} to {PORTS[-1]}"
    if error and error.errno == errno.EADDRINUSE:
        return RequestError(f"--host, --port: {wanted} at {host} is in use; name another with --port")
    return RequestError(f"--host, --port: cannot serve at {host}, port {wanted} ({error})")


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

    port = free_port(host, port)
    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise _cannot_serve(host, port, error) from None
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
