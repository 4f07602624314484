"""Seconds of work on a GPU, between events; and a card's ceilings. Without a GPU, the clock's, which say nothing."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Run = Callable[[], object]


class Ceilings(NamedTuple):
    """What a card does at best: bytes a second of a large copy, operations a second of a large bfloat16 product."""

    bytes: float
    operations: float


def event_seconds(run: Run) -> float:
    """Seconds of `run` between two events on the device."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(variants: Mapping[str, tuple[Run, Run]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round; they take turns. Up to three rounds before them do not count.

    variants: (untimed preparation, timed work).
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(-min(3, rounds - 1), rounds):
        for name, (prepare, run) in variants.items():
            prepare()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            measured = event_seconds(run)
            if i >= 0:
                seconds[name].append(measured)
    return seconds


def median_seconds(run: Run) -> float:
    """Median seconds of `run` over ten rounds."""
    return statistics.median(interleaved({"": (lambda: None, run)}, 10)[""])


def ceilings() -> Ceilings:
    """The ceilings of this card, now."""
    on_gpu = torch.cuda.is_available()
    device, size, n = ("cuda", 2**30, 8192) if on_gpu else ("cpu", 2**20, 64)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    copied = median_seconds(lambda: target.copy_(source))
    multiplied = median_seconds(lambda: torch.mm(a, b, out=c))
    return Ceilings(2 * source.numel() / copied, 2 * n**3 / multiplied)
