"""Turns in the engines: as many as each can run, the next one by fairness, none that would end too late."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field

from server.errors import RequestFailedError, deadline_out_of_reach, resource_exhausted
from server.job import GenerationJob, Job, Lane
from server.scheduling.estimate import ServiceTimes
from server.scheduling.fair_queue import FairQueue
from server.scheduling.quotas import MIN_RETRY_S, Quotas, Reservation
from server.telemetry.metrics import Metrics
from server.tenants import Priority, Tenant

# A tenant's requests of one class. A trusted proxy may lower a request below its tenant's class, so a tenant may have
# several.
Line = tuple[str, Priority]
# Cost of a generated token relative to a prompt token, as in the paper: each generated token needs a step.
COMPLETION_COST = 2.0
# Most prompt tokens of batches handed to the engine between two steps; enough for a step at full speed.
_STEP_TOKENS = 512


def engine_turns(running: int) -> int:
    """Turns at a time: the sequences that a backbone's engines run, and a few more, so that none waits for the next.

    With answers of a dozen tokens, five sequences end in each full step of 64, and the next step begins before the
    server gets these answers.
    """
    return running + max(2, running // 8)


def batch_turns(running: int) -> int:
    """Most turns of all batches together: the rest is room for single requests."""
    return max(1, running - max(1, running // 32))


@dataclass(eq=False)
class Turn:
    """A request's turn in the engine. `served` counts its tokens; `aside` lends the turn while the request waits.

    batch: whether the request belongs to a batch whose turns are limited.
    """

    tenant: Tenant
    job: Job
    deadline: float | None
    reserved: Reservation
    batch: bool
    _scheduler: "Scheduler"
    # In the scheduler's seconds, 0 if it never began; and the turns in use then, with this one.
    began: float = 0.0
    beside: int = 0
    first_token_at: float = 0.0
    tokens: int = 0
    # Prompt positions charged so far.
    _prompt: int = 0
    _submitted: bool = False
    _granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    # For the request.

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Lend the turn to other requests while the block runs; at its end, wait for a turn ahead of all queued
        requests.

        The request still counts in the tenant's limits. At most as many requests as there are turns may be aside;
        further ones keep their turns.
        """
        self._scheduler.step_aside(self)
        yield
        # Do not use `finally`: a request that fails in the block must not get its turn back.
        await self._scheduler.come_back(self)

    def submitted(self) -> None:
        """Note that the engine has the request: its prompt stays charged, however the request ends."""
        self._submitted = True

    def found(self, cached: int) -> None:
        """Correct the charge for the prompt: `cached` of its tokens were not computed."""
        self._charge_prompt(len(self.job.prompt_ids) - cached)

    def served(self, tokens: int, first_token_at: float) -> None:
        """Count generated tokens; the request's first one came at `first_token_at`, in the clock's seconds.

        An answer without tokens, such as an image's label, was complete at this time.
        """
        self._submitted = True
        self.first_token_at = first_token_at
        self.tokens += tokens
        self._scheduler.charge(self, tokens, COMPLETION_COST)

    # For the scheduler.

    @property
    def line(self) -> Line:
        """The line in which it waits and whose counter is charged."""
        return self.tenant.id, self.tenant.priority

    @property
    def service(self) -> float:
        """What the request has cost, as the fair queue counts it."""
        return self._prompt * self.job.position_cost + self.tokens * COMPLETION_COST

    @property
    def decided(self) -> bool:
        """Whether it was granted or refused, or the request gave up."""
        return self._granted.done()

    async def granted(self) -> None:
        """Wait for `grant`. Raises what `refuse` got."""
        await self._granted

    def begin(self, now: float, beside: int) -> None:
        """The request has a turn, for the first time or again, while `beside` are in use."""
        self.began, self.beside = now, beside

    def grant(self) -> None:
        """Let the request go on, and charge its prompt."""
        self._charge_prompt(_computed(self.job))
        self._granted.set_result(None)

    def refuse(self, error: RequestFailedError) -> None:
        """End the request's wait with an error."""
        self._granted.set_exception(error)
        # Retrieve it, or asyncio logs it as never retrieved where the request was cancelled meanwhile.
        self._granted.exception()

    def end(self) -> None:
        """Charge no prompt that the engine never got."""
        if not self._submitted:
            self._charge_prompt(0)

    def _charge_prompt(self, computed: int) -> None:
        self._scheduler.charge(self, computed - self._prompt, self.job.position_cost)
        self._prompt = computed


@dataclass
class Turns:
    """The turns of one backbone's engines. Batches hold `most_batch` of them at most.

    Between two steps of the engine, batches get an eighth of all turns, or `_STEP_TOKENS` of prompts if that is more:
    the engine computes prompts in the order in which it gets them, so a request that comes after a batch waits for a
    step of its prompts, not for all of them.
    """

    most: int
    most_batch: int
    running: int = 0
    # Requests that lent their turns, and those of them that wait for a turn again.
    aside: set[Turn] = field(default_factory=set)
    returning: deque[tuple[Turn, asyncio.Future[None]]] = field(default_factory=deque)
    # Turns that batches hold; prompt tokens of those that began since the engine's last step.
    batch: int = 0
    fresh: dict[Turn, int] = field(default_factory=dict)

    @property
    def free(self) -> int:
        """Turns that nobody holds."""
        return self.most - self.running

    @property
    def full_of_batches(self) -> bool:
        """Whether batches must wait for the next step or for the end of one of their sequences."""
        shown = len(self.fresh) >= max(1, self.most // 8) and sum(self.fresh.values()) >= _STEP_TOKENS
        return shown or self.batch >= self.most_batch

    def enter(self, turn: Turn, now: float) -> None:
        """Give a turn."""
        self.running += 1
        if turn.batch:
            self.batch += 1
            self.fresh[turn] = _computed(turn.job)
        turn.begin(now, self.running)

    def leave(self, turn: Turn) -> None:
        """Take a turn back, for good or for a while."""
        self.running -= 1
        if turn.batch:
            self.batch -= 1
            # Undo the count since the last step: the engine may not have made a step, and may not make one.
            self.fresh.pop(turn, None)


class Scheduler:
    """All methods run on the event loop.

    lanes: the turns of each engine. max_queued: most requests that may wait for one engine, of all tenants together;
    above it, the tenant with the longest line by weight loses its newest request.
    """

    def __init__(
        self,
        lanes: Mapping[Lane, Turns],
        max_queued: int,
        quotas: Quotas,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._lanes = lanes
        self._max_queued = max_queued
        self._quotas = quotas
        self._metrics = metrics
        self._times = {lane: ServiceTimes(clock) for lane in lanes}
        self._queue: FairQueue[Line, Turn] = FairQueue(len(Lane))
        # By tenant: its lines, and its requests that have a turn.
        self._lines: dict[str, set[Line]] = {}
        self._running: Counter[str] = Counter()
        metrics.follow_turns(self._running_by_tenant, self.queued_by_tenant)

    def queued_by_tenant(self) -> Mapping[str, int]:
        """Requests that wait for their turn. From any thread."""
        return {name: queued for name in list(self._lines) if (queued := self._queued(name))}

    def _queued(self, tenant_id: str) -> int:
        return sum(self._queue.queued((tenant_id, priority)) for priority in Priority)

    def _running_by_tenant(self) -> Mapping[str, int]:
        return {name: running for name, running in list(self._running.items()) if running}

    def running(self, tenant: Tenant) -> int:
        """The tenant's requests that have a turn of any engine."""
        return self._running[tenant.id]

    def free(self, tenant: Tenant, lane: Lane) -> int:
        """Turns that a tenant's next requests would get at once."""
        left = self._most_running(tenant, lane) - self.running(tenant)
        return max(0, min(self._lanes[lane].free, left))

    def most_inside(self, tenant: Tenant, lane: Lane) -> int:
        """Requests of a tenant that may run or wait at a time."""
        waiting = self._max_queued if tenant.max_queue is None else min(tenant.max_queue, self._max_queued)
        return self._most_running(tenant, lane) + waiting

    def places(self, tenant: Tenant, size: int, lane: Lane) -> int:
        """Places that a batch holds at a time: enough for its turns, plus a few in the queue."""
        return min(size, self._lanes[lane].most_batch, self.most_inside(tenant, lane))

    def retry_s(self, tenant: Tenant, lane: Lane) -> float:
        """Seconds after which a tenant that was refused may have a turn."""
        return max(MIN_RETRY_S, self._wait_s(tenant, lane) or 1.0)

    def reserve(self, tenant: Tenant, jobs: Sequence[Job]) -> AbstractContextManager[Reservation]:
        """Reserve of the tenant's tokens what requests may take: prompts and longest answers. See `Quotas.reserve`."""
        if not tenant.has_quotas:
            return nullcontext(Reservation(0))
        return self._quotas.reserve(tenant, sum(_computed(job) + _longest(job) for job in jobs))

    @asynccontextmanager
    async def turn(
        self, tenant: Tenant, job: Job, deadline: float | None, reserved: Reservation | None = None
    ) -> AsyncIterator[Turn]:
        """Wait for the request's turn and hold it. `deadline` is in the clock's seconds.

        `reserved` is the reservation that the request shares; without one it reserves for itself.
        Raises DEADLINE_EXCEEDED for a deadline out of reach, and RESOURCE_EXHAUSTED when a line is full.
        """
        # Two kinds are not limited like batches: a further sequence, whose prompt is cached, and an image, which takes
        # one step.
        batch = reserved is not None and isinstance(job, GenerationJob) and not job.further
        with self.reserve(tenant, (job,)) if reserved is None else nullcontext(reserved) as held:
            turn = Turn(tenant, job, deadline, held, batch, self)
            self._check_deadline(turn)
            try:
                self._enqueue(turn)
                self._dispatch(job.lane)
                await turn.granted()
                yield turn
            finally:
                self._leave(turn)

    def stepped(self, lane: Lane) -> None:
        """An engine has made a step: what it was given before has begun."""
        self._lanes[lane].fresh.clear()
        if self._queue.length(lane):
            self._dispatch(lane)

    def step_aside(self, turn: Turn) -> None:
        """See `Turn.aside`."""
        turns = self._lanes[turn.job.lane]
        if len(turns.aside) < turns.most:
            turns.aside.add(turn)
            turns.leave(turn)
            self._dispatch(turn.job.lane)

    async def come_back(self, turn: Turn) -> None:
        """See `Turn.aside`."""
        turns = self._lanes[turn.job.lane]
        if turn not in turns.aside:
            return
        back = asyncio.get_running_loop().create_future()
        # `_dispatch` skips a cancelled future.
        turns.returning.append((turn, back))
        self._dispatch(turn.job.lane)
        await back

    def charge(self, turn: Turn, tokens: int, cost: float) -> None:
        """Charge a request's tokens to its reservation, and to its tenant in the fair queue."""
        self._queue.charge(turn.line, tokens * cost)
        turn.reserved.tokens -= tokens

    def keep_only(self, tenant_ids: Collection[str]) -> None:
        """Forget all other tenants that have no open request."""
        for name in self._lines.keys() - set(tenant_ids):
            if not self._running[name] and not self._queued(name):
                for line in self._lines.pop(name):
                    self._queue.forget(line)

    def _enqueue(self, turn: Turn) -> None:
        tenant, lane, lines = turn.tenant, turn.job.lane, self._lines.setdefault(turn.tenant.id, set())
        at_limit = self._at_limit(tenant)
        free = self._lanes[lane].free and not at_limit
        if turn.line not in lines:
            lines.add(turn.line)
            self._queue.block(turn.line, at_limit)
        self._queue.push(
            turn.line, turn, weight=tenant.weight, rank=tenant.priority.rank, priority=turn.job.priority, lane=lane
        )
        if self._queue.length(lane) > self._max_queued and not free:
            self._make_room(turn)

    def _make_room(self, newcomer: Turn) -> None:
        lane = newcomer.job.lane
        longest = self._queue.longest(lane)
        # If the lines are equally long, refuse the new request.
        if self._queue.length_by_weight(newcomer.line, lane) >= self._queue.length_by_weight(longest, lane):
            longest = newcomer.line
        dropped = self._queue.drop_newest(longest, lane)
        self._metrics.record_shed(dropped.tenant.id, "queue")
        failure = resource_exhausted(
            f"{self._max_queued} requests wait, the most this server queues", self.retry_s(dropped.tenant, lane)
        )
        if dropped is newcomer:
            raise failure
        # A request that was just cancelled has already made room.
        if not dropped.decided:
            dropped.refuse(failure)

    def _dispatch(self, lane: Lane) -> None:
        turns = self._lanes[lane]
        while turns.free > 0 and turns.returning:
            turn, back = turns.returning.popleft()
            if not back.done():
                turns.aside.remove(turn)
                turns.enter(turn, self.clock())
                back.set_result(None)
        while turns.free > 0 and self._queue.length(lane):
            entry = self._queue.pop(lane, _is_single if turns.full_of_batches else None)
            if entry is None:
                break
            _, turn = entry
            if turn.decided:
                continue
            if failure := self._too_late(turn):
                turn.refuse(failure)
                continue
            turns.enter(turn, self.clock())
            self._running[turn.tenant.id] += 1
            self._block(turn.tenant)
            turn.grant()

    def _leave(self, turn: Turn) -> None:
        if not turn.began:
            self._queue.remove(turn.line, turn)
            return
        lane, tenant = turn.job.lane, turn.tenant
        turns = self._lanes[lane]
        if turn in turns.aside:
            turns.aside.remove(turn)
        else:
            turns.leave(turn)
        turn.end()
        limited = self._at_limit(tenant)
        self._running[tenant.id] -= 1
        if not self._running[tenant.id]:
            del self._running[tenant.id]
        self._metrics.record_service(tenant.id, turn.service)
        self._block(tenant)
        if turn.first_token_at:
            first, whole = turn.first_token_at - turn.began, self.clock() - turn.began
            self._times[lane].observe(turn.job.task.spec.id, turn.tokens, first, whole, turn.beside)
        self._dispatch(lane)
        if limited:
            # The tenant's requests for the other engines were held back too.
            for other in self._lanes.keys() - {lane}:
                self._dispatch(other)

    def _block(self, tenant: Tenant) -> None:
        at_limit = self._at_limit(tenant)
        for line in self._lines[tenant.id]:
            self._queue.block(line, at_limit)

    def _at_limit(self, tenant: Tenant) -> bool:
        return tenant.max_in_flight is not None and self.running(tenant) >= tenant.max_in_flight

    def _most_running(self, tenant: Tenant, lane: Lane) -> int:
        most = self._lanes[lane].most
        return most if tenant.max_in_flight is None else min(most, tenant.max_in_flight)

    def _service_s(self, turn: Turn) -> float | None:
        job, turns = turn.job, self._lanes[turn.job.lane]
        return self._times[job.lane].service_s(job.task.spec.id, _longest(job), min(turns.running, turns.most))

    def _wait_s(self, tenant: Tenant, lane: Lane) -> float:
        """Seconds until a new request would get its turn; 0 without recent measurements."""
        turns = self._lanes[lane]
        if turns.free > 0 and not self._queue.length(lane):
            return 0.0
        line = (tenant.id, tenant.priority)
        ahead = self._queue.ahead_of(line, weight=tenant.weight, rank=tenant.priority.rank, lane=lane)
        return self._times[lane].wait_s(ahead + 1, turns.most) or 0.0

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
                max(MIN_RETRY_S, wait),
            )

    def _too_late(self, turn: Turn) -> RequestFailedError | None:
        if turn.deadline is None:
            return None
        left, service = turn.deadline - self.clock(), self._service_s(turn) or 0.0
        return self._out_of_reach(turn, left, service) if service > left else None

    def _out_of_reach(self, turn: Turn, left: float, service: float) -> RequestFailedError:
        self._metrics.record_shed(turn.tenant.id, "deadline")
        return deadline_out_of_reach(f"the deadline is {left:.2f} s away, the answer takes about {service:.2f} s")


def _is_single(turn: Turn) -> bool:
    return not turn.batch


def _computed(job: Job) -> int:
    """Prompt positions that the engine will compute, as known before it runs."""
    return len(job.prompt_ids) - job.shared


def _longest(job: Job) -> int:
    """Tokens of the longest possible answer."""
    return job.sampling.max_new_tokens if job.sampling else 0
