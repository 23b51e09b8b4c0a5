"""Whether the Hugging Face Hub can be reached: found out once per process, in a few seconds.

The Hub's own clients retry each name for half a minute where there is no network. Here one connection
attempt decides, and from then on they are asked for what lies in the local cache.
"""

from __future__ import annotations

import os
import socket
import threading
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

ENDPOINT = "https://huggingface.co"
TIMEOUT = 5.0
"""Seconds for the name look-up and the connection together."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
FOR_CLIENTS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
"""Read by the clients when they are imported, which is after this."""


@cache
def unreachable() -> str | None:
    """Why the Hub cannot be asked, as a clause of a sentence; None where it can.

    With a reason, the clients that are imported later use the local cache alone.
    """
    for name in OFFLINE:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"the Hub is not asked ({name} is set)"
    endpoint = os.environ.get("HF_ENDPOINT") or ENDPOINT
    why = _no_connection(*_address(endpoint))
    if why is None:
        return None
    os.environ.update(dict.fromkeys(FOR_CLIENTS, "1"))
    return f"the Hub cannot be reached ({endpoint}: {why})"


def _address(endpoint: str) -> tuple[str, int]:
    """Host and port of the endpoint, or of the proxy that leads there."""
    url = urlsplit(endpoint)
    proxy = getproxies().get(url.scheme)
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def _no_connection(host: str, port: int) -> str | None:
    """Why no connection could be made; in a thread, for a name look-up has no time limit of its own."""
    outcome: list[str | None] = []

    def attempt() -> None:
        try:
            socket.create_connection((host, port), TIMEOUT).close()
            outcome.append(None)
        except (OSError, UnicodeError) as error:
            outcome.append(getattr(error, "strerror", None) or str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return outcome[0] if outcome else f"no answer within {TIMEOUT:g} s"
