"""Kinds of metrics that prometheus-client has not. They know no name of any."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from math import inf

from prometheus_client import Counter
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class GaugeByLabel(Collector):
    """A gauge of many ids, read and folded into the label's values when it is scraped.

    `read` gives the values by id, from any thread; it may be replaced.
    """

    def __init__(self, name: str, documentation: str, label: str, value_of: Callable[[str], str]) -> None:
        self._name, self._documentation, self._label, self._value_of = name, documentation, label, value_of
        self.read: Callable[[], Mapping[str, int]] = dict

    def total(self) -> int:
        """Sum over all ids. From any thread."""
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


class RunsHistogram(Collector):
    """A histogram that takes many equal observations at the price of one."""

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = (*buckets, inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """`times` observations of a value. On one thread; read from any."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """The whole histogram."""
        total = self._sum
        bounds = map(floatToGoString, self._bounds)
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=total)


class CounterOf:
    """A counter that follows a count kept elsewhere, across restarts of whoever keeps it."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._seen = 0.0

    def set(self, value: float) -> None:
        """The count as it is now."""
        # A smaller value than before is of a process that began anew.
        self._counter.inc(value - self._seen if value >= self._seen else value)
        self._seen = value

    def restart(self) -> None:
        """The next count is of a process that began anew."""
        self._seen = 0.0
