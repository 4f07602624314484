"""Loops, waiting, percentiles, process trees and random adapters of the harness."""

import asyncio
import itertools
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.harness.adapters import CONFIG, link_adapter, random_tasks, random_tensors, write_random_adapter
from benchmarks.harness.asking import closed_loop, open_loop
from benchmarks.harness.percentile import p99
from benchmarks.harness.processes import cpu_seconds, halted, peak_bytes, process_tree, resident_bytes
from benchmarks.harness.versions import newest_version
from benchmarks.harness.waiting import wait_until
from mtlora.checkpoint.read import read_checkpoint
from tests.factories import IDENTITY


def test_closed_loop_keeps_order_and_number_in_flight() -> None:
    began: list[int] = []
    running, most = 0, 0

    async def ask(number: int) -> None:
        nonlocal running, most
        began.append(number)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (number % 3))
        running -= 1

    asyncio.run(closed_loop(range(20), 4, ask))
    assert began == list(range(20))
    assert most == 4
    assert running == 0


def test_open_loop_does_not_wait_between_requests_but_at_the_end() -> None:
    began: list[float] = []
    ended: list[int] = []

    async def ask(number: int) -> None:
        began.append(time.monotonic())
        await asyncio.sleep(0.2)
        ended.append(number)

    asyncio.run(open_loop(range(5), itertools.repeat(0.01), ask))
    assert ended == [0, 1, 2, 3, 4]
    assert began[-1] - began[0] < 0.2
    assert began[-1] - began[0] >= 0.03


def test_loops_raise_the_error_of_a_request() -> None:
    async def ask(number: int) -> None:
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        asyncio.run(closed_loop([0], 1, ask))
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(open_loop([0], [0.0], ask))
    assert raised.group_contains(ValueError, match="0")


def test_wait_until_returns_or_raises_after_its_time() -> None:
    looks = iter([False, False, True])
    wait_until(lambda: next(looks), 5, every_s=0.001)
    with pytest.raises(TimeoutError, match=r"not true after 0\.01 s"):
        wait_until(lambda: False, 0.01, every_s=0.001)


def test_p99_is_a_measured_value() -> None:
    assert p99([float(i) for i in range(200, 0, -1)]) == 199
    assert p99([7.0]) == 7


def test_process_tree_is_measured_and_halted_whole() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"]) as shell:
        wait_until(lambda: len(process_tree(shell.pid)) == 2, 30)
        processes = process_tree(shell.pid)
        assert resident_bytes(shell.pid) > processes[0].memory_info().rss
        assert peak_bytes(shell.pid) > 0
        with halted(shell.pid):
            wait_until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in processes), 30)
        wait_until(lambda: all(process.status() != psutil.STATUS_STOPPED for process in processes), 30)
        for process in reversed(processes):
            process.kill()
    spun = time.process_time() + 0.05
    before = cpu_seconds(os.getpid())
    wait_until(lambda: time.process_time() > spun, 5, every_s=0)
    assert cpu_seconds(os.getpid()) > before


def test_random_adapters_are_valid_and_differ_by_seed(tmp_path: Path) -> None:
    tasks = random_tasks(3, max_new_tokens=5)
    manifest = write_random_adapter(tmp_path / "a", IDENTITY, tasks, seed=1)
    assert [(task.id, task.max_new_tokens) for task in manifest.tasks] == [(f"task-{i}", 5) for i in range(3)]
    link_adapter(tmp_path / "a", tmp_path / "b" / "1")
    write_random_adapter(tmp_path / "c", IDENTITY, tasks, seed=2)
    a, b, c = (read_checkpoint(tmp_path / name).tensors for name in ("a", "b/1", "c"))
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == torch.float16 for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    scales = {"lora_A": 1.0, "lora_B": 2.0, "lora_route": 3.0, "task_bias": 0.0}
    scaled, plain = (random_tensors(IDENTITY, CONFIG, tasks, scale=scale) for scale in (scales, 1.0))
    assert all(torch.equal(scaled[name], scales[name.rpartition(".")[2]] * plain[name]) for name in plain)


def test_the_newest_version_has_the_highest_number(tmp_path: Path) -> None:
    for name in ("9", "10", "beta"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.json").touch()
    (tmp_path / "11").mkdir()
    assert newest_version(tmp_path).name == "10"
    with pytest.raises(SystemExit, match="11: found no version; allowed: "):
        newest_version(tmp_path / "11")
