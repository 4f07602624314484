"""What a process and its descendants take: memory, processor time, and the processor while nobody asks them."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import psutil


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants. Memory that they share counts in each: an upper bound."""
    return sum(process.memory_info().rss for process in process_tree(pid))


def peak_bytes(pid: int) -> int:
    """Sum of the largest resident memory that each of these processes has had: an upper bound of their peak."""
    total = 0
    for process in process_tree(pid):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        # A process that has ended and is not yet waited for has no memory.
        total += int(found[1]) * 1024 if found else 0
    return total


def cpu_seconds(pid: int) -> float:
    """Processor time, user and system, that a process has taken with all its threads, without its children."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def halted(pid: int) -> Iterator[None]:
    """Stop a process and its descendants meanwhile: an idle engine still polls, on the cores that are measured."""
    processes = process_tree(pid)
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()
