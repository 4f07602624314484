"""The processes of an engine, and what they leave behind when they are killed."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import psutil

_SHARED_MEMORY = Path("/dev/shm")
_LOWEST = 19

Cores = frozenset[int]


class EngineProcesses:
    """Found while all of them live: the children of a parent that has died are not to be found any more.

    shared: names in shared memory that they have mapped and this process has not.
    """

    def __init__(self, processes: Iterable[psutil.Process] = ()) -> None:
        self._processes = list(processes)
        maps = [_mapped(process.pid) for process in self._processes]
        self.shared = frozenset[Path]().union(*maps) - _mapped("self")
        self._given: Cores = frozenset()
        self._kept: Cores = frozenset()

    @classmethod
    def below(cls, pids: Iterable[int]) -> Self:
        """Those of an engine's cores and everything under them."""
        cores = [psutil.Process(pid) for pid in pids]
        return cls(process for core in cores for process in (*core.children(recursive=True), core))

    def yield_cores(self, by: int) -> None:
        """Let this process have a core before theirs, which become `by` steps nicer; their new threads inherit that.

        An engine on CPUs works on every core there is. If this process had to wait for one, a request would miss the
        next step, and so would the one that follows an answer.
        """
        niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + by, _LOWEST)
        for process in self._processes:
            with contextlib.suppress(psutil.Error, OSError):
                for thread in process.threads():
                    os.setpriority(os.PRIO_PROCESS, thread.id, niceness)

    def part_cores(self) -> None:
        """Keep everything else off the cores that ranks on CPUs begin their steps on, where other cores are left.

        Every part of a step waits for a rank's first thread; the rest of its team has nothing to do for half of the
        time. So this process and the engine's threads that pass requests and answers on keep to the other cores.
        """
        firsts = {p.pid: cores for p in self._processes if len(cores := _affinity(p.pid)) == 1}
        given = _affinity(0)
        others = given.difference(*firsts.values())
        if not firsts or not others:
            return
        for process in self._processes:
            if process.pid in firsts:
                _move(process, firsts[process.pid], others, but=process.pid)
        self._given, self._kept = given, others
        _move(psutil.Process(), given, others)

    def rejoin_cores(self) -> None:
        """Let this process run where it did before `part_cores`."""
        if self._given:
            _move(psutil.Process(), self._kept, self._given)
            self._given = frozenset()

    def kill(self) -> None:
        """End them at once; also one that is stopped."""
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def clean_up(self) -> None:
        """Wait for them to be gone, and free the shared memory that nobody else would."""
        psutil.wait_procs(self._processes, timeout=10)
        for path in self.shared:
            path.unlink(missing_ok=True)


def _affinity(thread: int) -> Cores:
    """The cores a thread may use; 0 is this thread. No cores where it has gone."""
    try:
        return frozenset(os.sched_getaffinity(thread))
    except OSError:
        return frozenset()


def _move(process: psutil.Process, source: Cores, target: Cores, but: int | None = None) -> None:
    """Have a process's threads that may use the cores `source`, those and no others, use `target`."""
    with contextlib.suppress(psutil.Error):
        for thread in process.threads():
            if thread.id != but and _affinity(thread.id) == source:
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread.id, target)


def _mapped(pid: int | str) -> frozenset[Path]:
    """Names in shared memory that a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return frozenset()
    paths = (line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6)
    return frozenset(Path(path) for path in paths if path.startswith(f"{_SHARED_MEMORY}/") and "(deleted)" not in path)
