"""vLLM's own HTTP server with the plugin, to compare this project's server with."""

import contextlib
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.environment import engine_environment
from benchmarks.harness.guard import guarded_process
from benchmarks.harness.ports import free_port
from benchmarks.harness.waiting import wait_until
from server.cli.process import flags

_START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class VllmServer:
    """A running server. pid: the process that speaks HTTP, the parent of the engine's."""

    url: str
    pid: int


@contextlib.contextmanager
def vllm_server(backbone: Path, modules: Mapping[str, Path], **settings: Any) -> Iterator[VllmServer]:
    """Start what `vllm serve` starts, on a free loopback port, and wait until it is ready. Raises RuntimeError.

    modules: an adapter's folder by the id of the task that it answers. settings: vLLM's own.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        *flags({"model": backbone, "host": "127.0.0.1", "port": port, **settings}),
        "--lora-modules", *(f"{name}={folder}" for name, folder in modules.items()),
    ]  # fmt: skip
    # As in the native server, the engine has its own process and does not compile while it serves.
    environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TORCHDYNAMO_DISABLE": "1"}
    with (
        tempfile.NamedTemporaryFile(prefix="mtlora-vllm-", suffix=".log") as log,
        guarded_process(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        wait_until(lambda: process.poll() is not None or _is_healthy(url), _START_TIMEOUT_S, every_s=0.2)
        if process.poll() is not None:
            raise RuntimeError(f"vLLM's server ended:\n{Path(log.name).read_text(errors='replace')[-4000:]}")
        yield VllmServer(url, process.pid)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
