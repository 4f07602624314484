"""`vllm serve` with the plugin, as vLLM's own HTTP server beside which ours is measured."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from benchmarks.harness.environment import engine_environment
from benchmarks.harness.guard import guarded
from benchmarks.harness.processes import process_tree
from benchmarks.harness.waiting import wait_until
from server.cli.process import flags


class VllmServer:
    """`vllm serve` on a free loopback port, ready once entered, gone once left. Entering may raise RuntimeError.

    modules: an adapter's folder by the id of the task that it answers. settings: vLLM's own.
    """

    def __init__(
        self, backbone: Path, modules: Mapping[str, Path], settings: Mapping[str, Any], *, timeout_s: float = 300.0
    ) -> None:
        self.port = _free_port()
        self._command = [
            str(Path(sys.executable).with_name("vllm")), "serve", str(backbone),
            "--host", "127.0.0.1", "--port", str(self.port), *flags(settings),
            "--lora-modules", *(f"{name}={folder}" for name, folder in modules.items()),
        ]  # fmt: skip
        self._timeout_s = timeout_s
        self._log: IO[bytes] = tempfile.NamedTemporaryFile(prefix="mtlora-vllm-", suffix=".log")  # noqa: SIM115

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The root of its processes."""
        return self._process.pid

    @property
    def front_pid(self) -> int:
        """The process that speaks HTTP: the first that the guard has started."""
        return process_tree(self._process.pid)[1].pid

    def __enter__(self) -> Self:
        # As in the native server: the engine is a process of its own, and compiles nothing in the midst of requests.
        environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TORCHDYNAMO_DISABLE": "1"}
        self._process = subprocess.Popen(
            guarded(self._command), env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=self._log,
            stderr=self._log, start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(lambda: self._process.poll() is not None or self._is_healthy(), self._timeout_s, every_s=0.2)
            if self._process.poll() is not None:
                raise RuntimeError(f"vllm serve ended:\n{Path(self._log.name).read_text(errors='replace')[-4000:]}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
