"""The processes that a whole load test starts: a server, by its command, and an engine without one."""

import contextlib
import json
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from loadtest.errors import LoadTestError
from mtlora.vllm_cpu.memory import memory_environment

_READY = re.compile(r"serving on (?P<address>\S+), metrics on (?P<metrics>\S+), (?P<tasks>\d+) tasks")
_LOG_CHARS = 3000


class _Process:
    """A process whose stdout is read line by line and whose stderr goes to a file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> None:
        self._command = list(command)
        self._environment = {**os.environ, **environment}
        self._timeout_s = timeout_s
        self._log: IO[bytes] = tempfile.NamedTemporaryFile(prefix="mtlora-loadtest-", suffix=".log")  # noqa: SIM115
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Self:
        try:
            # A session of its own: Ctrl-C is meant for the load test, which then ends this one.
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._log, text=True, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise LoadTestError(f"cannot start {self._command[0]}: {error.strerror}") from None
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._ready()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(45)
        finally:
            self._kill()
            self._log.close()

    def _ready(self) -> None:
        raise NotImplementedError

    def line(self, timeout_s: float) -> str:
        """The next line of its output. Raises LoadTestError where it ends or takes too long."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise LoadTestError(f"{self._name}: no answer within {timeout_s:.0f} s:\n{self._tail()}") from None
        if line is None:
            raise LoadTestError(f"{self._name}: ended with status {self._process.wait()}:\n{self._tail()}")
        return line

    @property
    def _name(self) -> str:
        return Path(self._command[0]).name

    def _tail(self) -> str:
        return Path(self._log.name).read_text(errors="replace")[-_LOG_CHARS:]

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


class Server(_Process):
    """`mtlora-server serve` on free loopback ports, ready for requests; on leaving it gets SIGTERM."""

    def __init__(self, settings: Mapping[str, Any], timeout_s: float = 600.0) -> None:
        flags = [
            part
            for name, value in ({"port": 0, "metrics_port": 0} | dict(settings)).items()
            for part in _flag(name.replace("_", "-"), value)
        ]
        super().__init__([str(Path(sys.executable).with_name("mtlora-server")), "serve", *flags], {}, timeout_s)
        self.address = ""
        self.metrics = ""

    def _ready(self) -> None:
        until = time.monotonic() + self._timeout_s
        while (found := _READY.search(self.line(max(0.1, until - time.monotonic())))) is None:
            pass
        self.address, self.metrics = found["address"], found["metrics"]


@dataclass(frozen=True)
class Answered:
    """A closed loop of the engine in process."""

    seconds: float
    prompt_tokens: int
    completion_tokens: int
    texts: list[str]


class InProcessEngine(_Process):
    """`benchmarks.closed_loop_worker`: the engine without a server. `engine` are keyword arguments of vllm.LLM."""

    def __init__(
        self, backbone: str, adapters: Sequence[tuple[str, str, Path]], engine: Mapping[str, Any], kv_cache_gib: float,
        timeout_s: float = 300.0,
    ) -> None:  # fmt: skip
        given = {"backbone": backbone, "adapters": [[n, v, str(f)] for n, v, f in adapters], "engine": dict(engine)}
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": f"{kv_cache_gib:g}",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # As in the server: vLLM compiles functions even in eager mode, in the midst of requests.
            "TORCHDYNAMO_DISABLE": "1",
            **memory_environment(),
            # As the server places its threads: on every core.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        }
        super().__init__(
            [sys.executable, "-m", "benchmarks.closed_loop_worker", json.dumps(given)], environment, timeout_s
        )

    @property
    def _name(self) -> str:
        return "the engine in process"

    def _ready(self) -> None:
        self.line(self._timeout_s)

    def run(self, requests: Sequence[tuple[str, str]], in_flight: int) -> Answered:
        """Answer every (task, text), `in_flight` at a time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"in_flight": in_flight, "requests": list(requests)}) + "\n")
        self._process.stdin.flush()
        return Answered(**json.loads(self.line(self._timeout_s)))


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [] if value is None else [f"--{name}", str(value)]
