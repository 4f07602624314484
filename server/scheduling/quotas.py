"""What a tenant may take of the server: requests and tokens a second, the size of a batch, the length of its queue.

Every refusal is RESOURCE_EXHAUSTED and names the quota, with the seconds until it may be taken.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.errors import RequestFailedError, quota_exceeded
from server.scheduling.bucket import TokenBucket
from server.telemetry.metrics import Metrics
from server.tenants import Tenant

MIN_RETRY_S = 0.05


@dataclass
class Reservation:
    """Tokens that a tenant's requests have reserved and not used yet."""

    tokens: int


@dataclass
class _Account:
    """A tenant's buckets."""

    requests: TokenBucket
    tokens: TokenBucket


class Quotas:
    """All methods run on the event loop. Those that check or count raise RESOURCE_EXHAUSTED."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def count_request(self, tenant: Tenant) -> None:
        """Count a request against `requests_per_second`."""
        if (rate := tenant.requests_per_second) is not None:
            self._take_requests(tenant, rate, 1, until=1)

    def count_batch(self, tenant: Tenant, size: int) -> None:
        """Count the others of a batch whose call was counted as one request, all or none."""
        if (rate := tenant.requests_per_second) is not None and size > 1:
            # Uncount the call, because the next attempt counts it again.
            self._take_requests(tenant, rate, size - 1, until=size)

    def check_batch(self, tenant: Tenant, size: int, most: int) -> None:
        """Refuse a batch that no wait lets in, so without a time to retry. most: the largest that has places."""
        if (rate := tenant.requests_per_second) is not None:
            most = min(most, int(_capacity(tenant, rate)))
        if size > most:
            raise self._exceeded(
                tenant, "batch", f"found a batch of {size}; the tenant's limits allow {most} at once", None
            )

    def check_queue(self, tenant: Tenant, waiting: int, retry_s: Callable[[], float]) -> None:
        """Refuse a request with which more than `max_queue` of the tenant's would wait."""
        if tenant.max_queue is not None and waiting > tenant.max_queue:
            found = f"{tenant.max_queue} requests in its queue, max_queue"
            raise self._exceeded(tenant, "max_queue", found, retry_s())

    def check_tokens(self, tenant: Tenant, tokens: int = 1) -> None:
        """Refuse a request while `tokens_per_second` does not have so many left."""
        if (rate := tenant.tokens_per_second) is None:
            return
        if wait := self._account(tenant).tokens.seconds_until(tokens, rate, _capacity(tenant, rate), self._clock()):
            raise self._exceeded(tenant, "tokens_per_second", f"{rate:g} tokens_per_second", wait)

    @contextmanager
    def reserve(self, tenant: Tenant, tokens: int) -> Iterator[Reservation]:
        """Take tokens of `tokens_per_second` before requests use them, all or none; what is left of them returns.

        More than the bucket holds needs a full one and leaves a debt.
        """
        reserved = Reservation(0)
        if (rate := tenant.tokens_per_second) is not None:
            self.check_tokens(tenant, tokens)
            self._account(tenant).tokens.take(tokens, rate, _capacity(tenant, rate), self._clock())
            reserved.tokens = tokens
        try:
            yield reserved
        finally:
            if rate is not None and reserved.tokens:
                self._account(tenant).tokens.give_back(reserved.tokens, rate, _capacity(tenant, rate), self._clock())

    def keep_only(self, tenant_ids: Collection[str]) -> None:
        """Forget each tenant that is not among these."""
        for name in self._accounts.keys() - set(tenant_ids):
            del self._accounts[name]

    def _take_requests(self, tenant: Tenant, rate: float, n: int, *, until: int) -> None:
        bucket, capacity, now = self._account(tenant).requests, _capacity(tenant, rate), self._clock()
        if bucket.seconds_until(n, rate, capacity, now):
            wait = bucket.seconds_until(until, rate, capacity, now)
            raise self._exceeded(tenant, "requests_per_second", f"{rate:g} requests_per_second", wait)
        bucket.take(n, rate, capacity, now)

    def _account(self, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.id)
        if account is None:
            now = self._clock()
            account = self._accounts[tenant.id] = _Account(TokenBucket(now), TokenBucket(now))
        return account

    def _exceeded(self, tenant: Tenant, quota: str, found: str, retry_s: float | None) -> RequestFailedError:
        """`retry_s` is None if waiting does not help."""
        self._metrics.record_quota_refusal(tenant.id, quota)
        retry_s = None if retry_s is None else max(MIN_RETRY_S, retry_s)
        return quota_exceeded(f"tenant:{tenant.id}", found, retry_s)


def _capacity(tenant: Tenant, rate: float) -> float:
    """Capacity of a bucket of the tenant."""
    return max(1.0, rate * tenant.burst_seconds)
