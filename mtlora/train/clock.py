"""How long the sections of a training step take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent in named sections. On a GPU, whose work goes on behind the program's back, set `synchronise`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.synchronise = False

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[section] = self.seconds.get(section, 0.0) + time.perf_counter() - begin

    def _wait(self) -> None:
        if self.synchronise and torch.cuda.is_available():
            torch.cuda.synchronize()
