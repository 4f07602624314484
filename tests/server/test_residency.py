"""Residents of the engine: which one makes room, and that only requests for a cold version wait."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import cast

import grpc
import pytest

from server.errors import AdapterError, EngineDeadError, from_exception
from server.registry import residency as module
from server.registry.adapters import _compile_types
from server.registry.residency import Residency
from server.registry.version import AdapterVersion, NoRoomError, Stage, StageError
from tests.server.adapters import entry
from tests.server.slots import Loads, serving_version
from tests.waiting import eventually


@pytest.fixture
def engine() -> Loads:
    return Loads()


async def use(residency: Residency, *versions: AdapterVersion) -> None:
    for each in versions:
        async with residency.lease(each):
            pass


async def test_the_least_recently_used_makes_room(engine: Loads) -> None:
    a, b, c = map(serving_version, "abc")
    residency = Residency(engine, 2)
    await use(residency, a, b, a, c)
    assert engine.held == ["a", "c"]
    assert residency.resident == [a, c]


async def test_a_pinned_adapter_stays(engine: Loads) -> None:
    a, b, c = map(serving_version, "abc")
    residency = Residency(engine, 2)
    a.adapter.pinned = True
    await use(residency, a, b, c)
    assert engine.held == ["a", "c"]


async def test_requests_for_a_cold_adapter_do_not_hold_up_warm_ones(engine: Loads) -> None:
    a, b = map(serving_version, "ab")
    waited: list[float] = []
    residency = Residency(engine, 2, waited.append)
    await use(residency, a)
    engine.gate["b"] = asyncio.Event()
    cold = [asyncio.create_task(use(residency, b)) for _ in range(3)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        await use(residency, a, a)
    assert not any(task.done() for task in cold)
    engine.gate["b"].set()
    await asyncio.gather(*cold)
    assert engine.held == ["a", "b"]
    # The first request of a, and the three that waited for b.
    assert len(waited) == 4


async def test_never_evicts_a_version_with_running_requests(engine: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = map(serving_version, "ab")
    monkeypatch.setattr(module, "PATIENCE_S", 30.0)
    residency = Residency(engine, 1)
    async with residency.lease(a):
        waiting = asyncio.create_task(use(residency, b))
        await asyncio.sleep(0.05)
        assert engine.held == ["a"]
    await waiting
    assert engine.held == ["b"]
    assert engine.most == 1


async def test_a_busy_adapter_makes_room_in_the_end(engine: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = map(serving_version, "ab")
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    residency = Residency(engine, 1)
    stop = False

    async def keep_busy() -> None:
        # Overlapping requests: at any time, at least one runs.
        while not stop:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(residency.lease(a))
                await asyncio.sleep(0.02)

    busy = [asyncio.create_task(keep_busy()) for _ in range(3)]
    await asyncio.sleep(0.02)
    async with asyncio.timeout(10):
        await use(residency, b)
    stop = True
    async with asyncio.timeout(10):
        await asyncio.gather(*busy)
    assert engine.most == 1


async def test_loads_without_room_fail_in_time_and_say_what_fills_the_engine(engine: Loads) -> None:
    pinned, busy, cold, colder = map(serving_version, "abcd")
    residency = Residency(engine, 2, room_s=0.1)
    pinned.adapter.pinned = True
    await use(residency, pinned)
    async with residency.lease(busy):
        async with asyncio.timeout(5):
            results = await asyncio.gather(use(residency, cold), use(residency, colder), return_exceptions=True)
        assert [type(each) for each in results] == [NoRoomError, NoRoomError]
        failure = from_exception(cast(NoRoomError, results[0]))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.message.endswith("of its 2 places (adapter_slots), 1 are pinned and 1 busy")
        assert cast(NoRoomError, results[0]).taken == ["a/1", "b/1"]
        # Versions in the engine are served all the while.
        await use(residency, pinned)
    await use(residency, cold, colder)


async def test_a_request_for_a_resident_version_starts_no_task(engine: Loads) -> None:
    a = serving_version("a")
    residency = Residency(engine, 2)
    await use(residency, a)
    before = asyncio.all_tasks()
    with residency.hold(a):
        await use(residency, a)
    assert asyncio.all_tasks() == before


async def test_a_failed_load_fails_only_its_requests(engine: Loads) -> None:
    a, b = map(serving_version, "ab")
    residency = Residency(engine, 1)
    engine.refuse.add("a")
    results = await asyncio.gather(use(residency, a), use(residency, a), return_exceptions=True)
    assert [type(each) for each in results] == [StageError, StageError]
    await use(residency, b)
    engine.refuse.clear()
    await use(residency, a)
    assert engine.held == ["a"]


async def test_a_cancelled_request_leaves_the_load_to_others(engine: Loads) -> None:
    a = serving_version("a")
    residency = Residency(engine, 1)
    engine.gate["a"] = asyncio.Event()
    first, second = (asyncio.create_task(use(residency, a)) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    engine.gate["a"].set()
    await second
    assert first.cancelled()
    assert a.holds == 0


async def test_a_drain_waits_for_the_last_request(engine: Loads) -> None:
    a = serving_version("a")
    residency = Residency(engine, 4)
    async with residency.lease(a):
        a.enter(Stage.DRAINING)
        draining = asyncio.create_task(residency.drain(a))
        await asyncio.sleep(0.01)
        assert not draining.done()
        assert engine.held == ["a"]
    await draining
    assert engine.held == []


async def test_a_version_wanted_again_stays_in_the_engine(engine: Loads) -> None:
    a = serving_version("a")
    residency = Residency(engine, 4)
    async with residency.lease(a):
        a.enter(Stage.DRAINING)
        draining = asyncio.create_task(residency.drain(a))
        await asyncio.sleep(0.01)
        a.enter(Stage.VERIFIED)
    async with asyncio.timeout(10):
        await draining
    assert engine.held == ["a"]


async def test_a_lost_engine_ends_the_wait_for_it(engine: Loads) -> None:
    a = serving_version("a")
    residency = Residency(engine, 1)
    engine.gate["a"] = asyncio.Event()
    waiting = asyncio.create_task(use(residency, a))
    await asyncio.sleep(0.01)
    residency.reset()
    with pytest.raises(EngineDeadError):
        await waiting
    assert residency.resident == []
    engine.gate.clear()
    await use(residency, a)
    assert engine.held == ["a"]


async def test_types_are_compiled_once_a_version_and_engine(engine: Loads) -> None:
    a, b = map(serving_version, "ab")
    compiled: list[AdapterVersion] = []

    async def compile_types(version: AdapterVersion) -> None:
        compiled.append(version)
        version.fewest = {}

    residency = Residency(engine, 1, prepare=compile_types)
    await use(residency, a, b, a)
    assert compiled == [a, b]
    residency.reset()
    engine.held.clear()
    await use(residency, a)
    assert compiled == [a, b, a]
    # Other bytes: see `Lifecycle.verify`.
    a.fewest = None
    await use(residency, b, a)
    assert compiled == [a, b, a, b, a]


async def test_a_limit_below_the_shortest_answer_fails_the_load(engine: Loads) -> None:
    async def compile(texts: Sequence[str]) -> list[int]:
        return [7] * len(texts)

    def version(max_new_tokens: int) -> AdapterVersion:
        version = serving_version("a")
        version.specs = {"a": entry("a", answer={"type": "date"}, max_new_tokens=max_new_tokens)}
        return version

    residency = Residency(engine, 1, prepare=lambda version: _compile_types(compile, version))
    await use(residency, version(7))
    with pytest.raises(AdapterError, match="task a: max_new_tokens: found 6; its shortest answer takes 7"):
        await use(residency, version(6))


async def test_prefetching_loads_before_anyone_waits(engine: Loads) -> None:
    a, b = map(serving_version, "ab")
    residency = Residency(engine, 1)
    residency.prefetch(a)
    await eventually(lambda: engine.held == ["a"])
    engine.refuse.add("b")
    residency.prefetch(b)
    await eventually(lambda: engine.held == [])
    await use(residency, a)
