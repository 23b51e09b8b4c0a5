"""Serve the page: request limits, browser policy, and login."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..runs.folder import RunFolder, open_runs
from .views import MAX_COLUMNS

if TYPE_CHECKING:
    import gradio as gr

    from .session import Session
    from .votes import Ballot
    from .workshop import Workshop

HERE = Path(__file__).parent
PORTS = range(7860, 7960)  # as Gradio chooses: the first one that is free
MAX_BODY = 256 * 1024  # bytes per request; a comparison's own state is far smaller
UPLOAD = "/upload"  # the end of the one path that may be sent more, where visitors may train
MULTIPART = 4096  # bytes around an uploaded file
DRAINED = 16 * 1024 * 1024  # bytes of a refused body that are read, so that the client reads the answer
MAX_WAITING = 64  # events in the queue; the next one is refused
POLICY = (  # whatever the page shows, it talks only to its own server
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "frame-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware: refuses an upload where there is nothing to upload for (403), and a body that is too
    long (413) or of unknown length (411), before it is parsed; adds the content security policy to every
    response.
    """

    def __init__(self, app, most_uploaded: int = 0):
        self.app, self.most_uploaded = app, most_uploaded

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        uploads = scope["path"].rstrip("/").endswith(UPLOAD)
        most = self.most_uploaded + MULTIPART if uploads else MAX_BODY
        status = self._refusal(dict(scope["headers"]), most)
        if uploads and not self.most_uploaded:
            status = 403
        if status is None:
            await self.app(scope, receive, send_guarded)
            return
        await _drain(receive)
        detail = f"a request must state its length, at most {most} bytes"
        if status == 403:
            detail = "this page takes no uploads"
        body = f'{{"detail":"{detail}"}}'.encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send_guarded({"type": "http.response.start", "status": status, "headers": headers})
        await send_guarded({"type": "http.response.body", "body": body})

    @staticmethod
    def _refusal(headers: dict[bytes, bytes], most: int = MAX_BODY) -> int | None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            return 413
        return 411 if b"transfer-encoding" in headers else None


async def _drain(receive) -> None:
    """Read a refused body and drop it: a client that is still sending would not read the answer."""
    passed, more = 0, True
    while more and passed < DRAINED:
        message = await receive()
        passed += len(message.get("body", b""))
        more = message.get("more_body", False)


def credentials() -> tuple[str, str]:
    """The page's user and password, from DFT_LORA_USER and DFT_LORA_PASSWORD.

    Raises RequestError when one of them is not set.
    """
    names = ("DFT_LORA_USER", "DFT_LORA_PASSWORD")
    user, password = (os.environ.get(name, "") for name in names)
    if not user or not password:
        raise RequestError(f"--auth: set {' and '.join(name for name in names if not os.environ.get(name))}")
    return user, password


def default_runs(home: Path = Path("runs")) -> list[RunFolder]:
    """The runs of `make real` or of the demo below `home`, or the ones that come with the package."""
    from ..experiments.demo import RUNS, runs
    from ..experiments.shipped import shipped_runs

    for made in (home / "real", home / "demo"):
        if RunFolder(made / RUNS[-1]).finished:
            return runs(made)
    return shipped_runs()


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


def serve(
    run_dirs: Sequence[str | Path] = (),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: bool = False,
    results_only: bool = False,
    public: bool = False,
    votes: Path = Path("runs/votes.jsonl"),
) -> None:
    """Load the runs and serve their page until it is interrupted; without `run_dirs`, `default_runs`.

    By default it listens on this machine only, makes no public link and sends no statistics. Visitors of a
    `public` page can neither train nor upload; a Space and a shared page without login are public. Raises
    RequestError for a wrong request, before a model is loaded.
    """
    public = public or (share and not auth) or "SPACE_ID" in os.environ
    login = credentials() if auth else None
    folders = open_runs(run_dirs) or default_runs()
    if len(folders) > MAX_COLUMNS:
        raise RequestError(f"RUN_DIR: {len(folders)} runs; a page shows 1 to {MAX_COLUMNS}")
    port = free_port(host, port)
    session, ballot = (None, None) if results_only else _open(folders, votes)
    workshop = None if results_only or public else _workshop()
    launch(folders, session, ballot, workshop, host=host, port=port, share=share, login=login).block_thread()


def _workshop() -> Workshop:
    from .workshop import Workshop

    return Workshop()


def _open(folders: Sequence[RunFolder], votes: Path) -> tuple[Session, Ballot]:
    from .session import Session
    from .votes import Ballot

    session = Session(folders)
    return session, Ballot(votes, session.identities)


def launch(
    folders: Sequence[RunFolder],
    session: Session | None,
    ballot: Ballot | None,
    workshop: Workshop | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    login: tuple[str, str] | None = None,
    max_waiting: int = MAX_WAITING,
) -> gr.Blocks:
    """Serve a page in the background; the default port is 7860, or the next free one.

    Raises RequestError when the address cannot be used.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from starlette.middleware import Middleware

    from .page import build
    from .theme import THEME
    from .workshop import MAX_UPLOAD

    page = build(folders, session, ballot, workshop).queue(max_size=max_waiting)
    most_uploaded = MAX_UPLOAD if workshop else 0
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=login,
            theme=THEME,
            css=(HERE / "style.css").read_text(encoding="utf-8"),
            js=(HERE / "page.js").read_text(encoding="utf-8"),
            app_kwargs={"middleware": [Middleware(Guard, most_uploaded)]},
            max_file_size=most_uploaded or MAX_BODY,
            footer_links=["api", "settings"],
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
            quiet=not share,  # Gradio's own lines name its option, not ours
        )
    except OSError as error:
        raise RequestError(f"--host, --port: cannot serve there ({error})") from None
    if not share:
        print(f"The page is at {page.local_url} (--share makes a public link).", file=sys.stderr, flush=True)
    return page
