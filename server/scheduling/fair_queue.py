"""Weighted fair queueing by service received: the virtual token counter.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2, with weights. Every tenant has a
counter of the service it got, divided by its weight; the tenant with the lowest counter goes next. A tenant that was
idle is lifted to the lowest counter of those that wait, so that it collects no credit while idle. Counters are compared
within a priority class; a class is served only while no more urgent one waits.

Invariant: the service by weight of two tenants that wait all the time never differs by more than a constant.

Items may wait in several lanes, one per engine, and each lane is served separately. A tenant has one counter for all
lanes, so service in one lane counts in the others. The invariant holds among tenants that wait in the same lanes.
"""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

# A tenant's line: its requests of one class.
Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


class _Flow(Generic[Item]):
    """One tenant's lines, by lane: in each of its own priorities, first in, first out."""

    def __init__(self, lanes: int) -> None:
        self.counter = 0.0
        self.weight = 1.0
        self.rank = 0
        # The lane and priority of each waiting item.
        self.items: dict[Item, tuple[int, int]] = {}
        # Lines by lane, then by priority. A dict keeps the order and removes from the middle in constant time.
        self.lines: list[dict[int, dict[Item, None]]] = [{} for _ in range(lanes)]
        self.blocked = False

    @property
    def active(self) -> bool:
        return bool(self.items) and not self.blocked

    def queued(self, lane: int) -> int:
        """Items in a lane."""
        return sum(map(len, self.lines[lane].values()))

    def first(self, lane: int) -> Item:
        """A lane's next item; the lane must not be empty."""
        lines = self.lines[lane]
        return next(iter(lines[max(lines)]))


class FairQueue(Generic[Key, Item]):
    """Lines of hashable items, one for each tenant and class. A tenant's own priorities reorder its own line alone."""

    def __init__(self, lanes: int = 1) -> None:
        self._lanes = lanes
        self._flows: dict[Key, _Flow[Item]] = {}
        # Those with items: few, even if many tenants are known. Of equals, the one that began to wait first goes first.
        self._waiting: dict[Key, _Flow[Item]] = {}
        self._lens = [0] * lanes
        # Counter of the tenant that left last, by class: a newcomer to an empty class is lifted to it.
        self._last: dict[int, float] = {}

    def length(self, lane: int) -> int:
        """Items in a lane."""
        return self._lens[lane]

    def queued(self, tenant: Key) -> int:
        """Items of one tenant."""
        flow = self._flows.get(tenant)
        return len(flow.items) if flow else 0

    def push(self, tenant: Key, item: Item, *, weight: float, rank: int, priority: int = 0, lane: int = 0) -> None:
        """Put an item behind those of its tenant that have its priority or a higher one.

        `rank` is the tenant's class, 0 the most urgent.
        """
        flow = self._flow(tenant)
        if flow.rank != rank:
            # Start anew, because counters of two classes are not comparable.
            flow.rank, flow.counter = rank, 0.0
            self._lift(flow)
        elif not flow.active:
            self._lift(flow)
        flow.weight = weight
        flow.items[item] = (lane, priority)
        flow.lines[lane].setdefault(priority, {})[item] = None
        self._waiting[tenant] = flow
        self._lens[lane] += 1

    def pop(self, lane: int = 0, fits: Callable[[Item], bool] | None = None) -> tuple[Key, Item] | None:
        """Take out a lane's next item; None if only blocked tenants wait there.

        Skips a line whose first item does not fit; its tenant's counter does not change.
        """
        tenant, flow = min(
            (
                (name, flow)
                for name, flow in self._waiting.items()
                if flow.lines[lane] and not flow.blocked and (fits is None or fits(flow.first(lane)))
            ),
            key=lambda entry: (entry[1].rank, entry[1].counter),
            default=(None, None),
        )
        if tenant is None or flow is None:
            return None
        item = flow.first(lane)
        self._take(tenant, flow, item)
        return tenant, item

    def remove(self, tenant: Key, item: Item) -> bool:
        """Remove an item; False if it has already left."""
        flow = self._flows.get(tenant)
        if flow is None or item not in flow.items:
            return False
        self._take(tenant, flow, item)
        return True

    def drop_newest(self, tenant: Key, lane: int = 0) -> Item:
        """Remove and return the last item of a tenant's line, which must not be empty."""
        flow = self._flows[tenant]
        lines = flow.lines[lane]
        item = next(reversed(lines[min(lines)]))
        self._take(tenant, flow, item)
        return item

    def longest(self, lane: int = 0) -> Key:
        """The tenant with the most items by weight in the least urgent waiting class of a lane, which is not empty."""
        waiting = (name for name, flow in self._waiting.items() if flow.lines[lane])
        return max(waiting, key=lambda name: self.length_by_weight(name, lane))

    def length_by_weight(self, tenant: Key, lane: int) -> tuple[int, float]:
        """What `longest` compares: (rank, items by weight)."""
        flow = self._flows[tenant]
        return flow.rank, flow.queued(lane) / flow.weight

    def charge(self, tenant: Key, service: float) -> None:
        """Add service to a tenant's counter."""
        if flow := self._flows.get(tenant):
            flow.counter += service / flow.weight

    def block(self, tenant: Key, blocked: bool) -> None:
        """Block or unblock a tenant. A blocked tenant is not served and counts as idle."""
        flow = self._flow(tenant)
        if flow.blocked == blocked:
            return
        if not blocked and flow.items:
            self._lift(flow)
        flow.blocked = blocked

    def ahead_of(self, tenant: Key, *, weight: float, rank: int, lane: int) -> int:
        """Estimate how many items would be served before one that this tenant pushes now."""
        own = self._flows[tenant].queued(lane) if tenant in self._flows else 0
        ahead = own
        for name, flow in self._waiting.items():
            if name == tenant or flow.blocked:
                continue
            if flow.rank < rank:
                ahead += flow.queued(lane)
            elif flow.rank == rank:
                ahead += min(flow.queued(lane), round((own + 1) * flow.weight / weight))
        return ahead

    def forget(self, tenant: Key) -> None:
        """Drop the counter of a tenant that has no items."""
        if (flow := self._flows.get(tenant)) and not flow.items:
            del self._flows[tenant]

    def counter(self, tenant: Key) -> float:
        """A tenant's counter: service by weight, including lifts."""
        return self._flows[tenant].counter

    def _flow(self, tenant: Key) -> _Flow[Item]:
        flow = self._flows.get(tenant)
        if flow is None:
            flow = self._flows[tenant] = _Flow(self._lanes)
        return flow

    def _take(self, tenant: Key, flow: _Flow[Item], item: Item) -> None:
        lane, priority = flow.items.pop(item)
        lines = flow.lines[lane]
        line = lines[priority]
        del line[item]
        if not line:
            del lines[priority]
        self._lens[lane] -= 1
        if not flow.items:
            del self._waiting[tenant]
            self._last[flow.rank] = flow.counter

    def _lift(self, flow: _Flow[Item]) -> None:
        others = [
            other.counter
            for other in self._waiting.values()
            if other is not flow and not other.blocked and other.rank == flow.rank
        ]
        flow.counter = max(flow.counter, min(others) if others else self._last.get(flow.rank, 0.0))
