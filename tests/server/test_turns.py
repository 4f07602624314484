"""Turns: lent and returned, one set for each engine, given to batches step by step."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.job import GenerationJob, ImageJob, Lane
from server.tenants import Tenant
from tests.server.front import IMAGE, JOB, A, B, Clock, Front, hold, settle


async def test_a_request_aside_gives_up_its_turn_and_returns_before_the_queue(clock: Clock) -> None:
    front, done = Front(turns=1, clock=clock), list[str]()
    ready, leave = asyncio.Event(), asyncio.Event()

    async def cold(name: str) -> None:
        async with front.scheduler.turn(A, JOB, None) as turn:
            async with turn.aside():
                await ready.wait()
            done.append(name)

    async def warm(name: str) -> None:
        async with front.scheduler.turn(B, JOB, None):
            await leave.wait()
            done.append(name)

    works = (cold("cold"), warm("first"), warm("second"))
    tasks = [asyncio.create_task(work) for work in works]
    await settle()
    assert (front.running, front.queued) == (1, 1)
    ready.set()
    await settle()
    # Ready, but its turn is taken.
    assert done == []
    leave.set()
    await asyncio.gather(*tasks)
    assert done == ["first", "cold", "second"]
    # One is aside: the next keeps its turn.
    ready.clear()
    tasks = [asyncio.create_task(work) for work in (cold("one"), cold("two"), warm("third"))]
    await settle()
    assert (front.running, front.queued) == (1, 1)
    ready.set()
    await asyncio.gather(*tasks)
    assert done[3:] == ["two", "one", "third"]
    assert (front.running, front.queued) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans(), st.integers(0, 12)), max_size=12))
def test_no_turn_is_lost_or_made_up_when_requests_aside_fail_or_are_cancelled(
    requests: list[tuple[int, int, bool, int]],
) -> None:
    """Each request: loop iterations aside and in the engine, whether it fails aside, and when it is cancelled."""

    async def run() -> None:
        front, inside = Front(max_queued=100), 0

        async def ask(aside: int, engine: int, fails: bool) -> None:
            nonlocal inside
            async with front.scheduler.turn(A, JOB, None) as turn:
                async with turn.aside():
                    for _ in range(aside):
                        await asyncio.sleep(0)
                    if fails:
                        raise RuntimeError
                inside += 1
                try:
                    for _ in range(engine):
                        assert inside <= front.running <= 2
                        await asyncio.sleep(0)
                finally:
                    inside -= 1

        async def cancel(task: asyncio.Task[None], after: int) -> None:
            for _ in range(after):
                await asyncio.sleep(0)
            task.cancel()

        # Some requests end before they are cancelled.
        tasks = [asyncio.create_task(ask(*each[:3])) for each in requests]
        await asyncio.gather(*(cancel(task, each[3]) for each, task in zip(requests, tasks, strict=True)))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in results} <= {type(None), RuntimeError, asyncio.CancelledError}
        assert (front.running, front.queued) == (0, 0)
        # Both turns are free, and both places aside.
        turn = partial(front.scheduler.turn, A, JOB, None)
        async with turn() as one, turn() as two, one.aside(), two.aside():
            assert front.running == 0

    asyncio.run(run())


async def test_each_engine_has_turns_of_its_own_and_a_tenant_one_account(clock: Clock) -> None:
    front = Front(1, image_turns=2, clock=clock)
    async with AsyncExitStack() as stack:
        await hold(front, stack)
        for _ in range(2):
            # The text's turn is taken, those of images are not.
            (await stack.enter_async_context(front.scheduler.turn(A, IMAGE, None))).submitted()
        assert (front.running, front.queued) == (3, 0)
        late = asyncio.create_task(anext(aiter(_turn(front, B, IMAGE))))
        await settle()
        assert front.queued == 1
        late.cancel()
    await settle()
    assert (front.running, front.queued) == (0, 0)
    assert front.service("a") == pytest.approx(10 + 2 * 65 * 0.25)


async def _turn(front: Front, tenant: Tenant, job: ImageJob) -> AsyncIterator[None]:
    async with front.scheduler.turn(tenant, job, None):
        yield


async def test_a_batch_gets_its_turns_step_by_step(clock: Clock) -> None:
    """A share of the engine's sequences between two steps, or 512 tokens of prompts if that is more."""
    front = Front(16, 64, most_batch=12, clock=clock)
    long = replace(JOB, prompt_ids=(1,) * 300)
    done, leave = list[str](), asyncio.Event()

    async def run(tenant: Tenant, job: GenerationJob, reserved: Any = None) -> None:
        async with front.scheduler.turn(tenant, job, None, reserved):
            done.append(tenant.id)
            await leave.wait()

    with front.scheduler.reserve(A, [long] * 16) as reserved:
        items = [asyncio.create_task(run(A, long, reserved)) for _ in range(14)]
        # The sample's prompt is in the cache by then.
        items.append(asyncio.create_task(run(A, replace(long, further=True), reserved)))
        await settle()
        assert done == ["a"] * 2
        beside = [asyncio.create_task(run(B, long)) for _ in range(2)]
        await settle()
        assert done == ["a", "a", "b", "b"]
        # The engine makes no step for a sequence that never reaches it.
        items[0].cancel()
        await settle()
        assert done.count("a") == 3
        for expected in (5, 7, 9, 11, 13, 13):
            front.scheduler.stepped(Lane.TEXT)
            await settle()
            # One of them was cancelled.
            assert done.count("a") == min(expected, 13)
        # Batches leave turns to others.
        assert front.running == 12 + 2
        leave.set()
        await asyncio.gather(*items, *beside, return_exceptions=True)
    assert done.count("a") == 15
    assert (front.running, front.queued) == (0, 0)
