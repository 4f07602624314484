"""This project's server, for a measurement."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.harness.guard import guarded
from server.cli.process import ServerProcess


@contextlib.contextmanager
def native_server(**settings: Any) -> Iterator[ServerProcess]:
    """A `ServerProcess` that is ready for requests and ends with this process, even if this process is killed."""
    began = time.monotonic()
    with ServerProcess(**settings, wait=False) as server, guarded(server.process):
        server.wait_ready()
        server.start_seconds = time.monotonic() - began
        yield server
