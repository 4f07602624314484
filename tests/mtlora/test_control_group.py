"""Limits of control groups: nested ones, both versions, in and out of containers, from made trees of files."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from mtlora.control_group import cpu_cores, memory_left

GIB = 1 << 30
# Version 1's value of no limit.
NO_LIMIT = 9223372036854771712


def made(tmp_path: Path, own: str, files: Mapping[str, object]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "own").write_text(own)
    return tmp_path / "cgroup", tmp_path / "own"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 50000"}, 2),
        # A sibling's limit does not count.
        ("0::/a\n", {"a/cpu.max": "max 100000", "b/cpu.max": "100000 100000"}, None),
        # The path of the host, in a container that sees its own group as the root.
        ("0::/kubepods/pod1\n", {"cpu.max": "300000 100000"}, 3),
        ("0::/../../x\n", {"cpu.max": "300000 100000"}, 3),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": 150000, "cpu,cpuacct/a/cpu.cfs_period_us": 100000},
            1.5,
        ),
        ("3:cpu:/a\n0::/\n", {"cpu/cpu.cfs_quota_us": 100000, "cpu/cpu.cfs_period_us": 50000}, 2),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": -1, "cpu/a/cpu.cfs_period_us": 100000}, None),
        # Both versions at once, as systemd mounts them.
        ("3:cpu:/\n0::/s\n", {"unified/s/cpu.max": "600000 100000", "cpu/cpu.cfs_quota_us": -1}, 6),
        ("0::/\n", {"cpu.max": "?"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_reads_the_processor_quota(tmp_path: Path, own: str, files: Mapping[str, object], cores: float | None) -> None:
    assert cpu_cores(*made(tmp_path, own, files)) == cores


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/\n", {"memory.max": 8 * GIB, "memory.current": 3 * GIB}, 5 * GIB),
        ("0::/\n", {"memory.max": "max", "memory.current": 3 * GIB}, None),
        (
            "0::/a/b\n",
            {
                "a/memory.max": 8 * GIB, "a/memory.current": 7 * GIB,
                "a/b/memory.max": 4 * GIB, "a/b/memory.current": GIB,
            },
            GIB,
        ),
        # File pages are given up before the limit is reached.
        (
            "0::/\n",
            {"memory.max": 8 * GIB, "memory.current": 7 * GIB, "memory.stat": f"anon 1\ninactive_file {4 * GIB}"},
            5 * GIB,
        ),
        (
            "4:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": 2 * GIB, "memory/a/memory.usage_in_bytes": 3 * GIB,
                "memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": 9 * GIB,
            },
            0,
        ),
        (
            "4:memory:/docker/x\n",
            {"memory/memory.limit_in_bytes": 2 * GIB, "memory/memory.usage_in_bytes": GIB},
            GIB,
        ),
        ("0::/\n", {}, None),
    ],
)  # fmt: skip
def test_reads_the_memory_limit(tmp_path: Path, own: str, files: Mapping[str, object], left: int | None) -> None:
    assert memory_left(*made(tmp_path, own, files)) == left


def test_without_proc_the_mounted_group_counts(tmp_path: Path) -> None:
    root, _ = made(tmp_path, "", {"cpu.max": "100000 100000"})
    assert cpu_cores(root, tmp_path / "nothing") == 1
