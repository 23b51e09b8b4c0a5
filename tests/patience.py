"""How long a test waits. A deadline only ends a test that hangs; how busy a machine is decides no verdict."""

import time
from collections.abc import Callable

HANG = 1200  # seconds; below the half hour after which gloo gives up by itself


def wait_for(condition: Callable[[], object], pause: float = 0.03) -> None:
    """Until `condition()` holds."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, f"hangs: {HANG} s without {condition}"
        time.sleep(pause)
