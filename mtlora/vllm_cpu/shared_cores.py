"""Two engines on the same CPU cores: an engine uses all cores while the other is idle, and half of them while both run.

If both engines had threads on every core, each would spin at every product until its last thread gets a core. The
number of threads does not change within a step.

This module does not import vLLM, which reads environment variables at import.
"""

import mmap
import os
import time
from functools import cache
from typing import Self

ENVIRONMENT = "MTLORA_SHARED_CORES"
# An engine pauses at most this long between two steps of running requests.
_PAUSE_S = 0.02
# No step takes this long: its engine was killed.
_LONGEST_S = 10.0


@cache
def board() -> str:
    """The path of the shared memory in which two engines publish their steps. It disappears with this process."""
    descriptor = os.memfd_create("mtlora-shared-cores")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def sharing_environment(place: int) -> dict[str, str]:
    """Environment variables of the engine at place 0 or 1 of this process's board."""
    return {ENVIRONMENT: f"{place}:{board()}"}


class SharedCores:
    """One engine's side of a board. Enter it for a part of a step.

    threads: number of threads of a step that has all cores. If it is odd, place 0 gets the larger half.
    """

    def __init__(self, path: str, place: int, threads: int) -> None:
        with open(path, "r+b") as file:
            # The second when a step began, negative when it ended; zero before the first.
            self._marks = memoryview(mmap.mmap(file.fileno(), 2 * 8)).cast("d")
        self._place, self._all = place, threads
        self._half = max(1, (threads + 1 - place) // 2)
        self._marks[place] = 0.0

    @classmethod
    def of_environment(cls, threads: int) -> Self:
        """The board's side given by the environment."""
        place, _, path = os.environ[ENVIRONMENT].partition(":")
        return cls(path, int(place), threads)

    @property
    def threads(self) -> int:
        """Threads of a step that begins now."""
        mark, now = self._marks[1 - self._place], time.monotonic()
        runs = now - mark < _LONGEST_S if mark > 0 else now + mark < _PAUSE_S
        return self._half if mark and runs else self._all

    def __enter__(self) -> None:
        self._marks[self._place] = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._marks[self._place] = -time.monotonic()
