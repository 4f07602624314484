"""A thread that tenants share: whose work comes next."""

import asyncio
import threading
import time

import pytest

from server.scheduling.fair_thread import FairThread
from tests.server.front import A, B, settle


class Work:
    """Work that waits in the thread until `go`; records who worked."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.done: list[str] = []

    def of(self, name: str) -> str:
        self.go.wait(10)
        self.done.append(name)
        return name


async def test_a_flood_of_one_tenant_delays_another_by_one_piece_of_work() -> None:
    thread, work = FairThread("test"), Work()
    flood = [asyncio.create_task(thread.run(A, 1.0, lambda: work.of("a"))) for _ in range(50)]
    await settle()
    other = [asyncio.create_task(thread.run(B, 1.0, lambda: work.of("b"))) for _ in range(2)]
    await settle()
    work.go.set()
    assert await asyncio.gather(*other) == ["b", "b"]
    assert await asyncio.gather(*flood) == ["a"] * 50
    assert work.done[:5].count("b") == 2


async def test_large_pieces_of_work_cost_more_turns() -> None:
    thread, work = FairThread("test"), Work()
    large = [asyncio.create_task(thread.run(A, 10.0, lambda: work.of("a"))) for _ in range(3)]
    small = [asyncio.create_task(thread.run(B, 1.0, lambda: work.of("b"))) for _ in range(12)]
    await settle()
    work.go.set()
    await asyncio.gather(*large, *small)
    second, third = [i for i, name in enumerate(work.done) if name == "a"][1:]
    assert third - second > 9


async def test_a_cancelled_caller_leaves_the_line_and_failures_pass_it_on() -> None:
    thread, work = FairThread("test"), Work()

    def fail() -> None:
        raise ValueError("no")

    running, waiting, failing, last = (
        asyncio.create_task(thread.run(A, 1.0, each))
        for each in (lambda: work.of("running"), lambda: work.of("waiting"), fail, lambda: work.of("last"))
    )
    await settle()
    waiting.cancel()
    running.cancel()
    await settle()
    work.go.set()
    with pytest.raises(ValueError, match="no"):
        await failing
    assert await last == "last"
    assert "waiting" not in work.done


async def test_one_cancelled_just_now_is_passed_over() -> None:
    """In one iteration of the loop: it is still in line when the thread is free."""
    thread = FairThread("test")
    thread._free = 0
    cancelled, next_one = (asyncio.create_task(thread.run(A, 1.0, lambda: "done")) for _ in range(2))
    await settle()
    cancelled.cancel()
    thread._free = 1
    thread._next()
    assert await next_one == "done"
    assert await thread.run(A, 1.0, lambda: "again") == "again"


async def test_the_event_loop_goes_on_meanwhile() -> None:
    thread = FairThread("test")
    task = asyncio.create_task(thread.run(A, 1.0, lambda: time.sleep(0.2)))
    turns = 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0.01)
    assert turns > 3
