"""Memory and processor time of running processes."""

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
    """Resident memory of a process and its descendants. Shared memory counts in each: an upper bound."""
    return sum(process.memory_info().rss for process in process_tree(pid))


def peak_bytes(pid: int) -> int:
    """Sum of the peaks of a process and its descendants: an upper bound of their common peak."""
    total = 0
    for process in process_tree(pid):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        # A zombie process has no such line.
        total += int(found[1]) * 1024 if found else 0
    return total


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads, without its children."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def halted(pid: int) -> Iterator[None]:
    """Stop a process and its descendants for a while: an idle engine polls, and takes time from what is measured."""
    processes = process_tree(pid)
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()
