"""Metric types missing from prometheus-client; names live in metrics.py.

`CounterFamily` and `Histograms` need one dict update per observation. prometheus-client's own classes look up a child,
take locks and search the buckets. Only one thread may count; any thread may read.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from math import inf
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

_T = TypeVar("_T")


class CounterFamily(Collector):
    """A counter with labels."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str] = (), *, registry: CollectorRegistry
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        registry.register(self)

    def inc(self, amount: float = 1.0, labels: tuple[str, ...] = ()) -> None:
        """Add to the series of these labels' values."""
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def drop(self, label: str, value: str) -> None:
        """Forget every series with this value of a label."""
        self._values = _without(self._values, self._labels.index(label), value)

    def replace(self, values: Mapping[tuple[str, ...], float]) -> None:
        """Replace all series by counts kept elsewhere; keys are the labels' values."""
        self._values = dict(values)

    def collect(self) -> Iterable[Metric]:
        """One sample per series."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, value in self._values.copy().items():
            family.add_metric(labels, value)
        yield family


class Histograms(Collector):
    """A histogram with labels; many equal observations cost as much as one."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._bounds = (*buckets, inf)
        self._series: dict[tuple[str, ...], _Series] = {} if labels else {(): _Series(len(self._bounds))}
        registry.register(self)

    def observe(
        self, value: float, times: int = 1, *, labels: tuple[str, ...] = (), exemplar: dict[str, str] | None = None
    ) -> None:
        """`times` observations of a value in the series of these labels' values."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(len(self._bounds))
        bucket = bisect_left(self._bounds, value)
        series.counts[bucket] += times
        series.sum += value * times
        if exemplar is not None:
            series.exemplars[bucket] = Exemplar(exemplar, value, time.time())

    def drop(self, label: str, value: str) -> None:
        """Forget every series with this value of a label."""
        self._series = _without(self._series, self._labels.index(label), value)

    def collect(self) -> Iterable[Metric]:
        """All buckets of every series."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        bounds = [floatToGoString(bound) for bound in self._bounds]
        for labels, series in self._series.copy().items():
            total, exemplars = series.sum, series.exemplars.copy()
            counts = map(float, accumulate(series.counts))
            buckets = [
                (bound, count, exemplars[i]) if i in exemplars else (bound, count)
                for i, (bound, count) in enumerate(zip(bounds, counts, strict=True))
            ]
            family.add_metric(labels, buckets, total)
        yield family


class _Series:
    """One series: counts by bucket, not cumulative, and each bucket's last exemplar."""

    __slots__ = ("counts", "exemplars", "sum")

    def __init__(self, num_buckets: int) -> None:
        self.counts = [0] * num_buckets
        self.sum = 0.0
        self.exemplars: dict[int, Exemplar] = {}


class GaugeByLabel(Collector):
    """A gauge over many ids; at each scrape, values are read and summed by label.

    `read` gives the values by id, from any thread; it may be replaced.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        label: str,
        *,
        value_of: Callable[[str], str],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._label, self._value_of = name, documentation, label, value_of
        self.read: Callable[[], Mapping[str, int]] = dict
        registry.register(self)

    def total(self) -> int:
        """The sum over all ids. Callable from any thread."""
        return sum(self.read().values())

    def collect(self) -> Iterable[Metric]:
        """One sample a value of the label."""
        sums: dict[str, int] = {}
        for name, value in self.read().items():
            label = self._value_of(name)
            sums[label] = sums.get(label, 0) + value
        family = GaugeMetricFamily(self._name, self._documentation, labels=[self._label])
        for label, total in sorted(sums.items()):
            family.add_metric([label], total)
        yield family


class CounterOf:
    """A counter that follows a count kept in another process, across that process's restarts."""

    def __init__(self, counter: CounterFamily) -> None:
        self._counter = counter
        self._seen = 0.0

    def set(self, value: float) -> None:
        """Set the count of the other process."""
        # A smaller value means a new process.
        self._counter.inc(value - self._seen if value >= self._seen else value)
        self._seen = value

    def restart(self) -> None:
        """Treat the next count as that of a new process."""
        self._seen = 0.0


def _without(series: dict[tuple[str, ...], _T], position: int, value: str) -> dict[tuple[str, ...], _T]:
    return {labels: each for labels, each in series.items() if labels[position] != value}
