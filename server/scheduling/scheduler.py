"""Turns in the engine: as many as it can run, the next one by fairness, none that would end too late."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from server.errors import RequestFailedError, deadline_out_of_reach, quota_exceeded, resource_exhausted
from server.job import GenerationJob, Job, Lane
from server.scheduling.bucket import TokenBucket
from server.scheduling.estimate import ServiceTimes
from server.scheduling.fair_queue import FairQueue
from server.telemetry.metrics import Metrics
from server.tenants import Priority, Tenant

# A tenant's requests of one class. A trusted proxy may lower a request below its tenant's class, so a tenant may have
# several.
Line = tuple[str, Priority]
# Cost of a generated token, a prompt token's being 1, as in the paper: it takes a step of its own.
COMPLETION_COST = 2.0
# Prompt tokens of batches that the engine may get between two steps. A step with this many computes at full speed.
_STEP_TOKENS = 512
_MIN_RETRY_S = 0.05


def engine_turns(max_num_seqs: int) -> int:
    """Turns at a time: the sequences that the engine runs, and a few more so that it never waits for the next one.

    Answers of a dozen tokens end five at a time in a full step of 64, and the next step begins before this side knows.
    """
    return max_num_seqs + max(2, max_num_seqs // 8)


def batch_turns(max_num_seqs: int) -> int:
    """Turns that sequences of batches may hold, all together: the engine keeps room for a request that comes beside."""
    return max(1, max_num_seqs - max(1, max_num_seqs // 32))


@dataclass
class Reservation:
    """Tokens of a tenant's quota that requests may still take."""

    tokens: int


@dataclass(eq=False)
class Turn:
    """A request's stay in the engine. `served` counts its tokens, `aside` lets others run while it waits."""

    tenant: Tenant
    job: Job
    deadline: float | None
    _reserved: Reservation
    _scheduler: "Scheduler"
    _granted: asyncio.Future[None]
    _began: float = 0.0
    _beside: int = 0
    _first: float = 0.0
    _tokens: int = 0
    # Positions of the prompt that it was charged for.
    _prompt: int = 0
    _submitted: bool = False
    _away: bool = False
    # Whether it belongs to a batch, and the engine's step before it got its turn.
    _batch: bool = False
    _step: int = -1

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Lend the turn to other requests while the block runs; at its end, wait for a turn ahead of all queued
        requests.

        The tenant's limits count the request all the while. As many requests as there are turns may be aside; further
        ones keep their turns.
        """
        self._scheduler.step_aside(self)
        yield
        # No `finally`: a request that fails inside gives up its turn for good.
        await self._scheduler.come_back(self)

    def submitted(self) -> None:
        """The engine has the request: its prompt stays charged, however it ends."""
        self._submitted = True

    def found(self, cached: int) -> None:
        """Charge what was computed of the prompt: `cached` of its tokens were not."""
        computed = len(self.job.prompt_ids) - cached
        self._scheduler.charge(self, computed - self._prompt, self.job.position_cost)
        self._prompt = computed

    def served(self, tokens: int, first_token_at: float) -> None:
        """Count generated tokens; the request's first one came at `first_token_at`, in the clock's seconds.

        An answer without tokens, such as an image's label, came whole then.
        """
        self._submitted = True
        self._first = first_token_at
        self._tokens += tokens
        self._scheduler.charge(self, tokens, COMPLETION_COST)

    @property
    def line(self) -> Line:
        """The line that it waits in and is charged to."""
        return self.tenant.id, self.tenant.priority

    @property
    def begun(self) -> bool:
        """Whether a token was served."""
        return self._tokens > 0

    @property
    def service(self) -> float:
        """What the request has cost, as the fair queue counts it."""
        return self._prompt * self.job.position_cost + self._tokens * COMPLETION_COST


@dataclass
class _Account:
    """A tenant's buckets, its requests from receipt to end, and those of them that have a turn."""

    requests: TokenBucket
    tokens: TokenBucket
    inside: int = 0
    running: int = 0
    lines: set[Line] = field(default_factory=set)


@dataclass
class _Turns:
    """The turns of one engine, and how long they took. returning: requests aside that wait for a turn again.

    Batches hold `most_batch` turns at most. Between two steps of the engine they get an eighth of all turns, or
    `_STEP_TOKENS` of prompts if that is more: the engine computes prompts in the order in which it gets them, so a
    request that comes after a batch waits for a step of its prompts, not for all of them.
    """

    most: int
    most_batch: int
    times: ServiceTimes
    running: int = 0
    num_aside: int = 0
    returning: deque[tuple[Turn, asyncio.Future[None]]] = field(default_factory=deque)
    # Steps of the engine. Of batches: turns held; turns and prompt tokens since the last step.
    steps: int = 0
    batch: int = 0
    fresh: int = 0
    fresh_tokens: int = 0

    @property
    def full_of_batches(self) -> bool:
        """Whether batches have to wait for a step, or for an end of one of their sequences."""
        shown = self.fresh >= max(1, self.most // 8) and self.fresh_tokens >= _STEP_TOKENS
        return shown or self.batch >= self.most_batch

    def enter(self, turn: Turn) -> None:
        """Count a turn that is given."""
        self.running += 1
        if turn._batch:
            self.batch += 1
            self.fresh += 1
            self.fresh_tokens += _computed(turn.job)
            turn._step = self.steps

    def leave(self, turn: Turn) -> None:
        """Count a turn that ends, or is given up for a while."""
        self.running -= 1
        if turn._batch:
            self.batch -= 1
            # The engine may have made no step since it got the turn, and none may come.
            if turn._step == self.steps:
                self.fresh -= 1
                self.fresh_tokens -= _computed(turn.job)


@dataclass(frozen=True)
class Occupancy:
    """Requests that have their turn, and requests that wait for it."""

    running: int
    queued: int


class Scheduler:
    """All methods run on the event loop.

    turns: requests that the engine has at a time. most_batch: of these, sequences of batches; by default all.
    image_turns: turns of the engine of images. max_queued: requests that may wait for one engine, all tenants together;
    when more come, the tenant with the longest line for its weight loses its newest.
    """

    def __init__(
        self,
        turns: int,
        max_queued: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        *,
        image_turns: int = 1,
        most_batch: int | None = None,
    ) -> None:
        self.clock = clock
        self._metrics = metrics
        # Turns by lane.
        self._turns = [
            _Turns(turns, min(turns, most_batch or turns), ServiceTimes(clock)),
            _Turns(image_turns, image_turns, ServiceTimes(clock)),
        ]
        self._max_queued = max_queued
        self._queue: FairQueue[Line, Turn] = FairQueue(len(self._turns))
        self._accounts: dict[str, _Account] = {}
        metrics.follow_turns(self._running_by_tenant, self.queued_by_tenant)

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(sum(turns.running for turns in self._turns), len(self._queue))

    def queued_by_tenant(self) -> Mapping[str, int]:
        """Requests that wait for their turn. From any thread."""
        return {name: queued for name in list(self._accounts) if (queued := self._queued(name))}

    def _queued(self, tenant_id: str) -> int:
        return sum(self._queue.queued((tenant_id, priority)) for priority in Priority)

    def _running_by_tenant(self) -> Mapping[str, int]:
        return {name: each.running for name, each in list(self._accounts.items()) if each.running}

    def count_request(self, tenant: Tenant, n: int = 1) -> None:
        """Count requests against their tenant's rate, all or none. Raises RESOURCE_EXHAUSTED, with until when."""
        if (rate := tenant.requests_per_second) is not None:
            self._take_requests(tenant, rate, n, until=n)

    def count_batch(self, tenant: Tenant, size: int) -> None:
        """Count the others of a batch whose call was counted as one request. Raises RESOURCE_EXHAUSTED."""
        if (rate := tenant.requests_per_second) is not None and size > 1:
            # The next attempt is counted as a call again.
            self._take_requests(tenant, rate, size - 1, until=size)

    def places(self, tenant: Tenant, size: int, lane: Lane = Lane.TEXT) -> int:
        """Places that a batch holds while its other sequences wait: enough for its turns, and few in the queue."""
        return min(size, self._turns[lane].most_batch, self._most_inside(tenant, lane))

    def check_batch(self, tenant: Tenant, size: int, places: int | None = None, lane: Lane = Lane.TEXT) -> None:
        """Raise RESOURCE_EXHAUSTED, without a time to retry, for a batch that no wait lets in.

        places: how many of its sequences it holds at a time; by default all.
        """
        inside = self._most_inside(tenant, lane)
        largest = inside if places is None or places >= size else max(size, inside)
        if (rate := tenant.requests_per_second) is not None:
            largest = min(largest, int(_capacity(tenant, rate)))
        if size > largest:
            raise self._over_quota(tenant, "batch", f"a batch of {size}, its limits let in {largest} at once", None)

    @contextmanager
    def admit(self, tenant: Tenant, requests: int = 1, lane: Lane = Lane.TEXT) -> Iterator[None]:
        """Hold places of a tenant from receipt to end: `max_in_flight` and `max_queue` together bound them.

        Raises RESOURCE_EXHAUSTED where its queue is full, or its tokens are used up.
        """
        account = self._account(tenant)
        if tenant.max_queue is not None:
            turns = self._turns[lane]
            free = min(turns.most - turns.running, self._most_running(tenant, lane) - account.running)
            if account.inside - account.running + requests > tenant.max_queue + max(0, free):
                found = f"{tenant.max_queue} requests in its queue, max_queue"
                raise self._over_quota(tenant, "max_queue", found, self._retry_s(tenant, lane))
        if (rate := tenant.tokens_per_second) is not None:
            self._check_tokens(tenant, rate, 1)
        account.inside += requests
        try:
            yield
        finally:
            account.inside -= requests

    @contextmanager
    def reserve(self, tenant: Tenant, jobs: Sequence[Job]) -> Iterator[Reservation]:
        """Set aside what requests may take of `tokens_per_second`: prompts and longest answers, for all or for none.

        What they did not take returns at the end. More than the bucket holds needs a full one and leaves a debt.
        Raises RESOURCE_EXHAUSTED.
        """
        reserved = self._reserve(tenant, jobs)
        try:
            yield reserved
        finally:
            self._release(tenant, reserved)

    @asynccontextmanager
    async def turn(
        self, tenant: Tenant, job: Job, deadline: float | None, reserved: Reservation | None = None
    ) -> AsyncIterator[Turn]:
        """Wait for the request's turn and hold it. `deadline` is in the clock's seconds.

        `reserved` is the reservation that the request shares; without one it reserves for itself.
        Raises DEADLINE_EXCEEDED for a deadline out of reach, and RESOURCE_EXHAUSTED when a line is full.
        """
        own = self._reserve(tenant, (job,)) if reserved is None else Reservation(0)
        turn = Turn(tenant, job, deadline, reserved or own, self, asyncio.get_running_loop().create_future())
        # Do not limit two kinds like batches: a further sequence finds its prompt in the cache, and an image takes one
        # step.
        turn._batch = reserved is not None and isinstance(job, GenerationJob) and not job.further
        try:
            self._check_deadline(turn)
            try:
                self._enqueue(turn)
                self._dispatch(job.lane)
                await turn._granted
                yield turn
            finally:
                self._leave(turn)
        finally:
            self._release(tenant, own)

    def stepped(self) -> None:
        """The engine of texts has made a step: what it was given before has begun."""
        turns = self._turns[Lane.TEXT]
        turns.steps += 1
        turns.fresh = turns.fresh_tokens = 0
        if self._queue.length(Lane.TEXT):
            self._dispatch(Lane.TEXT)

    def step_aside(self, turn: Turn) -> None:
        """See `Turn.aside`."""
        turns = self._turns[turn.job.lane]
        if turns.num_aside < turns.most:
            turn._away = True
            turns.num_aside += 1
            turns.leave(turn)
            self._dispatch(turn.job.lane)

    async def come_back(self, turn: Turn) -> None:
        """See `Turn.aside`."""
        if not turn._away:
            return
        back = asyncio.get_running_loop().create_future()
        # `_dispatch` passes over a future that was cancelled.
        self._turns[turn.job.lane].returning.append((turn, back))
        self._dispatch(turn.job.lane)
        await back

    def charge(self, turn: Turn, tokens: int, cost: float) -> None:
        """Charge a request's tokens to its reservation, and to its tenant in the fair queue."""
        self._queue.charge(turn.line, tokens * cost)
        turn._reserved.tokens -= tokens

    def keep_only(self, tenant_ids: Collection[str]) -> None:
        """Forget each tenant that is not among these and has no request here."""
        for name in [name for name in self._accounts if name not in tenant_ids]:
            if not self._accounts[name].inside and not self._queued(name):
                for line in self._accounts.pop(name).lines:
                    self._queue.forget(line)

    def _enqueue(self, turn: Turn) -> None:
        tenant, lane, account = turn.tenant, turn.job.lane, self._account(turn.tenant)
        at_limit = self._at_limit(tenant)
        free = self._turns[lane].running < self._turns[lane].most and not at_limit
        if turn.line not in account.lines:
            account.lines.add(turn.line)
            self._queue.block(turn.line, at_limit)
        self._queue.push(
            turn.line, turn, weight=tenant.weight, rank=tenant.priority.rank, priority=turn.job.priority, lane=lane
        )
        if self._queue.length(lane) > self._max_queued and not free:
            self._make_room(turn)

    def _make_room(self, newcomer: Turn) -> None:
        lane = newcomer.job.lane
        longest = self._queue.longest(lane)
        assert longest is not None
        # Among equals, refuse the newcomer.
        if self._queue.length_by_weight(newcomer.line, lane) >= self._queue.length_by_weight(longest, lane):
            longest = newcomer.line
        dropped = self._queue.drop_newest(longest, lane)
        self._metrics.record_shed(dropped.tenant.id, "queue")
        failure = resource_exhausted(
            f"{self._max_queued} requests wait, the most this server queues", self._retry_s(dropped.tenant, lane)
        )
        if dropped is newcomer:
            raise failure
        # A request that was cancelled just now has made room by itself.
        if not dropped._granted.done():
            dropped._granted.set_exception(failure)

    def _dispatch(self, lane: Lane) -> None:
        turns = self._turns[lane]
        while turns.running < turns.most and turns.returning:
            turn, back = turns.returning.popleft()
            if not back.done():
                turn._away = False
                turns.num_aside -= 1
                self._occupy(turn, turns)
                back.set_result(None)
        while turns.running < turns.most:
            entry = self._queue.pop(lane, _is_single if turns.full_of_batches else None)
            if entry is None:
                break
            _, turn = entry
            if turn._granted.done():
                continue
            if failure := self._too_late(turn):
                turn._granted.set_exception(failure)
                continue
            self._occupy(turn, turns)
            self._account(turn.tenant).running += 1
            self._block(turn.tenant)
            turn._prompt = _computed(turn.job)
            self.charge(turn, turn._prompt, turn.job.position_cost)
            turn._granted.set_result(None)

    def _occupy(self, turn: Turn, turns: _Turns) -> None:
        turns.enter(turn)
        turn._began, turn._beside = self.clock(), turns.running

    def _leave(self, turn: Turn) -> None:
        if not turn._began:
            self._queue.remove(turn.line, turn)
            if turn._granted.done() and not turn._granted.cancelled():
                # Retrieve the exception, or asyncio logs it as never retrieved.
                turn._granted.exception()
            return
        turns = self._turns[turn.job.lane]
        if turn._away:
            turns.num_aside -= 1
        else:
            turns.leave(turn)
        if not turn._submitted:
            self.charge(turn, -turn._prompt, turn.job.position_cost)
            turn._prompt = 0
        limited = self._at_limit(turn.tenant)
        self._account(turn.tenant).running -= 1
        self._metrics.record_service(turn.tenant.id, turn.service)
        self._block(turn.tenant)
        if turn._first:
            first, whole = turn._first - turn._began, self.clock() - turn._began
            turns.times.observe(turn.job.task.spec.id, turn._tokens, first, whole, turn._beside)
        self._dispatch(turn.job.lane)
        if limited:
            # The tenant's requests for the other engine were held back too.
            self._dispatch(Lane.IMAGES if turn.job.lane is Lane.TEXT else Lane.TEXT)

    def _block(self, tenant: Tenant) -> None:
        at_limit = self._at_limit(tenant)
        for line in self._account(tenant).lines:
            self._queue.block(line, at_limit)

    def _at_limit(self, tenant: Tenant) -> bool:
        return tenant.max_in_flight is not None and self._account(tenant).running >= tenant.max_in_flight

    def _most_running(self, tenant: Tenant, lane: Lane) -> int:
        most = self._turns[lane].most
        return most if tenant.max_in_flight is None else min(most, tenant.max_in_flight)

    def _most_inside(self, tenant: Tenant, lane: Lane) -> int:
        waiting = self._max_queued if tenant.max_queue is None else min(tenant.max_queue, self._max_queued)
        return self._most_running(tenant, lane) + waiting

    def _take_requests(self, tenant: Tenant, rate: float, n: int, *, until: int) -> None:
        bucket, capacity, now = self._account(tenant).requests, _capacity(tenant, rate), self.clock()
        if bucket.seconds_until(n, rate, capacity, now):
            wait = bucket.seconds_until(until, rate, capacity, now)
            raise self._over_quota(tenant, "requests_per_second", f"{rate:g} requests_per_second", wait)
        bucket.take(n, rate, capacity, now)

    def _reserve(self, tenant: Tenant, jobs: Sequence[Job]) -> Reservation:
        if (rate := tenant.tokens_per_second) is None:
            return Reservation(0)
        tokens = sum(_computed(job) + _longest(job) for job in jobs)
        self._check_tokens(tenant, rate, tokens)
        self._account(tenant).tokens.take(tokens, rate, _capacity(tenant, rate), self.clock())
        return Reservation(tokens)

    def _release(self, tenant: Tenant, reserved: Reservation) -> None:
        if (rate := tenant.tokens_per_second) is not None and reserved.tokens:
            self._account(tenant).tokens.give_back(reserved.tokens, rate, _capacity(tenant, rate), self.clock())

    def _check_tokens(self, tenant: Tenant, rate: float, tokens: int) -> None:
        if wait := self._account(tenant).tokens.seconds_until(tokens, rate, _capacity(tenant, rate), self.clock()):
            raise self._over_quota(tenant, "tokens_per_second", f"{rate:g} tokens_per_second", wait)

    def _account(self, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.id)
        if account is None:
            now = self.clock()
            account = self._accounts[tenant.id] = _Account(TokenBucket(now), TokenBucket(now))
        return account

    def _service_s(self, turn: Turn) -> float | None:
        job, turns = turn.job, self._turns[turn.job.lane]
        return turns.times.service_s(job.task.spec.id, _longest(job), min(turns.running, turns.most))

    def _wait_s(self, tenant: Tenant, lane: Lane) -> float:
        """Seconds until a request that comes now would get its turn; 0 when nothing was measured lately."""
        turns = self._turns[lane]
        if turns.running < turns.most and not self._queue.length(lane):
            return 0.0
        line = (tenant.id, tenant.priority)
        ahead = self._queue.ahead_of(line, weight=tenant.weight, rank=tenant.priority.rank, lane=lane)
        return turns.times.wait_s(ahead + 1, turns.most) or 0.0

    def _retry_s(self, tenant: Tenant, lane: Lane) -> float:
        return max(_MIN_RETRY_S, self._wait_s(tenant, lane) or 1.0)

    def _check_deadline(self, turn: Turn) -> None:
        if turn.deadline is None or (service := self._service_s(turn)) is None:
            return
        left = turn.deadline - self.clock()
        if service > left:
            raise self._out_of_reach(turn, left, service)
        if (wait := self._wait_s(turn.tenant, turn.job.lane)) + service > left:
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

    def _over_quota(self, tenant: Tenant, quota: str, found: str, retry_s: float | None) -> RequestFailedError:
        """`retry_s` is None where no wait helps."""
        self._metrics.record_quota_refusal(tenant.id, quota)
        retry_s = None if retry_s is None else max(_MIN_RETRY_S, retry_s)
        return quota_exceeded(f"tenant:{tenant.id}", found, retry_s)


def _is_single(turn: Turn) -> bool:
    return not turn._batch


def _computed(job: Job) -> int:
    """Positions of a prompt that the engine will compute, as far as is known before."""
    return len(job.prompt_ids) - job.shared


def _longest(job: Job) -> int:
    """Tokens of the longest answer."""
    return job.sampling.max_new_tokens if job.sampling else 0


def _capacity(tenant: Tenant, rate: float) -> float:
    """What a bucket of the tenant holds."""
    return max(1.0, rate * tenant.burst_seconds)
