"""Limits of this process's control groups (version 1 and 2): its own group and every parent group."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def cpu_cores(root: Path = _ROOT, own: Path = _OWN) -> float | None:
    """Processor time that the groups allow, in cores; None without a limit."""
    allowed = []
    for folder in _groups("cpu", root, own):
        limit = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        # In version 1, a quota of -1 means no limit.
        if len(limit) == 2 and limit[0] > 0:
            allowed.append(limit[0] / limit[1])
    return min(allowed, default=None)


def memory_left(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Bytes that the groups still allow; inactive file pages count as free. None without a limit."""
    left = []
    for folder in _groups("memory", root, own):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
        if limit and used:
            left.append(max(0, limit[0] - used[0] + _inactive_file(folder)))
    return min(left, default=None)


def out_of_memory_kills(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Number of processes in this process's own group that the kernel killed at the group's memory limit."""
    for folder in _groups("memory", root, own):
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError):
                lines = (folder / name).read_text().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's groups and their parents that are mounted under `root`."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts = [root, root / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / controllers, root / controller]
        else:
            continue
        # In a container the path may be the host's; then the mount point itself is the container's group.
        below = Path(os.path.normpath(path).lstrip("/"))
        for mount in mounts:
            yield from (mount / each for each in (below, *below.parents))


def _words(file: Path) -> list[int]:
    """The numbers in a file; empty if it cannot be read or holds no limit ("max")."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


def _inactive_file(folder: Path) -> int:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
    except (OSError, ValueError):
        return 0
