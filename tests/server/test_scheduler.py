"""The order of turns, full queues, limits of requests in flight and deadlines, on a clock that a test moves."""

import asyncio
from contextlib import AsyncExitStack

import grpc
import pytest

from server.errors import RequestFailedError
from server.tenants import Priority, Tenant
from tests.server.front import IMAGE, JOB, A, B, Clock, Front, hold, quota_details, settle, wait_for


async def test_runs_as_many_as_there_are_turns_and_the_rest_by_fairness(clock: Clock) -> None:
    front, done = Front(clock=clock), list[str]()
    async with AsyncExitStack() as stack:
        await hold(front, stack)
        await hold(front, stack)
        tasks = [asyncio.create_task(wait_for(front, A, done)) for _ in range(3)]
        await settle()
        tasks.append(asyncio.create_task(wait_for(front, B, done)))
        await settle()
        assert done == []
        assert (front.running, front.queued) == (2, 4)
    await asyncio.gather(*tasks)
    # b has the least service, so it runs before requests of a that waited longer.
    assert done == ["a", "b", "a", "a"] or done == ["b", "a", "a", "a"]
    assert (front.running, front.queued) == (0, 0)
    assert (front.service("a"), front.service("b")) == (50, 10)


async def test_requests_of_one_tenant_in_two_classes_wait_in_two_lines_and_share_its_limits(clock: Clock) -> None:
    """A trusted proxy has lowered the first and the third to the class batch."""
    front, served = Front(turns=2, clock=clock), list[str]()
    tenant = Tenant(id="a", max_in_flight=1)
    batch = tenant.lowered(Priority.BATCH)

    async def ask(of: Tenant) -> None:
        async with front.scheduler.turn(of, JOB, None):
            served.append(of.priority)
            await asyncio.sleep(0)
            assert front.running == 1

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(front.scheduler.turn(tenant, JOB, None))
        tasks = [asyncio.create_task(ask(each)) for each in (batch, tenant, batch, tenant)]
        await settle()
        assert front.scheduler.queued_by_tenant() == {"a": 4}
        assert served == []
    await asyncio.gather(*tasks)
    assert served == ["standard", "standard", "batch", "batch"]
    front.admission.keep_only(())
    assert front.scheduler.queued_by_tenant() == {}


async def test_a_cancelled_wait_leaves_the_queue(clock: Clock) -> None:
    front, done = Front(turns=1, clock=clock), list[str]()
    async with AsyncExitStack() as stack:
        await hold(front, stack)
        gone, stays = (asyncio.create_task(wait_for(front, tenant, done)) for tenant in (A, B))
        await settle()
        gone.cancel()
        await settle()
        assert front.scheduler.queued_by_tenant() == {"b": 1}
    await stays
    assert done == ["b"]
    assert front.running == 0


async def test_max_in_flight_delays_only_its_tenant(clock: Clock) -> None:
    front, done = Front(clock=clock), list[str]()
    tenant = Tenant(id="a", max_in_flight=1, max_queue=1)
    async with AsyncExitStack() as stack:
        await hold(front, stack, tenant)
        waiting = asyncio.create_task(wait_for(front, tenant, done))
        await settle()
        await wait_for(front, B, done)
        assert done == ["b"]
        with pytest.raises(RequestFailedError) as raised:
            await hold(front, stack, tenant)
        assert quota_details(raised.value)[1] == [("tenant:a", "1 requests in its queue, max_queue")]
    await waiting
    assert done == ["b", "a"]


async def test_a_full_queue_drops_the_longest_lines_newest(clock: Clock) -> None:
    front, done = Front(turns=1, max_queued=3, clock=clock), list[str]()
    async with AsyncExitStack() as stack:
        await hold(front, stack)
        flood = [asyncio.create_task(wait_for(front, A, done)) for _ in range(3)]
        await settle()
        with pytest.raises(RequestFailedError):
            await hold(front, stack, A)
        other = asyncio.create_task(wait_for(front, B, done))
        await settle()
        with pytest.raises(RequestFailedError) as raised:
            await flood[2]
        assert quota_details(raised.value)[0] > 0
    await asyncio.gather(other, *flood[:2])
    assert sorted(done) == ["a", "a", "b"]


async def test_a_request_cancelled_in_a_full_queue_makes_room_itself(clock: Clock) -> None:
    """In one iteration of the loop: its turn is still queued when the next request comes."""
    front, done = Front(turns=1, max_queued=2, clock=clock), list[str]()
    async with AsyncExitStack() as stack:
        await hold(front, stack, B)
        flood = [asyncio.create_task(wait_for(front, A, done)) for _ in range(2)]
        await settle()
        newcomer = asyncio.create_task(wait_for(front, B, done))
        flood[1].cancel()
        await settle()
        assert flood[1].cancelled()
    await asyncio.gather(newcomer, flood[0])
    assert sorted(done) == ["a", "b"]
    await wait_for(front, A, done)


async def test_a_request_refused_by_a_full_queue_leaves_it(clock: Clock) -> None:
    front, done = Front(turns=1, max_queued=1, clock=clock), list[str]()
    async with AsyncExitStack() as stack:
        await hold(front, stack, B)
        waiting = asyncio.create_task(wait_for(front, A, done))
        await settle()
        with pytest.raises(RequestFailedError):
            await wait_for(front, A, done)
    await waiting
    assert done == ["a"]


async def measured(clock: Clock, front: Front, seconds: float, tokens: int = 11) -> None:
    """One request that took `seconds`, a tenth of them to its first token."""
    async with front.scheduler.turn(A, JOB, None) as turn:
        first = clock.now + seconds / 10
        turn.served(1, first)
        clock.now += seconds
        turn.served(tokens - 1, first)


async def test_refuses_a_deadline_out_of_reach_at_once(clock: Clock) -> None:
    front, done = Front(turns=1, clock=clock), list[str]()
    # Without measurements every deadline is possible.
    await wait_for(front, A, done, clock.now + 0.001)
    await measured(clock, front, 1.0)
    with pytest.raises(RequestFailedError) as raised:
        await wait_for(front, A, done, clock.now + 0.5)
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await wait_for(front, A, done, clock.now + 1.5)
    async with AsyncExitStack() as stack:
        await hold(front, stack)
        with pytest.raises(RequestFailedError) as raised:
            await wait_for(front, B, done, clock.now + 1.5)
        assert quota_details(raised.value)[0] == pytest.approx(1.0, abs=0.1)
    assert done == ["a", "a"]
    # Old measurements do not count.
    clock.now += 60
    await wait_for(front, A, done, clock.now + 0.01)


async def test_one_long_step_makes_no_distant_deadline_impossible(clock: Clock) -> None:
    front, done = Front(turns=1, clock=clock), list[str]()
    await measured(clock, front, 20.0, tokens=200)
    clock.now += 60
    # Two tokens, and between them a step with the prefill of many other prompts.
    await measured(clock, front, 5.0, tokens=2)
    await wait_for(front, A, done, clock.now + 60)
    assert done == ["a"]


async def test_does_not_run_a_request_that_waited_too_long(clock: Clock) -> None:
    front, done = Front(turns=1, clock=clock), list[str]()
    await measured(clock, front, 1.0)
    async with AsyncExitStack() as stack:
        await hold(front, stack)
        late = asyncio.create_task(wait_for(front, B, done, clock.now + 3))
        await settle()
        clock.now += 2.5
    with pytest.raises(RequestFailedError) as raised:
        await late
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (done, front.running) == ([], 0)


async def test_more_urgent_classes_run_first(clock: Clock) -> None:
    front, done = Front(turns=1, clock=clock), list[str]()
    batch, urgent = Tenant(id="batch", priority=Priority.BATCH), Tenant(id="urgent", priority=Priority.INTERACTIVE)
    async with AsyncExitStack() as stack:
        await hold(front, stack)
        tasks = [asyncio.create_task(wait_for(front, tenant, done)) for tenant in (batch, urgent, batch, urgent)]
        await settle()
    await asyncio.gather(*tasks)
    assert done == ["urgent", "urgent", "batch", "batch"]


async def test_the_answer_to_an_image_takes_time_and_no_tokens(clock: Clock) -> None:
    front = Front(1, clock=clock)
    # Two images a second, to the token.
    limited = Tenant(id="a", tokens_per_second=2 * 65, burst_seconds=1.0)
    for _ in range(2):
        async with front.scheduler.turn(limited, IMAGE, None) as turn:
            turn.served(0, clock.now + 3)
    with pytest.raises(RequestFailedError, match="tokens_per_second"):
        async with front.scheduler.turn(limited, IMAGE, None):
            pass
    with pytest.raises(RequestFailedError) as raised:
        async with front.scheduler.turn(B, IMAGE, clock.now + 2):
            pass
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_images_that_a_tenant_had_put_its_texts_behind(clock: Clock) -> None:
    """Both tenants wait for a turn of texts all the time; a's images cost it texts, and b catches up."""
    front, done = Front(1, 100, clock=clock), list[str]()
    async with AsyncExitStack() as stack:
        await hold(front, stack, Tenant(id="c"))
        waiting = [asyncio.create_task(wait_for(front, each, done)) for _ in range(6) for each in (A, B)]
        await settle()
        async with front.scheduler.turn(A, IMAGE, None) as turn:
            turn.submitted()
    await asyncio.gather(*waiting)
    # An image of 16 tokens' worth against texts of 10.
    assert done[:2] == ["b", "b"]


async def test_a_limit_of_requests_in_flight_holds_for_both_engines(clock: Clock) -> None:
    limited, done = Tenant(id="a", max_in_flight=1), list[str]()
    front = Front(image_turns=2, clock=clock)
    async with front.scheduler.turn(limited, IMAGE, None):
        waiting = asyncio.create_task(wait_for(front, limited, done))
        await settle()
        assert not done
    await waiting
    assert done == ["a"]
