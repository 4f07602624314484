"""Replicas, slots and memory for T tasks, A adapters and R requests a second.

Memory follows from sizes; replicas from simulating more and more of them until the wait for the first token is short
enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.capacity.errors import CapacityError
from deploy.capacity.routing import ROUTERS
from deploy.capacity.service import ServiceModel
from deploy.capacity.simulate import Memory, Outcome, poisson, simulate

_GIB = 1 << 30
# Of a replica's memory, for the runtime, activations and compiled graphs.
_RESERVE = 0.1
MAX_REPLICAS = 100
# Enough for tails to settle, and for a search over replicas to end within a minute.
_SECONDS, _WARM_UP = 60.0, 15.0
_MAX_REQUESTS = 60_000


@dataclass(frozen=True)
class Sizes:
    """Bytes: of the backbone's weights, of the KV cache a token, of one adapter version, of one task's biases.

    The defaults are the default backbone's in bfloat16 (30 layers, 3 key-value heads of 64) and the shipped adapter's.
    """

    backbone: int = 269_060_552
    kv_token: int = 30 * 2 * 3 * 64 * 2
    adapter: int = 6_300_000
    task: int = 30 * 4 * 8 * 4


@dataclass(frozen=True)
class Card:
    """What a replica runs on: memory in GiB, and where it is a GPU, TB/s and dense TFLOPS in the backbone's dtype.

    efficiency: share of both that is reached; an assumption where no load test of that card says more.
    """

    name: str
    memory_gib: float
    bandwidth_tbs: float | None = None
    tflops: float | None = None
    efficiency: float = 0.4

    def model(self, measured: ServiceModel, sizes: Sizes) -> ServiceModel:
        """`measured` itself for a card without figures; else what its bandwidth and compute let a step cost.

        Roofline: a step reads every weight once, and each token of it takes two operations a parameter.
        """
        if self.bandwidth_tbs is None or self.tflops is None:
            return measured
        weights_s = sizes.backbone / (self.bandwidth_tbs * 1e12 * self.efficiency)
        token_s = 2 * (sizes.backbone / 2) / (self.tflops * 1e12 * self.efficiency)
        # Scheduling and launching a step, which no bandwidth shortens.
        launch_s = 0.004
        adapter_s = sizes.adapter / (self.bandwidth_tbs * 1e12 * self.efficiency)
        return ServiceModel(
            base=weights_s + launch_s,
            per_sequence=token_s,
            per_prompt_token=token_s,
            per_adapter=adapter_s,
            overhead=min(measured.overhead, 0.005),
            max_num_seqs=256,
            max_batched_tokens=8192,
        )


# Memory, bandwidth and dense bfloat16 compute as the makers give them. "measured" is the server that was.
CARDS = {
    "measured": Card("measured", 8.0),
    "l4": Card("l4", 24.0, 0.3, 121.0),
    "a100-80": Card("a100-80", 80.0, 2.0, 312.0),
    "h100": Card("h100", 80.0, 3.35, 989.0),
}


@dataclass(frozen=True)
class Demand:
    """What is asked for. p95_ttft: seconds in which 95 % of the requests must have their first token."""

    tasks: int
    adapters: int
    rate: float
    p95_ttft: float = 1.0
    zipf: float = 1.0

    def __post_init__(self) -> None:
        for name, value, least in (("tasks", self.tasks, 1), ("adapters", self.adapters, 1)):
            if value < least:
                raise CapacityError(f"{name}: found {value}; allowed: at least {least}")
        if self.tasks > 100_000:
            raise CapacityError(f"tasks: found {self.tasks}; allowed: up to 100000")
        if self.adapters > self.tasks:
            raise CapacityError(
                f"adapters: found {self.adapters} for {self.tasks} tasks; a task has one adapter at most"
            )
        for name, number in (("rate", self.rate), ("p95_ttft", self.p95_ttft)):
            if not number > 0 or math.isinf(number):
                raise CapacityError(f"{name}: found {number}; allowed: a number above 0")


@dataclass(frozen=True)
class Footprint:
    """Memory of one replica in GiB, and how many adapter versions it holds at a time."""

    backbone: float
    kv_cache: float
    adapters: float
    tasks: float
    resident: int
    slots: int

    @property
    def total(self) -> float:
        """Without the reserve."""
        return self.backbone + self.kv_cache + self.adapters + self.tasks


@dataclass(frozen=True)
class Plan:
    """The answer: `replicas` of `footprint`, and what the simulation of them gave."""

    replicas: int
    footprint: Footprint
    outcome: Outcome
    model: ServiceModel
    router: str


def footprint(demand: Demand, card: Card, model: ServiceModel, sizes: Sizes, tokens: float) -> Footprint:
    """Memory for `max_num_seqs` sequences of `tokens` tokens. Raises CapacityError where not one adapter fits."""
    budget = card.memory_gib * (1 - _RESERVE) * _GIB
    kv = model.max_num_seqs * tokens * sizes.kv_token
    fixed = sizes.backbone + kv + demand.tasks * sizes.task
    left = budget - fixed
    if left < sizes.adapter:
        raise CapacityError(
            f"memory: {card.name} has {budget / _GIB:.1f} GiB to use; the backbone takes {sizes.backbone / _GIB:.1f}, "
            f"the KV cache of {model.max_num_seqs} sequences {kv / _GIB:.1f}, {demand.tasks} tasks "
            f"{demand.tasks * sizes.task / _GIB:.1f}: no room for one adapter. Take a larger card, tensor parallelism, "
            f"or fewer sequences"
        )
    resident = min(demand.adapters, int(left // sizes.adapter))
    return Footprint(
        sizes.backbone / _GIB, kv / _GIB, resident * sizes.adapter / _GIB, demand.tasks * sizes.task / _GIB,
        resident, model.max_num_seqs,
    )  # fmt: skip


def make_plan(
    demand: Demand,
    card: Card,
    measured: ServiceModel,
    lengths: Sequence[tuple[int, int]],
    *,
    sizes: Sizes | None = None,
    router: str = "adapter-aware",
    load_seconds: float = 0.05,
    max_replicas: int = MAX_REPLICAS,
    seed: int = 0,
) -> Plan:
    """The fewest replicas that meet the demand. Raises CapacityError, saying what stands in the way, where none do."""
    sizes = sizes or Sizes()
    model = card.model(measured, sizes)
    prompt = sum(p for p, _ in lengths) / len(lengths)
    completion = sum(c for _, c in lengths) / len(lengths)
    made = footprint(demand, card, model, sizes, max(p + c for p, c in lengths))
    alone = model.step(1, int(prompt), 1) + model.overhead
    if alone > demand.p95_ttft:
        raise CapacityError(
            f"p95_ttft: found {demand.p95_ttft:g} s; a request alone on {card.name} takes {alone:.3g} s to its first "
            f"token, and no number of replicas shortens that"
        )
    most = model.saturated_rate(prompt, completion, min(demand.adapters, model.max_num_seqs))
    least = max(1, math.ceil(demand.rate / most))
    if least > max_replicas:
        raise CapacityError(
            f"rate: found {demand.rate:g} requests/s; {max_replicas} replicas of {card.name} answer at most "
            f"{max_replicas * most:.3g}. Raise max_replicas, or take a faster card"
        )
    seconds = min(_SECONDS, _MAX_REQUESTS / demand.rate)
    memory = Memory(made.resident, load_seconds)

    def outcome(replicas: int) -> Outcome:
        requests = poisson(
            demand.rate, seconds, tasks=demand.tasks, adapters=demand.adapters, lengths=lengths, zipf=demand.zipf,
            seed=seed,
        )  # fmt: skip
        warm_up = seconds * _WARM_UP / _SECONDS
        return simulate(requests, replicas, model, ROUTERS[router](replicas), memory=memory, warm_up=warm_up)

    found = _fewest(least, max_replicas, lambda n: _meets(outcome(n), demand))
    if found is None:
        raise CapacityError(
            f"p95_ttft: found {demand.p95_ttft:g} s; not met by {max_replicas} replicas of {card.name} at "
            f"{demand.rate:g} requests/s"
        )
    return Plan(found, made, outcome(found), model, router)


def _meets(outcome: Outcome, demand: Demand) -> bool:
    return len(outcome.ttft) > 0 and outcome.percentiles(outcome.ttft)[1] <= demand.p95_ttft


def _fewest(least: int, most: int, enough: object) -> int | None:
    """The smallest n for which `enough(n)`, which holds from some n on; None where it does not up to `most`."""
    assert callable(enough)
    low, high = least, least
    while not enough(high):
        if high == most:
            return None
        low, high = high + 1, min(most, max(high + 1, math.ceil(high * 1.3)))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high
