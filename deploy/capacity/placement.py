"""Placement by adapter against round robin, simulated: hit rates of adapters, and waits."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deploy.capacity.plan import LOAD_SECONDS
from deploy.capacity.routing import AdapterAware, RoundRobin, Router
from deploy.capacity.service import ServiceModel
from deploy.capacity.simulate import Memory, Outcome, poisson, simulate
from mtlora.client import Placement

REPLICAS = (8, 16, 32, 64)
ADAPTERS = (100, 1_000, 10_000)
# Adapters that a replica holds: the default of `adapter_slots`.
SLOTS = 256
# Share of what the replicas can answer that is offered.
UTILISATION = 0.6
# (prompt, completion) tokens, 35 and 11 on average as in capacity.md.
LENGTHS = tuple((prompt, completion) for prompt in (20, 35, 50) for completion in (6, 11, 16))
_SECONDS, _WARM_UP = 60.0, 30.0


@dataclass(frozen=True)
class Row:
    """One fleet, under both policies."""

    replicas: int
    adapters: int
    rate: float
    round_robin: Outcome
    placed: Outcome


def compare(
    model: ServiceModel,
    replicas: Sequence[int] = REPLICAS,
    adapters: Sequence[int] = ADAPTERS,
    *,
    slots: int = SLOTS,
    seconds: float = _SECONDS,
) -> Iterator[Row]:
    """Simulate every fleet. The adapters' popularity follows Zipf's law."""
    prompt, completion = (sum(each) / len(LENGTHS) for each in zip(*LENGTHS, strict=True))
    by = Placement()
    routers: tuple[Callable[[int], Router], ...] = (
        RoundRobin,
        lambda count: AdapterAware(count, slack=by.slack, floor=by.floor),
    )
    for count in replicas:
        rate = UTILISATION * count * model.saturated_rate(prompt, completion)
        for number in adapters:
            outcomes = [
                simulate(
                    poisson(rate, seconds, tasks=number, adapters=number, lengths=LENGTHS), count, model, router(count),
                    memory=Memory(slots, LOAD_SECONDS), warm_up=seconds * _WARM_UP / _SECONDS,
                )
                for router in routers
            ]  # fmt: skip
            yield Row(count, number, rate, *outcomes)


def page(rows: Iterator[Row], command: str) -> str:
    """deploy/placement.md."""
    lines = [
        "# Adapters placed over replicas",
        "",
        f"Made by `{command}` on {time.strftime('%Y-%m-%d')}: the service model of [capacity](capacity.md), simulated, "
        f"with {UTILISATION:.0%} of what the replicas can answer. A replica holds {SLOTS} adapters; a step waits "
        f"{LOAD_SECONDS:g} s for another. Adapters' popularity follows a Zipf law; figures are of the second half of "
        f"{_SECONDS:g} s, from a cold start. Placed: `AsyncClient(..., placement=Placement())`, one client for all.",
        "",
        "| replicas | adapters | requests/s | hit rate, round robin | hit rate, placed | p99 TTFT, round robin, ms "
        "| p99 TTFT, placed, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        waits = [1e3 * each.percentiles(each.ttft)[2] for each in (row.round_robin, row.placed)]
        lines.append(
            f"| {row.replicas} | {row.adapters:,} | {row.rate:.0f} | {row.round_robin.hit_rate:.3f} "
            f"| {row.placed.hit_rate:.3f} | {waits[0]:,.0f} | {waits[1]:,.0f} |"
        )
    return "\n".join([*lines, ""])
