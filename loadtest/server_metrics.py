"""The server's own metrics page: what it says over the time of a phase, and how its histograms agree with ours."""

import asyncio
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from loadtest.errors import LoadTestError
from loadtest.histogram import Latency

# Histograms of the server that measure what the generator measures, by the generator's name for it.
HISTOGRAMS = {
    "ttft": "mtlora_time_to_first_token_seconds",
    "itl": "mtlora_inter_token_latency_seconds",
    "e2e": "mtlora_request_seconds",
}
_LOOP_DELAY = "mtlora_event_loop_delay_seconds"
_PREFIX = "mtlora_"
# A label's value may hold blanks and braces; behind the sample there may be a time and an exemplar.
_SAMPLE = re.compile(
    r'(?P<name>\w+)(?P<labels>\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?\s+(?P<value>[-+]?(?:[\d.]+(?:[eE][-+]?\d+)?|Inf|NaN))(?:\s|$)'
)
_LE = re.compile(r'le="([^"]+)"')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_INTERVAL_S = 2.0
_TIMEOUT_S = 5.0
QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Page:
    """One reading. Samples of a name are summed over their labels: `values`; buckets by upper bound: `buckets`."""

    at: float
    values: Mapping[str, float]
    buckets: Mapping[str, Mapping[float, float]]
    build: Mapping[str, str]


@dataclass
class Watched:
    """The pages read over a phase, the first before it and the last after it."""

    pages: list[Page] = field(default_factory=list)
    missed: int = 0


class Scraper:
    """Reads the metrics page at `url`, now and every few seconds."""

    def __init__(self, url: str) -> None:
        self.url = metrics_url(url)

    async def read(self) -> Page:
        """One reading. Raises LoadTestError where there is no such page."""
        try:
            text = await asyncio.to_thread(_fetch, self.url)
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise LoadTestError(f"cannot read the server's metrics at {self.url}: {error}") from None
        return parse(text, time.monotonic())

    async def watch(self, watched: Watched) -> None:
        """Read on until cancelled. A reading that fails is counted: the server may be busy, or gone."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                watched.pages.append(await self.read())
            except LoadTestError:
                watched.missed += 1


def metrics_url(given: str) -> str:
    """`HOST:PORT` or a URL, as a URL with a path."""
    url = given if "//" in given else f"http://{given}"
    return url if urllib.parse.urlparse(url).path.strip("/") else f"{url.rstrip('/')}/metrics"


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply:
        return str(reply.read().decode())


def parse(text: str, at: float) -> Page:
    """What this project's server says of itself on a page of the Prometheus text format."""
    values: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    build: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith(_PREFIX):
            continue
        if (sample := _SAMPLE.match(line)) is None:
            continue
        name, series, value = sample["name"], sample["labels"] or "", float(sample["value"])
        if name.endswith("_bucket"):
            if bound := _LE.search(series):
                of = buckets.setdefault(name.removesuffix("_bucket"), {})
                le = float(bound[1])
                of[le] = of.get(le, 0.0) + value
        elif name == "mtlora_build_info":
            build = dict(_LABEL.findall(series))
        elif not name.endswith("_created") and math.isfinite(value):
            values[name] = values.get(name, 0.0) + value
    return Page(at, values, buckets, build)


def bucket_counts(before: Page, after: Page, name: str) -> list[tuple[float, float]]:
    """(upper bound, observations up to it) of a histogram, of what was observed between two pages; rising."""
    old = before.buckets.get(name, {})
    return [(le, total - old.get(le, 0.0)) for le, total in sorted(after.buckets.get(name, {}).items())]


def compare(before: Page, after: Page, recorded: Mapping[str, Latency]) -> dict[str, Any]:
    """By latency and quantile: the generator's seconds, the server's bucket, and how many buckets lie between them."""
    found: dict[str, Any] = {}
    for name, latency in recorded.items():
        cumulative = bucket_counts(before, after, HISTOGRAMS[name])
        if not cumulative or cumulative[-1][1] <= 0 or not latency.count:
            continue
        bounds = [le for le, _ in cumulative]
        rows: dict[str, dict[str, Any]] = {}
        for q in QUANTILES:
            ours = latency.quantile(q)
            theirs = next(i for i, (_, n) in enumerate(cumulative) if n >= q * cumulative[-1][1] - 1e-9)
            mine = next(i for i, le in enumerate(bounds) if ours <= le)
            rows[f"p{100 * q:g}"] = {
                "generator": round(ours, 5),
                "server_from": bounds[theirs - 1] if theirs else 0.0,
                # JSON knows no infinity.
                "server_to": None if bounds[theirs] == float("inf") else bounds[theirs],
                "buckets_apart": abs(mine - theirs),
            }
        found[name] = {
            "quantiles": rows,
            "observed": {"generator": latency.count, "server": int(cumulative[-1][1])},
            "agree": all(row["buckets_apart"] <= 1 for row in rows.values()),
        }
    return found


def loop_delay(before: Page, after: Page) -> dict[str, float | None] | None:
    """How late the server's event loop was, 99th percentile, seconds, as a bucket; None where it does not say."""
    cumulative = bucket_counts(before, after, _LOOP_DELAY)
    if not cumulative or cumulative[-1][1] <= 0:
        return None
    at = next(i for i, (_, n) in enumerate(cumulative) if n >= 0.99 * cumulative[-1][1] - 1e-9)
    bound = cumulative[at][0]
    return {"p99_from": cumulative[at - 1][0] if at else 0.0, "p99_to": bound if math.isfinite(bound) else None}


def series(watched: Watched, began: float) -> dict[str, Any]:
    """Gauges over time, and counters as a rate over each interval; times in seconds from the phase's start."""
    pages = watched.pages
    if not pages:
        return {"seconds": [], "values": {}, "missed": watched.missed}
    made: dict[str, list[float | None]] = {}
    names = sorted({name for page in pages for name in page.values if not name.endswith(("_sum", "_count"))})
    for name in names:
        readings = [page.values.get(name) for page in pages]
        if name.endswith("_total"):
            rates: list[float | None] = [None]
            for (a, old), (b, new) in pairwise(zip(pages, readings, strict=True)):
                rates.append(None if old is None or new is None else round((new - old) / (b.at - a.at), 4))
            made[f"{name.removesuffix('_total')}_per_second"] = rates
        else:
            made[name] = [None if value is None else round(value, 6) for value in readings]
    return {"seconds": [round(page.at - began, 2) for page in pages], "values": made, "missed": watched.missed}
