"""A stand-in for the Hub: it serves a model, makes repositories, takes commits of small and large files."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """What was asked of it. `files` are those of the last commit by path; `refuses` answers 403 to a path.

    `commits` are folders with the files of a model, by commit; the last one is `main`.
    """

    def __init__(self):
        self.commits: dict[str, Path] = {}
        self.asked: list[str] = []
        self.created: dict = {}
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.refuses = "nothing"
        self.address = ""

    def file(self, path: str) -> tuple[int, dict[str, str], bytes] | None:
        """Status, headers and content of a model's file; None for another path."""
        if not (asked := re.fullmatch(r"/[\w-]+/[\w-]+/resolve/(\w+)/([\w.]+)", path)):
            return None
        commit = list(self.commits)[-1] if asked[1] == "main" else asked[1]
        file = self.commits.get(commit, Path("nowhere")) / asked[2]
        if not file.is_file():
            return 404, {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound"}, b""
        content = file.read_bytes()
        return 200, {"X-Repo-Commit": commit, "ETag": hashlib.sha256(content).hexdigest()}, content

    def reply(self, path: str, body: bytes) -> tuple[int, dict]:
        if self.refuses in path:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.address}/{self.created['organization']}/{self.created['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            wanted = json.loads(body)["files"]
            for file in wanted:
                file["uploadMode"] = "lfs" if file["path"].endswith(".safetensors") else "regular"
                file["shouldIgnore"] = False
            return 200, {"files": wanted}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.address}/large/{one['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.large[value["oid"]]
            return 200, {"success": True, "commitUrl": f"{self.address}/me/x/commit/0", "commitOid": "0" * 40}
        return 404, {"error": f"the stand-in has no {path}"}


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A Hub at `address`, on this machine."""
    it = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self.chunk, b""))
            else:
                body = self.rfile.read(length)
            path = self.path.partition("?")[0]
            it.asked.append(f"{self.command} {path}")
            it.tokens.add(self.headers.get("Authorization"))
            if (found := it.file(path)) is not None:
                status, headers, said = found
            else:
                status, value = it.reply(path, body)
                headers, said = {"Content-Type": "application/json"}, json.dumps(value).encode()
            self.send_response(status)
            for name, text in (headers | {"Content-Length": str(len(said))}).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(said)

        def chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            data = self.rfile.read(size)
            self.rfile.readline()
            return data

        do_GET = do_POST = do_PUT = do_HEAD = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    it.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield it
    finally:
        server.shutdown()
        server.server_close()
