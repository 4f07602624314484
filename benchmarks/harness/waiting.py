"""Waiting for a condition."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], timeout_s: float, *, every_s: float = 0.02) -> None:
    """Return once `condition()` is true. Raises TimeoutError."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not true after {timeout_s:g} s")
        time.sleep(every_s)
