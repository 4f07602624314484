"""What several test modules use."""

import socket
import time
from collections.abc import Callable
from typing import Any

# Sampling at random from the whole vocabulary hardly ever meets the end-of-sequence token.
LONG: dict[str, Any] = {"max_new_tokens": 900, "temperature": 2.0, "seed": 1, "stop": [], "without_adapter": True}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def eventually(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Wait for a condition to come true."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "the condition did not come true"
        time.sleep(0.05)
