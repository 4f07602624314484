"""Replicas, slots and memory for T tasks, A adapters and R requests a second.

Memory follows from sizes; replicas from simulating more and more of them until the wait for the first token is short
enough.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.capacity import CapacityError
from deploy.capacity.routing import ROUTERS
from deploy.capacity.service import ServiceModel
from deploy.capacity.simulate import Memory, Outcome, poisson, simulate

_GIB = 1 << 30
# Share of a replica's memory for the runtime, activations and compiled graphs.
_RESERVE = 0.1
# A replica's memory by default.
MEMORY_GIB = 8.0
# Time to load an adapter that is not in memory.
LOAD_SECONDS = 0.05
MAX_REPLICAS = 100
# Simulated seconds: long enough for stable tails, and short enough to search over replicas within a minute.
_SECONDS, _WARM_UP = 60.0, 15.0
_MAX_REQUESTS = 60_000


@dataclass(frozen=True)
class Sizes:
    """Bytes of the backbone's weights, of a token in the KV cache, of one adapter version, of one task's biases.

    The defaults are the default backbone's in bfloat16 (30 layers, 3 key-value heads of 64) and the shipped adapter's.
    """

    backbone: int = 269_060_552
    kv_token: int = 30 * 2 * 3 * 64 * 2
    adapter: int = 6_300_000
    task: int = 30 * 4 * 8 * 4


class Demand(BaseModel):
    """The load to serve. p95_ttft: seconds in which 95 % of the requests must get their first token."""

    model_config = ConfigDict(frozen=True)

    tasks: int = Field(ge=1, le=100_000)
    adapters: int = Field(ge=1)
    rate: float = Field(gt=0, allow_inf_nan=False)
    p95_ttft: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _no_adapter_without_a_task(self) -> Self:
        if self.adapters > self.tasks:
            raise ValueError(f"adapters: found {self.adapters} for {self.tasks} tasks; a task has one adapter at most")
        return self


@dataclass(frozen=True)
class Footprint:
    """Memory of one replica in GiB. resident: adapter versions in memory at a time."""

    backbone: float
    kv_cache: float
    adapters: float
    tasks: float
    resident: int
    slots: int

    @property
    def total(self) -> float:
        """All of it except the reserve."""
        return self.backbone + self.kv_cache + self.adapters + self.tasks


@dataclass(frozen=True)
class Plan:
    """`replicas` replicas with `footprint` each, and the outcome of their simulation."""

    replicas: int
    footprint: Footprint
    outcome: Outcome


def footprint(demand: Demand, memory_gib: float, model: ServiceModel, sizes: Sizes, tokens: float) -> Footprint:
    """Memory for `max_num_seqs` sequences of `tokens` tokens. Raises CapacityError if not even one adapter fits."""
    budget = memory_gib * (1 - _RESERVE) * _GIB
    kv = model.max_num_seqs * tokens * sizes.kv_token
    fixed = sizes.backbone + kv + demand.tasks * sizes.task
    left = budget - fixed
    if left < sizes.adapter:
        raise CapacityError(
            f"memory: a replica has {budget / _GIB:.1f} GiB to use; the backbone takes {sizes.backbone / _GIB:.1f}, "
            f"the KV cache of {model.max_num_seqs} sequences {kv / _GIB:.1f}, {demand.tasks} tasks "
            f"{demand.tasks * sizes.task / _GIB:.1f}: no room for one adapter. Take more memory, tensor parallelism, "
            f"or fewer sequences"
        )
    resident = min(demand.adapters, int(left // sizes.adapter))
    return Footprint(
        sizes.backbone / _GIB, kv / _GIB, resident * sizes.adapter / _GIB, demand.tasks * sizes.task / _GIB,
        resident, model.max_num_seqs,
    )  # fmt: skip


def make_plan(
    demand: Demand,
    model: ServiceModel,
    lengths: Sequence[tuple[int, int]],
    *,
    memory_gib: float = MEMORY_GIB,
    sizes: Sizes | None = None,
    router: str = "adapter-aware",
    max_replicas: int = MAX_REPLICAS,
) -> Plan:
    """The fewest replicas that meet the demand. Raises CapacityError if none do; the message says why."""
    sizes = sizes or Sizes()
    prompt = sum(p for p, _ in lengths) / len(lengths)
    completion = sum(c for _, c in lengths) / len(lengths)
    made = footprint(demand, memory_gib, model, sizes, max(p + c for p, c in lengths))
    alone = model.step(1, int(prompt), 1) + model.overhead
    if alone > demand.p95_ttft:
        raise CapacityError(
            f"p95_ttft: found {demand.p95_ttft:g} s; a request alone takes {alone:.3g} s to its first token, "
            f"and no number of replicas shortens that"
        )
    most = model.saturated_rate(prompt, completion, min(demand.adapters, model.max_num_seqs))
    least = max(1, math.ceil(demand.rate / most))
    if least > max_replicas:
        raise CapacityError(
            f"rate: found {demand.rate:g} requests/s; {max_replicas} replicas answer at most "
            f"{max_replicas * most:.3g}. Raise max_replicas, or take a faster machine"
        )
    seconds = min(_SECONDS, _MAX_REQUESTS / demand.rate)
    memory = Memory(made.resident, LOAD_SECONDS)

    def outcome(replicas: int) -> Outcome:
        requests = poisson(demand.rate, seconds, tasks=demand.tasks, adapters=demand.adapters, lengths=lengths)
        warm_up = seconds * _WARM_UP / _SECONDS
        return simulate(requests, replicas, model, ROUTERS[router](replicas), memory=memory, warm_up=warm_up)

    # The more replicas, the shorter the wait: the first number that meets the demand is the least.
    found = least + bisect.bisect_left(
        range(least, max_replicas + 1), True, key=lambda replicas: _meets(outcome(replicas), demand)
    )
    if found > max_replicas:
        raise CapacityError(
            f"p95_ttft: found {demand.p95_ttft:g} s; not met by {max_replicas} replicas at {demand.rate:g} requests/s"
        )
    return Plan(found, made, outcome(found))


def _meets(outcome: Outcome, demand: Demand) -> bool:
    return len(outcome.ttft) > 0 and outcome.percentiles(outcome.ttft)[1] <= demand.p95_ttft
