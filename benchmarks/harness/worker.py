"""Workers: processes that answer JSON messages, one per line. Most run an engine.

A worker is a module that ends in

    if __name__ == "__main__":
        serve(start)

and is used by

    with WorkerProcess("benchmarks.engine.worker", settings) as worker:
        reply = worker.ask({...})
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from benchmarks.harness.guard import guarded_process

Message = dict[str, Any]
Handle = Callable[[Message], Message]

_LOG_CHARS = 4000
# For the start, and for each reply.
_TIMEOUT_S = 600.0


class WorkerFailedError(RuntimeError):
    """A worker ended or took too long. Carries the end of its log."""


class WorkerProcess:
    """`python -m MODULE SETTINGS` with additions to the environment. Entering waits until the worker is ready.

    The worker and everything that it starts end with this process, even if SIGKILL ends it.
    """

    def __init__(self, module: str, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        self._module = module
        self._settings = settings
        self._environment = environment or {}
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(tempfile.NamedTemporaryFile(prefix="mtlora-worker-", suffix=".log"))
            self._process = stack.enter_context(
                guarded_process(
                    [sys.executable, "-m", self._module, json.dumps(self._settings)], text=True, stderr=self._log,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **self._environment},
                )
            )  # fmt: skip
            threading.Thread(target=self._read_lines, daemon=True).start()
            self._reply()
            self._end = stack.pop_all().close
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self._end()

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def ask(self, message: Mapping[str, Any]) -> Message:
        """The reply to a message. Raises WorkerFailedError."""
        assert self._process.stdin is not None
        # If the worker has ended, the reply raises with its log.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> Message:
        try:
            line = self._lines.get(timeout=_TIMEOUT_S)
        except queue.Empty:
            raise WorkerFailedError(f"{self._module}: no reply in {_TIMEOUT_S:g} s\n{self._log_end()}") from None
        if line is None:
            raise WorkerFailedError(f"{self._module}: ended with status {self._process.wait()}\n{self._log_end()}")
        return dict(json.loads(line))

    def _log_end(self) -> str:
        return Path(self._log.name).read_text(errors="replace")[-_LOG_CHARS:]

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def serve(start: Callable[[Message], Handle]) -> None:
    """Run a worker until stdin ends. `start` takes the settings and returns the function that answers a message.

    Stdout carries only replies; output of libraries goes to stderr.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    handle = start(json.loads(sys.argv[1]))
    print(json.dumps({}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(handle(json.loads(line))), file=replies, flush=True)
