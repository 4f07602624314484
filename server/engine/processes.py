"""The processes of an engine: kill them and free the shared memory that they leave."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn, Self

import psutil

_SHARED_MEMORY = Path("/dev/shm")


def exit_at_once(status: int) -> NoReturn:
    """End this process and all its descendants at once: an engine cannot be stopped while it starts."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(status)


class EngineProcesses:
    """Find them while all are alive, because children of a dead parent cannot be found.

    shared: names of shared memory that they have mapped and this process has not.
    """

    def __init__(self, processes: Iterable[psutil.Process] = ()) -> None:
        self._processes = list(processes)
        maps = [_mapped(process.pid) for process in self._processes]
        self.shared = frozenset[Path]().union(*maps) - _mapped("self")

    @classmethod
    def below(cls, pids: Iterable[int]) -> Self:
        """The processes of engine cores and all their descendants."""
        cores = [psutil.Process(pid) for pid in pids]
        return cls(process for core in cores for process in (*core.children(recursive=True), core))

    def kill(self) -> None:
        """Kill them, even if they are stopped."""
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def clean_up(self) -> None:
        """Wait for their end, and free their shared memory."""
        psutil.wait_procs(self._processes, timeout=10)
        for path in self.shared:
            path.unlink(missing_ok=True)


def _mapped(pid: int | str) -> frozenset[Path]:
    """Names in shared memory that a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return frozenset()
    paths = (line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6)
    return frozenset(Path(path) for path in paths if path.startswith(f"{_SHARED_MEMORY}/") and "(deleted)" not in path)
