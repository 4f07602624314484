"""Supervision of fake engines: a failure is noticed at once, the engine replaced, and given up after too many."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import MagicMock

import pytest

from server.engine import Engine, EngineFailure, EngineGaveUpError, EngineStartError, Supervisor
from server.engine.stats import EngineStats
from server.errors import EngineDeadError
from server.settings import Settings
from tests.waiting import eventually

STEP = EngineStats(running=1, waiting=0, kv_cache_usage=0.0, prefix_cache_queries=0, prefix_cache_hits=0)


class FakeEngine:
    def __init__(self) -> None:
        self.alive = True
        self.stalled_s = 0.0
        self.lost = False
        self.starts = True

    def start(self) -> None:
        if not self.starts:
            self.alive = False
            raise EngineStartError("no")

    async def ended(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        while self.alive and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def lose(self) -> None:
        self.lost, self.alive = True, False

    def shutdown(self) -> None:
        assert self.lost


class Listener:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.kinds: list[str] = []
        self.hold: asyncio.Event | None = None

    async def engine_lost(self, failure: EngineFailure) -> None:
        self.said.append(failure.reason)
        self.kinds.append(failure.kind)

    async def engine_started(self, engine: Any) -> None:
        if self.hold:
            await self.hold.wait()
        self.said.append("started")


class Setting:
    def __init__(self, max_failures: int = 3) -> None:
        self.engines: list[FakeEngine] = []
        self.next_starts = True
        self.listener = Listener()
        self.supervisor = Supervisor(
            self.make,
            self.listener.engine_started,
            self.listener.engine_lost,
            hang_s=5.0,
            max_failures=max_failures,
            window_s=60.0,
        )

    def make(self) -> Any:
        self.engines.append(FakeEngine())
        self.engines[-1].starts = self.next_starts
        return self.engines[-1]


async def test_replaces_an_engine_that_dies() -> None:
    setting = Setting()
    await setting.supervisor.start()
    running = asyncio.create_task(setting.supervisor.run())
    setting.engines[0].alive = False
    await eventually(lambda: setting.listener.said.count("started") == 2)
    assert setting.listener.said == ["started", "a process of it has died", "started"]
    assert setting.engines[0].lost
    running.cancel()


async def test_replaces_an_engine_that_makes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.supervisor._LOOK_INTERVAL_S", 0.1)
    setting = Setting()
    await setting.supervisor.start()
    running = asyncio.create_task(setting.supervisor.run())
    setting.engines[0].stalled_s = 4.9
    await asyncio.sleep(0.3)
    assert setting.listener.said == ["started"]
    setting.engines[0].stalled_s = 5.1
    await eventually(lambda: setting.listener.said.count("started") == 2)
    assert "no step for 5 s" in setting.listener.said[1]
    assert setting.listener.kinds == ["hung"]
    running.cancel()


async def test_gives_up_after_too_many_failures() -> None:
    setting = Setting(max_failures=2)
    await setting.supervisor.start()
    setting.next_starts = False
    setting.engines[0].alive = False
    with pytest.raises(EngineGaveUpError, match="failed 3 times within 60 s, the last time: no"):
        await setting.supervisor.run()
    assert len(setting.engines) == 3
    assert setting.listener.kinds == ["died", "not_started", "not_started"]


async def test_counts_an_engine_that_dies_while_adapters_load() -> None:
    setting = Setting()
    setting.listener.hold = asyncio.Event()
    starting = asyncio.create_task(setting.supervisor.start())
    await eventually(lambda: bool(setting.engines))
    await asyncio.sleep(0.15)
    # A wait for a lost engine ends in EngineDeadError; here only the listener waits.
    setting.engines[0].lose = lambda: setting.listener.hold.set()  # type: ignore[method-assign, union-attr]
    setting.engines[0].alive = False
    await starting
    assert setting.listener.said == ["started"]


async def test_losing_an_engine_ends_every_wait_for_it() -> None:
    engine = Engine(Settings(allow_no_tasks=True), backbone=None, on_stats=lambda _: None)  # type: ignore[arg-type]

    async def wait() -> None:
        with engine._waiting(engine._sequences):
            await asyncio.sleep(60)

    waits = [asyncio.create_task(wait()) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert engine.stalled_s > 0.04
    waits[0].cancel()
    engine.lose()
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(each) for each in results[1:]] == [EngineDeadError, EngineDeadError]
    assert engine.stalled_s == 0
    with pytest.raises(EngineDeadError):
        await wait()


async def test_compiling_is_no_hang_but_ends_with_the_engine() -> None:
    engine = Engine(Settings(allow_no_tasks=True), backbone=None, on_stats=lambda _: None)  # type: ignore[arg-type]
    engine._llm = MagicMock()
    engine._llm.engine_core.call_utility_all_async = lambda *_: asyncio.sleep(60)
    compiling = asyncio.create_task(engine.compile(["x"]))
    await asyncio.sleep(0.05)
    assert engine.stalled_s == 0
    engine.lose()
    with pytest.raises(EngineDeadError):
        await compiling


async def test_vllms_error_of_a_dead_engine_becomes_the_servers_own() -> None:
    from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

    async def dead(*_: Any) -> None:
        raise VllmEngineDeadError

    engine = Engine(Settings(allow_no_tasks=True), backbone=None, on_stats=lambda _: None)  # type: ignore[arg-type]
    engine._llm = MagicMock()
    engine._llm.engine_core.call_utility_all_async = dead
    for work in (engine.worker_stats, lambda: engine.compile(["x"])):
        with pytest.raises(EngineDeadError):
            await work()


async def test_work_for_an_engine_that_starts_is_told_so() -> None:
    engine = Engine(Settings(allow_no_tasks=True), backbone=None, on_stats=lambda _: None)  # type: ignore[arg-type]
    works: list[Callable[[], Awaitable[Any]]] = [
        lambda: engine.unload([]),
        lambda: engine.compile(["x"]),
        engine.worker_stats,
        lambda: engine.warm_up(None),
    ]
    for work in works:
        with pytest.raises(EngineDeadError):
            await work()


async def test_an_engine_whose_process_ends_is_dead_at_once() -> None:
    engine = Engine(Settings(allow_no_tasks=True), backbone=None, on_stats=lambda _: None)  # type: ignore[arg-type]
    sentinel, process = os.pipe()
    engine._sentinels = [sentinel]
    await engine.ended(0.01)
    assert not engine._ended.is_set()
    os.close(process)
    async with asyncio.timeout(1):
        await engine.ended(60)
    assert engine._ended.is_set()
    os.close(sentinel)


async def test_steps_of_one_engine_do_not_hide_another_that_hangs() -> None:
    engine = Engine(Settings(allow_no_tasks=True), backbone=None, on_stats=lambda _: None)  # type: ignore[arg-type]
    ended = asyncio.Event()

    async def wait(between_steps: bool) -> None:
        with engine._waiting(engine._calls if between_steps else engine._sequences):
            await ended.wait()

    sequence = asyncio.create_task(wait(False))
    await asyncio.sleep(0.05)
    engine._record_step(STEP)
    assert engine.stalled_s < 0.04, "a sequence in the queue, while steps are made"
    answer = asyncio.create_task(wait(True))
    await asyncio.sleep(0.05)
    engine._record_step(STEP)
    assert engine.stalled_s > 0.04, "no answer, although steps are made"
    ended.set()
    await asyncio.gather(sequence, answer)
    assert engine.stalled_s == 0
