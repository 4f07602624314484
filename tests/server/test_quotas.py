"""Quotas of requests, tokens, batches and queues, on a clock that a test moves."""

import asyncio
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import RequestFailedError
from server.job import Lane, Sampling
from server.tenants import Tenant
from tests.server.front import JOB, B, Clock, Front, hold, quota_details, settle, wait_for


async def test_limits_requests_per_second(clock: Clock) -> None:
    front = Front(clock=clock)
    tenant = Tenant(id="a", requests_per_second=2)
    for _ in range(2):
        front.quotas.count_request(tenant)
    with pytest.raises(RequestFailedError) as raised:
        front.quotas.count_request(tenant)
    assert quota_details(raised.value) == (0.5, [("tenant:a", "2 requests_per_second")])
    front.quotas.count_request(B)
    clock.now += 0.5
    front.quotas.count_request(tenant)
    # A quota that a reload raises holds for the next request.
    front.quotas.count_request(Tenant(id="a"))


async def test_forgets_tenants_that_are_gone(clock: Clock) -> None:
    front, done = Front(clock=clock), list[str]()
    tenant = Tenant(id="a", requests_per_second=1)
    front.quotas.count_request(tenant)
    await wait_for(front, tenant, done)
    front.admission.keep_only({"b"})
    # The tenant has a new bucket, which is full.
    front.quotas.count_request(tenant)


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
    assert quota_details(raised.value) == (0.5, [("tenant:a", "4 requests_per_second")])
    clock.now += 0.5
    front.quotas.count_request(tenant)
    front.quotas.count_batch(tenant, 3)
    check_batch(tenant, 4)
    for limits, largest in (({}, 4), ({"requests_per_second": 100}, 5), ({"burst_seconds": 0.5}, 2)):
        with pytest.raises(RequestFailedError) as raised:
            check_batch(tenant.model_copy(update=limits), largest + 1)
        assert f"allow {largest} at once" in raised.value.message
        assert quota_details(raised.value)[0] == 0
    check_batch(B, 12)
    with pytest.raises(RequestFailedError):
        check_batch(B, 13)


async def test_counts_a_tenants_requests_from_receipt(clock: Clock) -> None:
    """A request that is being tokenized already holds a place, before it is in a queue."""
    front = Front(turns=8, clock=clock)
    tenant = Tenant(id="a", max_in_flight=2, max_queue=4)
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(front.admission.admit(tenant))
        with pytest.raises(RequestFailedError) as raised, front.admission.admit(tenant):
            pass
        assert quota_details(raised.value)[1] == [("tenant:a", "4 requests in its queue, max_queue")]
        with front.admission.admit(B):
            pass
    with front.admission.admit(tenant, 6, 6):
        pass


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
            retry, quotas = quota_details(error)
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
        assert quota_details(raised.value) == (0.2, [("tenant:a", "100 tokens_per_second")])
        await hold(front, stack, B)
        for turn in turns:
            turn.served(5, clock.now)
    # 55 tokens are left of 100: 15 went to each.
    async with AsyncExitStack() as stack:
        await hold(front, stack, tenant)
        with pytest.raises(RequestFailedError) as raised:
            await hold(front, stack, tenant)
        assert quota_details(raised.value)[0] == pytest.approx(0.05)


async def test_a_request_above_the_burst_needs_a_full_bucket(clock: Clock) -> None:
    front, done = Front(clock=clock), list[str]()
    tenant = Tenant(id="a", tokens_per_second=10)
    await wait_for(front, tenant, done)
    # It took 10 tokens, its prompt.
    with pytest.raises(RequestFailedError) as raised:
        await wait_for(front, tenant, done)
    assert quota_details(raised.value)[0] == 0.1
    with pytest.raises(RequestFailedError) as raised, front.scheduler.reserve(tenant, [JOB]):
        pass
    assert quota_details(raised.value)[0] == 1.0
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
    front = Front(clock=clock)
    tenant = Tenant(id="a", tokens_per_second=30)
    for _ in range(5):
        async with front.scheduler.turn(tenant, JOB, None):
            pass
    assert front.service("a") == 0
    async with front.scheduler.turn(tenant, JOB, None) as turn:
        turn.submitted()
    assert front.service("a") == 10
    with pytest.raises(RequestFailedError), front.scheduler.reserve(tenant, [JOB]):
        pass


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
