"""The virtual token counter: work-conserving, fair within a bound, no credit for idling."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.scheduling.fair_queue import FairQueue

TENANTS = ("a", "b", "c")
MOST = 50
COSTS = st.integers(1, MOST)


def push(queue: FairQueue[str, Any], tenant: str, item: Any, weight: float = 1.0, rank: int = 1) -> None:
    queue.push(tenant, item, weight=weight, rank=rank)


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=4),
    costs=st.lists(COSTS, min_size=1, max_size=40),
)
def test_waiting_tenants_get_service_by_weight(weights: list[float], costs: list[int]) -> None:
    queue: FairQueue[str, int] = FairQueue()
    served = [0.0] * len(weights)
    for turn in range(200):
        for i, weight in enumerate(weights):
            # Every tenant always has waiting items.
            while queue.queued(str(i)) < 2:
                push(queue, str(i), len(served) * 1000 * turn + i * 100 + queue.queued(str(i)), weight)
        tenant, _ = queue.pop() or pytest.fail("nothing came although everybody waits")
        cost = costs[turn % len(costs)]
        queue.charge(tenant, cost)
        served[int(tenant)] += cost
        by_weight = [amount / weight for amount, weight in zip(served, weights, strict=True)]
        # The paper's bound: one largest request on either side, here by the smallest weight.
        assert max(by_weight) - min(by_weight) <= 2 * MOST / min(weights)


@given(turns=st.integers(1, 300), costs=st.lists(COSTS, min_size=1, max_size=20))
def test_idling_saves_up_no_credit(turns: int, costs: list[int]) -> None:
    queue: FairQueue[str, Any] = FairQueue()
    served = {"busy": 0.0, "late": 0.0}
    for turn in range(turns):
        push(queue, "busy", turn)
        push(queue, "busy", -1 - turn)
        assert queue.pop()
        queue.charge("busy", costs[turn % len(costs)])
    for turn in range(100):
        push(queue, "late", ("late", turn))
        push(queue, "busy", ("busy", turn))
    for turn in range(100):
        tenant, _ = queue.pop() or pytest.fail("nothing came")
        cost = costs[turn % len(costs)]
        queue.charge(tenant, cost)
        served[tenant] += cost
    assert abs(served["busy"] - served["late"]) <= 2 * MOST


def test_a_newcomer_to_an_empty_queue_is_lifted_to_the_last_counter() -> None:
    queue: FairQueue[str, int] = FairQueue()
    push(queue, "a", 1)
    queue.charge("a", 100)
    assert queue.pop() == ("a", 1)
    push(queue, "b", 2)
    assert queue.counter("b") == 100


def test_a_tenant_at_its_limit_counts_as_idle() -> None:
    queue: FairQueue[str, int] = FairQueue()
    push(queue, "a", 1)
    push(queue, "b", 2)
    queue.block("a", True)
    assert queue.pop() == ("b", 2)
    assert queue.pop() is None
    assert queue.length(0) == 1
    queue.charge("b", 40)
    push(queue, "b", 3)
    queue.block("a", False)
    assert queue.counter("a") == 40


def test_pops_more_urgent_classes_first() -> None:
    queue: FairQueue[str, str] = FairQueue()
    push(queue, "batch", "x", rank=2)
    push(queue, "now", "y", rank=0)
    queue.charge("now", 1000)
    push(queue, "now", "z", rank=0)
    assert [queue.pop() for _ in range(4)] == [("now", "y"), ("now", "z"), ("batch", "x"), None]


def test_drops_the_newest_of_the_longest_line_for_its_weight() -> None:
    queue: FairQueue[str, int] = FairQueue()
    for item in range(4):
        push(queue, "heavy", item, weight=4.0)
    for item in range(10, 13):
        push(queue, "light", item)
    assert queue.longest() == "light"
    assert queue.drop_newest("light") == 12
    push(queue, "batch", 20, rank=2)
    assert queue.longest() == "batch"


def test_priorities_reorder_a_tenants_own_line_alone() -> None:
    orders = []
    for priority in (0, 100):
        queue: FairQueue[str, str] = FairQueue()
        for item in range(3):
            queue.push("a", f"a{item}", weight=1.0, rank=0, priority=priority * item)
            queue.push("b", f"b{item}", weight=1.0, rank=0)
        order = []
        while entry := queue.pop():
            queue.charge(entry[0], 1.0)
            order.append(entry)
        orders.append(order)
    assert [tenant for tenant, _ in orders[0]] == [tenant for tenant, _ in orders[1]]
    assert [item for tenant, item in orders[1] if tenant == "a"] == ["a2", "a1", "a0"]


class AgainstAModel(RuleBasedStateMachine):
    """After any operations: nothing is lost, order holds within a tenant, and nothing idles while somebody may go."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[str, int] = FairQueue()
        self.lines: dict[str, list[int]] = {tenant: [] for tenant in TENANTS}
        self.blocked: set[str] = set()
        self.priorities: dict[int, int] = {}
        self.count = 0

    @rule(
        tenant=st.sampled_from(TENANTS),
        weight=st.sampled_from([0.5, 1.0, 3.0]),
        rank=st.integers(0, 2),
        priority=st.integers(-1, 1),
    )
    def push(self, tenant: str, weight: float, rank: int, priority: int) -> None:
        self.count += 1
        self.queue.push(tenant, self.count, weight=weight, rank=rank, priority=priority)
        self.priorities[self.count] = priority
        self.lines[tenant].append(self.count)
        self.lines[tenant].sort(key=lambda item: (-self.priorities[item], item))

    @rule()
    def pop(self) -> None:
        entry = self.queue.pop()
        eligible = [tenant for tenant in TENANTS if self.lines[tenant] and tenant not in self.blocked]
        assert (entry is None) == (not eligible)
        if entry:
            tenant, item = entry
            assert tenant in eligible
            assert self.lines[tenant].pop(0) == item

    @rule(tenant=st.sampled_from(TENANTS))
    def drop_newest(self, tenant: str) -> None:
        if self.lines[tenant]:
            assert self.queue.drop_newest(tenant) == self.lines[tenant].pop()

    @rule(tenant=st.sampled_from(TENANTS), cost=COSTS)
    def charge(self, tenant: str, cost: int) -> None:
        self.queue.charge(tenant, cost)

    @rule(tenant=st.sampled_from(TENANTS), blocked=st.booleans())
    def block(self, tenant: str, blocked: bool) -> None:
        self.queue.block(tenant, blocked)
        (self.blocked.add if blocked else self.blocked.discard)(tenant)

    @rule(tenant=st.sampled_from(TENANTS), data=st.data())
    def remove(self, tenant: str, data: st.DataObject) -> None:
        if line := self.lines[tenant]:
            item = data.draw(st.sampled_from(line))
            assert self.queue.remove(tenant, item)
            line.remove(item)
        assert not self.queue.remove(tenant, -1)

    @invariant()
    def lengths_agree(self) -> None:
        assert self.queue.length(0) == sum(map(len, self.lines.values()))
        assert all(self.queue.queued(tenant) == len(line) for tenant, line in self.lines.items())


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=60)
