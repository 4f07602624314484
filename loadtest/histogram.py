"""Latencies as HDR histograms: small, mergeable, and precise to two digits at every quantile."""

import math
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

# Values are kept in units of 10 microseconds, rounded up, up to an hour.
_UNIT_S = 1e-5
_MOST = int(3600 / _UNIT_S)
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


class Latency:
    """A histogram of seconds. It takes memory only once something is recorded."""

    __slots__ = ("_histogram",)

    def __init__(self) -> None:
        self._histogram: Any = None

    def record(self, seconds: float) -> None:
        if self._histogram is None:
            self._histogram = HdrHistogram(1, _MOST, 2)
        self._histogram.record_value(min(max(math.ceil(seconds / _UNIT_S), 1), _MOST))

    @property
    def count(self) -> int:
        return int(self._histogram.get_total_count()) if self._histogram else 0

    @property
    def mean(self) -> float:
        return float(self._histogram.get_mean_value()) * _UNIT_S if self.count else 0.0

    def quantile(self, q: float) -> float:
        """The seconds that a share `q` of the recorded values do not exceed; 0 without values."""
        if not (count := self.count):
            return 0.0
        # The library rounds a quantile's rank; round it up instead, as the reading of the server's buckets does.
        rank = max(1, math.ceil(q * count - 1e-9))
        return float(self._histogram.get_value_at_percentile(100 * rank / count)) * _UNIT_S

    def merge(self, other: "Latency") -> None:
        """Add all values of `other`."""
        if other._histogram is None:
            return
        if self._histogram is None:
            self._histogram = HdrHistogram(1, _MOST, 2)
        self._histogram.add(other._histogram)

    def points(self) -> list[tuple[float, int]]:
        """(seconds, count) of every recorded value, ascending."""
        if not self.count:
            return []
        # The library's own iterator also visits every empty bucket.
        histogram, counts = self._histogram, np.frombuffer(self._histogram.counts, np.int64)
        return [
            (histogram.get_highest_equivalent_value(histogram.get_value_from_index(i)) * _UNIT_S, int(counts[i]))
            for i in map(int, np.flatnonzero(counts))
        ]

    def to_json(self) -> dict[str, Any]:
        """Count, mean and quantiles in seconds, and the histogram in HDR's own encoding (units of 10 microseconds)."""
        return {
            "count": self.count,
            "mean": round(self.mean, 6),
            **{f"p{100 * q:g}": round(self.quantile(q), 6) for q in QUANTILES},
            "hdr": self._histogram.encode().decode() if self.count else "",
        }

    @classmethod
    def decode(cls, encoded: str) -> "Latency":
        """Read the `hdr` of `to_json`."""
        latency = cls()
        if encoded:
            latency._histogram = HdrHistogram.decode(encoded)
        return latency
