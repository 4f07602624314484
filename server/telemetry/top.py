"""Bounds the number of a label's values: the busiest ids have their own value, the rest share one."""

from collections.abc import Callable

OTHER = "other"

# Counted requests between rankings, and how many times busier an id must be than one with a value of its own to take
# its place.
_RANK_EVERY = 4096
_MARGIN = 2.0


class TopLabels:
    """The `limit` busiest ids, by recent requests; memory is bounded by the ids of the last few rankings.

    `on_drop` gets an id that loses its place, to remove its series. If the id comes back, its series starts at 0, which
    `rate()` takes for a restart. So queries must sum rates, never rate sums.
    """

    def __init__(self, limit: int, on_drop: Callable[[str], None], *, rank_every: int = _RANK_EVERY) -> None:
        self._limit = limit
        self._on_drop = on_drop
        self._rank_every = rank_every
        self._since = 0
        self._kept: set[str] = set()
        self._counts: dict[str, float] = {}

    def count(self, name: str) -> str:
        """Count one request of `name`; returns its label's value."""
        self._counts[name] = self._counts.get(name, 0.0) + 1.0
        self._since += 1
        self.claim(name)
        if self._since >= self._rank_every:
            self._rank()
        return self.label(name)

    def claim(self, name: str) -> str:
        """The label's value for `name`, without counting; `name` takes a place if one is free."""
        if name not in self._kept and len(self._kept) < self._limit:
            self._kept.add(name)
        return self.label(name)

    def label(self, name: str) -> str:
        """The label's value for `name`. From any thread."""
        return name if name in self._kept else OTHER

    def _rank(self) -> None:
        counts = self._counts
        outside = sorted((name for name in counts if name not in self._kept), key=counts.__getitem__, reverse=True)
        inside = sorted(self._kept, key=lambda name: counts.get(name, 0.0))
        for new, old in zip(outside, inside, strict=False):
            if counts[new] <= _MARGIN * counts.get(old, 0.0):
                break
            self._kept.remove(old)
            self._kept.add(new)
            self._on_drop(old)
        self._counts = {name: count / 2 for name, count in counts.items() if count > 1}
        self._since = 0
