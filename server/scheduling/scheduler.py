"""Turns in the engine: as many as it can run, the next one by fairness, none that would end too late."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.errors import RequestFailedError, deadline_out_of_reach, quota_exceeded, resource_exhausted
from server.job import GenerationJob
from server.scheduling.bucket import TokenBucket
from server.scheduling.estimate import ServiceTimes
from server.scheduling.fair_queue import FairQueue
from server.telemetry.metrics import Metrics
from server.tenants import Tenant

# What a token costs, as in the paper: a generated one takes a step of its own.
PROMPT_COST = 1.0
COMPLETION_COST = 2.0
_MIN_RETRY_S = 0.05


def engine_turns(max_num_seqs: int) -> int:
    """Turns at a time: the sequences that the engine runs, and a few more so that it never waits for the next one.

    Answers of a dozen tokens end five at a time in a full step of 64, and the next step begins before this side knows.
    """
    return max_num_seqs + max(2, max_num_seqs // 8)


@dataclass(eq=False)
class Turn:
    """A request's stay in the engine. `served` counts its tokens, `aside` lets others run while it waits."""

    tenant: Tenant
    job: GenerationJob
    deadline: float | None
    _scheduler: "Scheduler"
    _granted: asyncio.Future[None]
    _began: float = 0.0
    _beside: int = 0
    _first: float = 0.0
    _tokens: int = 0
    _away: bool = False

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Give the turn to others inside; at the end, get it back before every request that queues.

        The tenant's limits count the request all the while. As many requests as there are turns may be aside; further
        ones keep their turns.
        """
        self._scheduler.step_aside(self)
        yield
        # A request that fails inside does not come back.
        await self._scheduler.come_back(self)

    def served(self, tokens: int, first_token_at: float) -> None:
        """Count generated tokens; the request's first one came at `first_token_at`, in the clock's seconds."""
        self._first = first_token_at
        self._tokens += tokens
        self._scheduler.charge(self.tenant, tokens, COMPLETION_COST)

    @property
    def service(self) -> float:
        """What the request has cost, as the fair queue counts it."""
        return len(self.job.prompt_ids) * PROMPT_COST + self._tokens * COMPLETION_COST


@dataclass
class _Account:
    """A tenant's buckets and running requests."""

    requests: TokenBucket
    tokens: TokenBucket
    running: int = 0


@dataclass(frozen=True)
class Occupancy:
    """Requests that have their turn, and requests that wait for it."""

    running: int
    queued: int


class Scheduler:
    """All methods run on the event loop.

    turns: requests that the engine has at a time. max_queued: requests that may wait, all tenants together; when more
    come, the tenant with the longest line for its weight loses its newest.
    """

    def __init__(
        self,
        turns: int,
        max_queued: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._metrics = metrics
        self._times = ServiceTimes(clock)
        self._turns = turns
        self._max_queued = max_queued
        self._queue: FairQueue[Turn] = FairQueue()
        self._accounts: dict[str, _Account] = {}
        self._running = 0
        self._num_aside = 0
        # Requests aside that wait for a turn again.
        self._returning: deque[tuple[Turn, asyncio.Future[None]]] = deque()
        metrics.follow_turns(self._running_by_tenant, self.queued_by_tenant)

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(self._running, len(self._queue))

    def queued_by_tenant(self) -> Mapping[str, int]:
        """Requests that wait for their turn. From any thread."""
        return {name: queued for name in list(self._accounts) if (queued := self._queue.queued(name))}

    def _running_by_tenant(self) -> Mapping[str, int]:
        return {name: each.running for name, each in list(self._accounts.items()) if each.running}

    def count_request(self, tenant: Tenant, n: int = 1) -> None:
        """Count `n` requests against their tenant's rate. Raises RESOURCE_EXHAUSTED."""
        if (rate := tenant.requests_per_second) is not None:
            account, now, capacity = self._account(tenant), self.clock(), max(1.0, rate * tenant.burst_seconds)
            if wait := account.requests.seconds_until(n, rate, capacity, now):
                raise self._over_quota(tenant, "requests_per_second", f"{rate:g} requests_per_second", wait)
            account.requests.take(n, rate, capacity, now)

    def check_quotas(self, tenant: Tenant) -> None:
        """Raise RESOURCE_EXHAUSTED, with until when, if the tenant's token rate is used up."""
        if (rate := tenant.tokens_per_second) is not None:
            account, now, capacity = self._account(tenant), self.clock(), max(1.0, rate * tenant.burst_seconds)
            if wait := account.tokens.seconds_until(1.0, rate, capacity, now):
                raise self._over_quota(tenant, "tokens_per_second", f"{rate:g} tokens_per_second", wait)

    @asynccontextmanager
    async def turn(self, tenant: Tenant, job: GenerationJob, deadline: float | None) -> AsyncIterator[Turn]:
        """Wait for the request's turn and hold it. `deadline` is in the clock's seconds.

        Raises DEADLINE_EXCEEDED for a deadline out of reach, and RESOURCE_EXHAUSTED when a line is full.
        """
        turn = Turn(tenant, job, deadline, self, asyncio.get_running_loop().create_future())
        self._check_deadline(turn)
        self._enqueue(turn)
        try:
            self._dispatch()
            await turn._granted
            yield turn
        finally:
            self._leave(turn)

    def step_aside(self, turn: Turn) -> None:
        """See `Turn.aside`."""
        if self._num_aside < self._turns:
            turn._away = True
            self._num_aside += 1
            self._running -= 1
            self._dispatch()

    async def come_back(self, turn: Turn) -> None:
        """See `Turn.aside`."""
        if not turn._away:
            return
        back = asyncio.get_running_loop().create_future()
        # `_dispatch` passes over a future that was cancelled.
        self._returning.append((turn, back))
        self._dispatch()
        await back

    def charge(self, tenant: Tenant, tokens: int, cost: float) -> None:
        """Count tokens against a tenant's quota and its place in the queue."""
        self._queue.charge(tenant.id, tokens * cost)
        if (rate := tenant.tokens_per_second) is not None:
            bucket = self._account(tenant).tokens
            bucket.take(tokens, rate, max(1.0, rate * tenant.burst_seconds), self.clock())

    def keep_only(self, tenant_ids: Collection[str]) -> None:
        """Forget every other tenant that has no request here."""
        for name in [name for name in self._accounts if name not in tenant_ids]:
            if not self._accounts[name].running and not self._queue.queued(name):
                del self._accounts[name]
                self._queue.forget(name)

    def _enqueue(self, turn: Turn) -> None:
        tenant = turn.tenant
        free = self._running < self._turns and not self._at_limit(tenant)
        if tenant.max_queue is not None and not free and self._queue.queued(tenant.id) >= tenant.max_queue:
            found = f"{tenant.max_queue} requests in its queue, max_queue"
            raise self._over_quota(tenant, "max_queue", found, self._retry_s(turn))
        self._account(tenant)
        self._queue.push(tenant.id, turn, weight=tenant.weight, rank=tenant.priority.rank)
        if len(self._queue) > self._max_queued and not free:
            self._make_room(turn)

    def _make_room(self, newcomer: Turn) -> None:
        longest = self._queue.longest()
        assert longest is not None
        # Between equals the newcomer goes.
        if self._queue.length_by_weight(newcomer.tenant.id) >= self._queue.length_by_weight(longest):
            longest = newcomer.tenant.id
        dropped = self._queue.drop_newest(longest)
        self._metrics.record_shed(longest, "queue")
        failure = resource_exhausted(
            f"{self._max_queued} requests wait, the most this server queues", self._retry_s(dropped)
        )
        if dropped is newcomer:
            raise failure
        dropped._granted.set_exception(failure)

    def _dispatch(self) -> None:
        while self._running < self._turns and self._returning:
            turn, back = self._returning.popleft()
            if not back.done():
                turn._away = False
                self._num_aside -= 1
                self._occupy(turn)
                back.set_result(None)
        while self._running < self._turns and (entry := self._queue.pop()):
            _, turn = entry
            if turn._granted.done():
                continue
            if failure := self._too_late(turn):
                turn._granted.set_exception(failure)
                continue
            self._occupy(turn)
            self._account(turn.tenant).running += 1
            self._block(turn.tenant)
            self.charge(turn.tenant, len(turn.job.prompt_ids), PROMPT_COST)
            turn._granted.set_result(None)

    def _occupy(self, turn: Turn) -> None:
        self._running += 1
        turn._began, turn._beside = self.clock(), self._running

    def _leave(self, turn: Turn) -> None:
        if not turn._began:
            self._queue.remove(turn.tenant.id, turn)
            if turn._granted.done() and not turn._granted.cancelled():
                # Retrieve the exception, or asyncio logs it as never retrieved.
                turn._granted.exception()
            return
        if turn._away:
            self._num_aside -= 1
        else:
            self._running -= 1
        self._account(turn.tenant).running -= 1
        self._metrics.record_service(turn.tenant.id, turn.service)
        self._block(turn.tenant)
        if turn._first:
            first, whole = turn._first - turn._began, self.clock() - turn._began
            self._times.observe(turn.job.task.spec.id, turn._tokens, first, whole, turn._beside)
        self._dispatch()

    def _block(self, tenant: Tenant) -> None:
        self._queue.block(tenant.id, self._at_limit(tenant))

    def _at_limit(self, tenant: Tenant) -> bool:
        return tenant.max_in_flight is not None and self._account(tenant).running >= tenant.max_in_flight

    def _account(self, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.id)
        if account is None:
            now = self.clock()
            account = self._accounts[tenant.id] = _Account(TokenBucket(now), TokenBucket(now))
        return account

    def _service_s(self, turn: Turn) -> float | None:
        job = turn.job
        return self._times.service_s(job.task.spec.id, job.sampling.max_new_tokens, min(self._running, self._turns))

    def _wait_s(self, turn: Turn) -> float:
        """Seconds until the request would get its turn if it came now; 0 when nothing was measured lately."""
        if self._running < self._turns and not len(self._queue):
            return 0.0
        ahead = self._queue.ahead_of(turn.tenant.id, weight=turn.tenant.weight, rank=turn.tenant.priority.rank)
        return self._times.wait_s(ahead + 1, self._turns) or 0.0

    def _retry_s(self, turn: Turn) -> float:
        return max(_MIN_RETRY_S, self._wait_s(turn) or 1.0)

    def _check_deadline(self, turn: Turn) -> None:
        if turn.deadline is None or (service := self._service_s(turn)) is None:
            return
        left = turn.deadline - self.clock()
        if service > left:
            raise self._out_of_reach(turn, left, service)
        if (wait := self._wait_s(turn)) + service > left:
            self._metrics.record_shed(turn.tenant.id, "deadline")
            raise resource_exhausted(
                f"the deadline is {left:.2f} s away, the queue takes about {wait:.2f} s and the answer {service:.2f} s",
                max(_MIN_RETRY_S, wait),
            )

    def _too_late(self, turn: Turn) -> RequestFailedError | None:
        if turn.deadline is None:
            return None
        left, service = turn.deadline - self.clock(), self._service_s(turn) or 0.0
        return self._out_of_reach(turn, left, service) if service > left else None

    def _out_of_reach(self, turn: Turn, left: float, service: float) -> RequestFailedError:
        self._metrics.record_shed(turn.tenant.id, "deadline")
        return deadline_out_of_reach(f"the deadline is {left:.2f} s away, the answer takes about {service:.2f} s")

    def _over_quota(self, tenant: Tenant, quota: str, found: str, retry_s: float) -> RequestFailedError:
        self._metrics.record_quota_refusal(tenant.id, quota)
        return quota_exceeded(f"tenant:{tenant.id}", found, max(_MIN_RETRY_S, retry_s))
