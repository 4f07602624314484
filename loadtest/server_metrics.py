"""The server's own metrics over a phase, and how its histograms agree with the generator's."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

from loadtest import LoadTestError
from loadtest.histogram import Latency
from mtlora.client.metrics_page import MetricsPage

# The server's histogram of each latency that the generator measures too.
HISTOGRAMS = {
    "ttft": "mtlora_time_to_first_token_seconds",
    "itl": "mtlora_inter_token_latency_seconds",
    "e2e": "mtlora_request_seconds",
}
BUILD = "mtlora_build_info"
QUANTILES = (0.5, 0.95, 0.99)
_LOOP_DELAY = "mtlora_event_loop_delay_seconds"
_PREFIX = "mtlora_"
_NOT_SERIES = ("_bucket", "_sum", "_count", "_created", "_info")
_INTERVAL_S = 2.0


async def fetch(address: str) -> MetricsPage:
    """The page at a URL or HOST:PORT. Raises LoadTestError if it cannot be read."""
    try:
        return await asyncio.to_thread(MetricsPage.fetch, address)
    except (OSError, ValueError) as error:
        raise LoadTestError(f"cannot read the server's metrics at {address}: {error}") from None


class Watch:
    """`async with Watch(address) as watch:` reads the page before, during and after the block.

    A failed reading is counted, not raised: the server may be busy or gone.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._before: MetricsPage | None = None
        self._after: MetricsPage | None = None
        # (moment on the monotonic clock, page)
        self.pages: list[tuple[float, MetricsPage]] = []
        self.missed = 0

    async def __aenter__(self) -> Self:
        self._before = await self._read()
        self._reading = asyncio.create_task(self._read_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        self._after = await self._read()

    def to_json(self, began: float, recorded: Mapping[str, Latency]) -> dict[str, Any]:
        """The server's metrics, compared with the latencies that the generator recorded since `began`."""
        made = series(self.pages, began) | {"missed": self.missed, "agreement": {}, "loop_delay": None}
        if self._before and self._after:
            made["agreement"] = compare(self._before, self._after, recorded)
            made["loop_delay"] = loop_delay(self._before, self._after)
        return made

    async def _read(self) -> MetricsPage | None:
        try:
            page = await fetch(self._address)
        except LoadTestError:
            self.missed += 1
            return None
        self.pages.append((time.monotonic(), page))
        return page

    async def _read_on(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self._read()


def bucket_counts(before: MetricsPage, after: MetricsPage, name: str) -> list[tuple[float, float]]:
    """(upper bound, observations up to it) of a histogram between two pages, rising."""
    old = before.buckets(name)
    return [(bound, total - old.get(bound, 0.0)) for bound, total in after.buckets(name).items()]


def compare(before: MetricsPage, after: MetricsPage, recorded: Mapping[str, Latency]) -> dict[str, Any]:
    """By latency and quantile: the generator's seconds, the server's bucket, and the number of buckets between them."""
    found: dict[str, Any] = {}
    for name, latency in recorded.items():
        cumulative = bucket_counts(before, after, HISTOGRAMS[name])
        if not cumulative or cumulative[-1][1] <= 0 or not latency.count:
            continue
        bounds = [bound for bound, _ in cumulative]
        rows: dict[str, dict[str, Any]] = {}
        for q in QUANTILES:
            ours = latency.quantile(q)
            theirs = _bucket_of(cumulative, q)
            mine = next(i for i, bound in enumerate(bounds) if ours <= bound)
            rows[f"p{100 * q:g}"] = {
                "generator": round(ours, 5),
                "server_from": bounds[theirs - 1] if theirs else 0.0,
                "server_to": _finite(bounds[theirs]),
                "buckets_apart": abs(mine - theirs),
            }
        found[name] = {
            "quantiles": rows,
            "observed": {"generator": latency.count, "server": int(cumulative[-1][1])},
            "agree": all(row["buckets_apart"] <= 1 for row in rows.values()),
        }
    return found


def loop_delay(before: MetricsPage, after: MetricsPage) -> dict[str, float | None] | None:
    """The bucket of the event loop's delay at the 99th percentile, seconds; None without observations."""
    cumulative = bucket_counts(before, after, _LOOP_DELAY)
    if not cumulative or cumulative[-1][1] <= 0:
        return None
    at = _bucket_of(cumulative, 0.99)
    return {"p99_from": cumulative[at - 1][0] if at else 0.0, "p99_to": _finite(cumulative[at][0])}


def _bucket_of(cumulative: list[tuple[float, float]], q: float) -> int:
    """The index of a quantile's bucket."""
    return next(i for i, (_, count) in enumerate(cumulative) if count >= q * cumulative[-1][1] - 1e-9)


def _finite(bound: float) -> float | None:
    """None for infinity, which JSON lacks."""
    return bound if math.isfinite(bound) else None


def series(pages: Sequence[tuple[float, MetricsPage]], began: float) -> dict[str, Any]:
    """Gauges over time, and counters as a rate over each interval; times in seconds from the phase's start."""
    made: dict[str, list[float | None]] = {}
    names = {name for _, page in pages for name in page.samples if name.startswith(_PREFIX)}
    for name in sorted(name for name in names if not name.endswith(_NOT_SERIES)):
        readings = [(moment, page.value(name) if name in page.samples else None) for moment, page in pages]
        if name.endswith("_total"):
            rates: list[float | None] = [None]
            for (then, old), (now, new) in pairwise(readings):
                rates.append(None if old is None or new is None else round((new - old) / (now - then), 4))
            made[f"{name.removesuffix('_total')}_per_second"] = rates
        else:
            made[name] = [None if value is None else round(value, 6) for _, value in readings]
    return {"seconds": [round(moment - began, 2) for moment, _ in pages], "values": made}
