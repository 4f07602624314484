"""Runs a server in a child process, for demos, tests and benchmarks."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from mtlora.client import OPEN, Access, Client

_READY = re.compile(r"serving on (?P<address>\S+), metrics on (?P<metrics>\S+), (?P<tasks>\d+) tasks")


def exit_on_sigterm() -> None:
    """Make SIGTERM end this program as Ctrl-C does: it stops its servers and removes its folders."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class ServerFailedError(RuntimeError):
    """The server ended before it was ready, or took too long; the message contains the end of its log."""


class ServerProcess:
    """`with ServerProcess(adapters=folder) as server:` starts a server on free loopback ports and waits for it.

    Keyword arguments are the server's settings. Leaving the block stops the server with SIGTERM.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        timeout: float = 180.0,
        wait: bool = True,
        **settings: Any,
    ) -> None:
        settings = {"port": 0, "metrics_port": 0} | settings
        self._command = [sys.executable, "-m", "server", "serve", *flags(settings), *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self._timeout = timeout
        self._wait = wait
        self._log: IO[bytes] = tempfile.NamedTemporaryFile(prefix="mtlora-server-", suffix=".log")  # noqa: SIM115
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.address = ""
        self.metrics = ""
        self.num_tasks = 0
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        began = time.monotonic()
        # The server gets its own process group, so that Ctrl-C for the parent does not reach it and `kill` reaches all
        # of its processes. It gets no session of its own: Linux schedules sessions as groups (autogroups), and beside
        # another session's busy engine the import of PyTorch was seen to wait for minutes.
        self.process = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log,
            text=True, process_group=0,
        )  # fmt: skip
        threading.Thread(target=self._read_stdout, daemon=True).start()
        if self._wait:
            try:
                self.wait_ready()
            except BaseException:
                self.kill()
                raise
            self.start_seconds = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._log.close()

    def wait_ready(self) -> None:
        """Wait for the ready line. Raises ServerFailedError."""
        until = time.monotonic() + self._timeout
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise ServerFailedError(f"not ready after {self._timeout:g} s:\n{self.log()[-4000:]}") from None
            if line is None:
                raise ServerFailedError(f"exit status {self.process.wait()}:\n{self.log()[-4000:]}")
            if found := _READY.search(line):
                self.address, self.metrics, self.num_tasks = found["address"], found["metrics"], int(found["tasks"])
                return

    def client(self, access: Access = OPEN) -> Client:
        return Client(self.address, access, retry=None)

    def log(self) -> str:
        """The server's stderr so far."""
        return Path(self._log.name).read_text(errors="replace")

    def stop(self, timeout: float = 60.0) -> int:
        """Send SIGTERM and wait; returns the exit status. Kills a server that does not end in time."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill every process of the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def flags(settings: Mapping[str, Any]) -> Sequence[str]:
    """Settings as command-line flags."""
    made: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            made.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            made += [f"--{flag}", str(value)]
    return made
