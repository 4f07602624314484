"""Quotas, turns, deadlines and full queues, on a clock that a test moves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import RequestFailedError
from server.job import GenerationJob, ImageJob, Lane, Sampling, ServedTask
from server.scheduling.bucket import TokenBucket
from server.telemetry.metrics import Metrics
from server.tenants import Priority, Tenant
from tests.server.adapters import entry
from tests.server.front import Clock, Front

A, B = Tenant(id="a"), Tenant(id="b")
JOB = GenerationJob(ServedTask(entry("one"), "x", "1", slot=None), (1,) * 10, Sampling(max_new_tokens=20))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def service(metrics: Metrics, tenant: str) -> float:
    """What a tenant was served, as the fair queue counts it."""
    return metrics.registry.get_sample_value("mtlora_tenant_service_total", {"tenant": tenant}) or 0.0


async def hold(front: Front, stack: AsyncExitStack, tenant: Tenant = A, deadline: float | None = None) -> Any:
    stack.enter_context(front.admission.admit(tenant))
    turn = await stack.enter_async_context(front.scheduler.turn(tenant, JOB, deadline))
    turn.submitted()
    return turn


async def wait_for(front: Front, tenant: Tenant, done: list[str], deadline: float | None = None) -> None:
    with front.admission.admit(tenant):
        async with front.scheduler.turn(tenant, JOB, deadline) as turn:
            turn.submitted()
            done.append(tenant.id)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def details(error: RequestFailedError) -> tuple[float, list[tuple[str, str]]]:
    """(seconds to wait, quotas) of a RESOURCE_EXHAUSTED."""
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry, quotas = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    for each in status_pb2.Status.FromString(error.status_details()).details:
        each.Unpack(retry) or each.Unpack(quotas)
    return retry.retry_delay.ToMilliseconds() / 1e3, [(each.subject, each.description) for each in quotas.violations]


async def test_runs_as_many_as_there_are_turns_and_the_rest_by_fairness(clock: Clock) -> None:
    metrics, done = Metrics(), list[str]()
    front = Front(metrics=metrics, clock=clock)
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
    assert (service(metrics, "a"), service(metrics, "b")) == (50, 10)


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
@settings(max_examples=50, deadline=None)
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


async def test_limits_requests_per_second(clock: Clock) -> None:
    front = Front(clock=clock)
    tenant = Tenant(id="a", requests_per_second=2)
    for _ in range(2):
        front.quotas.count_request(tenant)
    with pytest.raises(RequestFailedError) as raised:
        front.quotas.count_request(tenant)
    assert details(raised.value) == (0.5, [("tenant:a", "2 requests_per_second")])
    front.quotas.count_request(B)
    clock.now += 0.5
    front.quotas.count_request(tenant)
    # A quota that a reload raises holds for the next request.
    front.quotas.count_request(Tenant(id="a"))


async def test_limits_tokens_per_second_exactly_in_the_long_run(clock: Clock) -> None:
    front = Front(clock=clock)
    tenant = Tenant(id="a", tokens_per_second=10)
    began, refused, served = clock.now, 0, 0
    while clock.now < began + 100:
        try:
            async with front.scheduler.turn(tenant, JOB, None) as turn:
                turn.served(15, clock.now)
                served += len(JOB.prompt_ids) + 15
        except RequestFailedError as error:
            retry, quotas = details(error)
            assert quotas == [("tenant:a", "10 tokens_per_second")]
            refused += 1
            clock.now += retry
    assert refused > 10
    assert served == pytest.approx(1000, abs=50)


async def test_reserves_tokens_of_whole_answers_and_returns_the_rest(clock: Clock) -> None:
    """A job may take 30 tokens: three of them fill a burst, though none has generated anything."""
    front = Front(turns=8, clock=clock)
    tenant = Tenant(id="a", tokens_per_second=100)
    async with AsyncExitStack() as stack:
        turns = [await hold(front, stack, tenant) for _ in range(3)]
        with pytest.raises(RequestFailedError) as raised:
            await hold(front, stack, tenant)
        assert details(raised.value) == (0.2, [("tenant:a", "100 tokens_per_second")])
        await hold(front, stack, B)
        for turn in turns:
            turn.served(5, clock.now)
    # 55 tokens are left of 100: 15 went to each.
    async with AsyncExitStack() as stack:
        await hold(front, stack, tenant)
        with pytest.raises(RequestFailedError) as raised:
            await hold(front, stack, tenant)
        assert details(raised.value)[0] == pytest.approx(0.05)


async def test_a_request_above_the_burst_needs_a_full_bucket(clock: Clock) -> None:
    front, done = Front(clock=clock), list[str]()
    tenant = Tenant(id="a", tokens_per_second=10)
    await wait_for(front, tenant, done)
    # It took 10 tokens, its prompt.
    with pytest.raises(RequestFailedError) as raised:
        await wait_for(front, tenant, done)
    assert details(raised.value)[0] == 0.1
    with pytest.raises(RequestFailedError) as raised, front.scheduler.reserve(tenant, [JOB]):
        pass
    assert details(raised.value)[0] == 1.0
    clock.now += 1
    await wait_for(front, tenant, done)
    assert done == ["a", "a"]


async def test_a_request_that_never_ran_costs_no_tokens(clock: Clock) -> None:
    front, done = Front(turns=1, clock=clock), list[str]()
    tenant = Tenant(id="a", tokens_per_second=30)
    async with AsyncExitStack() as stack:
        await hold(front, stack, B)
        waiting = asyncio.create_task(wait_for(front, tenant, done))
        await settle()
        waiting.cancel()
        await settle()
    with front.scheduler.reserve(tenant, [JOB]):
        pass


async def test_a_request_that_got_no_adapter_costs_no_tokens(clock: Clock) -> None:
    metrics = Metrics()
    front = Front(metrics=metrics, clock=clock)
    tenant = Tenant(id="a", tokens_per_second=30)
    for _ in range(5):
        async with front.scheduler.turn(tenant, JOB, None):
            pass
    assert service(metrics, "a") == 0
    async with front.scheduler.turn(tenant, JOB, None) as turn:
        turn.submitted()
    assert service(metrics, "a") == 10
    with pytest.raises(RequestFailedError), front.scheduler.reserve(tenant, [JOB]):
        pass


@settings(deadline=None)
@given(
    rate=st.floats(0.5, 100),
    burst=st.floats(0.1, 10),
    requests=st.lists(
        st.tuples(st.floats(0, 3), st.floats(0, 20), st.integers(1, 60), st.integers(0, 60), st.integers(0, 60)),
        max_size=40,
    ),
)
def test_reservations_hold_the_rate_and_give_no_credit(
    rate: float, burst: float, requests: list[tuple[float, float, int, int, int]]
) -> None:
    """Each request: seconds since the one before, seconds that it runs, its prompt, longest answer, and answer."""
    clock = Clock()
    front, tenant = Front(clock=clock), Tenant(id="a", tokens_per_second=rate, burst_seconds=burst)
    bucket, capacity = front.quotas._account(tenant).tokens, max(1.0, rate * burst)
    running: list[tuple[float, ExitStack, Any, int]] = []
    began, used, largest = clock.now, 0, 0.0

    def level() -> float:
        return capacity - bucket.seconds_until(capacity, rate, capacity, clock.now) * rate

    def end(until: float) -> None:
        nonlocal used
        for each in sorted(running, key=lambda each: each[0]):
            at, stack, reserved, answer = each
            if at > until:
                continue
            clock.now = max(clock.now, at)
            taken, before = reserved.tokens, level()
            reserved.tokens -= answer
            stack.close()
            assert level() == pytest.approx(min(capacity, before + taken - answer), abs=1e-6)
            used += answer
            running.remove(each)
            assert used <= capacity + rate * (clock.now - began) + largest + 1e-3

    for pause, seconds, prompt, longest, answer in requests:
        end(clock.now + pause)
        clock.now += pause
        job = replace(JOB, prompt_ids=(1,) * prompt, sampling=Sampling(max_new_tokens=longest))
        stack, before = ExitStack(), level()
        try:
            reserved = stack.enter_context(front.scheduler.reserve(tenant, [job]))
        except RequestFailedError:
            assert before < min(capacity, prompt + longest)
            assert level() == pytest.approx(before, abs=1e-6)
            continue
        largest = max(largest, prompt + longest)
        assert level() == pytest.approx(before - prompt - longest, abs=1e-6)
        running.append((clock.now + seconds, stack, reserved, prompt + min(answer, longest)))
    end(clock.now + 100)
    assert not running
    clock.now += 1e6
    assert level() == pytest.approx(capacity)


async def test_counts_a_tenants_requests_from_receipt(clock: Clock) -> None:
    """A request that is being tokenized already holds a place, before it is in a queue."""
    front = Front(turns=8, clock=clock)
    tenant = Tenant(id="a", max_in_flight=2, max_queue=4)
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(front.admission.admit(tenant))
        with pytest.raises(RequestFailedError) as raised, front.admission.admit(tenant):
            pass
        assert details(raised.value)[1] == [("tenant:a", "4 requests in its queue, max_queue")]
        with front.admission.admit(B):
            pass
    with front.admission.admit(tenant, 6, 6):
        pass


async def test_a_batch_is_counted_whole_or_not_at_all(clock: Clock) -> None:
    front = Front(turns=8, clock=clock)
    tenant = Tenant(id="a", requests_per_second=4, max_in_flight=2, max_queue=3)

    def check_batch(tenant: Tenant, size: int) -> None:
        front.quotas.check_batch(tenant, size, front.scheduler.most_inside(tenant, Lane.TEXT))

    front.quotas.count_request(tenant)
    front.quotas.count_batch(tenant, 2)
    front.quotas.count_request(tenant)
    with pytest.raises(RequestFailedError) as raised:
        front.quotas.count_batch(tenant, 3)
    # The next attempt counts as three again: its call, and two more.
    assert details(raised.value) == (0.5, [("tenant:a", "4 requests_per_second")])
    clock.now += 0.5
    front.quotas.count_request(tenant)
    front.quotas.count_batch(tenant, 3)
    check_batch(tenant, 4)
    for limits, largest in (({}, 4), ({"requests_per_second": 100}, 5), ({"burst_seconds": 0.5}, 2)):
        with pytest.raises(RequestFailedError) as raised:
            check_batch(tenant.model_copy(update=limits), largest + 1)
        assert f"allow {largest} at once" in raised.value.message
        assert details(raised.value)[0] == 0
    check_batch(B, 12)
    with pytest.raises(RequestFailedError):
        check_batch(B, 13)


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
        assert details(raised.value)[1] == [("tenant:a", "1 requests in its queue, max_queue")]
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
        assert details(raised.value)[0] > 0
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
        assert details(raised.value)[0] == pytest.approx(1.0, abs=0.1)
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


async def test_forgets_tenants_that_are_gone(clock: Clock) -> None:
    front, done = Front(clock=clock), list[str]()
    tenant = Tenant(id="a", requests_per_second=1)
    front.quotas.count_request(tenant)
    await wait_for(front, tenant, done)
    front.admission.keep_only({"b"})
    # The tenant has a new bucket, which is full.
    front.quotas.count_request(tenant)


@settings(deadline=None)
@given(
    rate=st.floats(0.1, 100),
    capacity=st.floats(1, 100),
    takes=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 50)), max_size=50),
)
def test_a_bucket_gives_at_most_its_rate_and_one_burst(
    rate: float, capacity: float, takes: list[tuple[float, float]]
) -> None:
    bucket, now, taken, largest = TokenBucket(0.0), 0.0, 0.0, 0.0
    for pause, amount in takes:
        now += pause
        if bucket.seconds_until(1.0, rate, capacity, now) == 0:
            bucket.take(amount, rate, capacity, now)
            taken += amount
            largest = max(largest, amount)
    assert taken <= capacity + rate * now + largest + 1e-6


IMAGE = ImageJob(JOB.task, range(65), 0.25)


async def test_each_engine_has_turns_of_its_own_and_a_tenant_one_account(clock: Clock) -> None:
    metrics = Metrics()
    front = Front(1, image_turns=2, metrics=metrics, clock=clock)
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
    assert service(metrics, "a") == pytest.approx(10 + 2 * 65 * 0.25)


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
