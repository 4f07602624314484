"""The door of the server: whether a request may enter, and its place from receipt to end."""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from server.accounting import Usage
from server.errors import RESTART_RETRY_S, resource_exhausted, unavailable
from server.job import Lane
from server.scheduling.quotas import Quotas
from server.scheduling.scheduler import Scheduler
from server.telemetry.metrics import Metrics
from server.tenants import OPEN_TENANT, Tenant


class State(Enum):
    STARTING = "the engine is not ready yet"
    SERVING = "serving"
    DRAINING = "the server is draining"
    RESTARTING = "the engine has died and is being started again"


_RETRY_AFTER_S = {State.STARTING: 5.0, State.DRAINING: 1.0, State.RESTARTING: RESTART_RETRY_S}


class Admission:
    """Admits requests while the server is serving and has room; `drained` waits for the last one.

    max_in_flight: requests for one engine. spare: places that one tenant must leave to others. This limit is needed
    because a request that is still being decoded or checked is in no queue, so the limit of queues does not apply to
    it. lost: engines that are being restarted while another one serves.
    """

    def __init__(
        self,
        max_in_flight: int,
        scheduler: Scheduler,
        quotas: Quotas,
        usage: Usage,
        metrics: Metrics,
        *,
        spare: int,
    ) -> None:
        self.state = State.STARTING
        self.lost: set[Lane] = set()
        self._max_in_flight = max_in_flight
        self._most_of_tenant = max_in_flight - spare
        self._scheduler = scheduler
        self._quotas = quotas
        self._usage = usage
        self._metrics = metrics
        self._running: set[asyncio.Task[Any]] = set()
        # Requests in flight, by lane.
        self._in_flight = [0] * len(Lane)
        self._of_tenant: Counter[tuple[str, Lane]] = Counter()
        metrics.in_flight.set_function(lambda: sum(self._in_flight))
        self._aborting = False
        self._idle = asyncio.Event()
        self._idle.set()

    def check_serving(self) -> None:
        """Raise UNAVAILABLE unless the server is serving."""
        if self.state is not State.SERVING:
            raise unavailable(self.state.value, _RETRY_AFTER_S[self.state])

    @contextmanager
    def admit_batch(self, tenant: Tenant, size: int, places: int, lane: Lane) -> Iterator[None]:
        """Admit a batch of this many requests, which holds so many places; see `admit`."""
        # A batch that takes its places in turns is never too large for them.
        most = self._scheduler.most_inside(tenant, lane) if places >= size else size
        self._quotas.check_batch(tenant, size, most)
        with self.admit(tenant, size, places, lane):
            self._quotas.count_batch(tenant, size)
            yield

    @contextmanager
    def admit(self, tenant: Tenant, requests: int = 1, places: int = 1, lane: Lane = Lane.TEXT) -> Iterator[None]:
        """Hold places for requests of a tenant, which the current task runs, from receipt to end.

        Raises UNAVAILABLE; RESOURCE_EXHAUSTED where the server is full, or a quota or budget of the tenant is used up.
        """
        self.check_serving()
        if lane in self.lost:
            raise unavailable(State.RESTARTING.value, RESTART_RETRY_S)
        self._check_room(tenant, places, lane)
        if tenant.has_quotas:
            self._check_quotas(tenant, places, lane)
        if tenant.has_budget or self._usage.stuck:
            self._usage.check(tenant, requests)
        task, key = asyncio.current_task(), (tenant.id, lane)
        assert task is not None
        self._running.add(task)
        self._in_flight[lane] += places
        self._of_tenant[key] += places
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if self._aborting:
                raise unavailable("the server stopped before the answer was complete", 1.0) from None
            raise
        finally:
            self._running.discard(task)
            self._in_flight[lane] -= places
            self._of_tenant[key] -= places
            if not self._of_tenant[key]:
                del self._of_tenant[key]
            if not self._running:
                self._idle.set()

    def keep_only(self, tenant_ids: Collection[str]) -> None:
        """Forget each tenant that is not among these and has no request here."""
        kept = {*tenant_ids, *(tenant_id for tenant_id, _ in self._of_tenant)}
        self._quotas.keep_only(kept)
        self._scheduler.keep_only(kept)

    def _check_room(self, tenant: Tenant, places: int, lane: Lane) -> None:
        if self._in_flight[lane] + places > self._max_in_flight:
            self._metrics.record_shed(tenant.id, "in_flight")
            raise resource_exhausted(f"{self._max_in_flight} requests are in flight, the most this server admits", 1.0)
        if self._of_tenant[tenant.id, lane] + places > self._most_of_tenant and tenant.id != OPEN_TENANT.id:
            self._metrics.record_shed(tenant.id, "in_flight")
            raise resource_exhausted(
                f"{self._most_of_tenant} requests of this tenant are in flight, the most that one tenant may have", 1.0
            )

    def _check_quotas(self, tenant: Tenant, places: int, lane: Lane) -> None:
        scheduler, inside = self._scheduler, sum(self._of_tenant[tenant.id, each] for each in Lane)
        waiting = inside + places - scheduler.running(tenant) - scheduler.free(tenant, lane)
        self._quotas.check_queue(tenant, waiting, lambda: scheduler.retry_s(tenant, lane))
        self._quotas.check_tokens(tenant)

    async def drained(self, timeout: float) -> bool:
        """Wait until no request is in flight; False if that takes more than `timeout` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def abort_running(self) -> None:
        """End every request in flight with UNAVAILABLE."""
        self._aborting = True
        for task in self._running:
            task.cancel()
