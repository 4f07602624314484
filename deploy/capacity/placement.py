"""Placement by adapter, the client's and an endpoint picker's, against round robin, simulated: hit rates and waits."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deploy.capacity.plan import LOAD_SECONDS
from deploy.capacity.routing import AdapterAware, EndpointPicker, RoundRobin, Router
from deploy.capacity.service import ServiceModel
from deploy.capacity.simulate import Memory, Outcome, poisson, simulate
from mtlora.client import Placement

REPLICAS = (8, 16, 32, 64)
ADAPTERS = (100, 1_000, 10_000)
# Adapters that a replica holds: the default of `adapter_slots`.
RESIDENT = 256
# Offered load as a share of the replicas' capacity.
UTILISATION = 0.6
# (prompt, completion) tokens, 35 and 11 on average as in capacity.md.
LENGTHS = tuple((prompt, completion) for prompt in (20, 35, 50) for completion in (6, 11, 16))
_SECONDS, _WARM_UP = 60.0, 30.0


@dataclass(frozen=True)
class Row:
    """One fleet, under each policy."""

    replicas: int
    adapters: int
    rate: float
    round_robin: Outcome
    placed: Outcome
    picked: Outcome

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return self.round_robin, self.placed, self.picked


def compare(
    model: ServiceModel,
    replicas: Sequence[int] = REPLICAS,
    adapters: Sequence[int] = ADAPTERS,
    *,
    seconds: float = _SECONDS,
) -> Iterator[Row]:
    """Simulate every fleet. The adapters' popularity follows Zipf's law."""
    prompt, completion = (sum(each) / len(LENGTHS) for each in zip(*LENGTHS, strict=True))
    by = Placement()
    routers: tuple[Callable[[int, int], Router], ...] = (
        lambda count, _: RoundRobin(count),
        lambda count, number: AdapterAware(count, adapters=number, slack=by.slack, floor=by.floor),
        lambda count, _: EndpointPicker(),
    )
    for count in replicas:
        rate = UTILISATION * count * model.saturated_rate(prompt, completion)
        for number in adapters:
            outcomes = [
                simulate(
                    poisson(rate, seconds, tasks=number, adapters=number, lengths=LENGTHS), count, model,
                    router(count, number),
                    memory=Memory(RESIDENT, LOAD_SECONDS), warm_up=seconds * _WARM_UP / _SECONDS,
                )
                for router in routers
            ]  # fmt: skip
            yield Row(count, number, rate, *outcomes)


def page(rows: Iterator[Row], command: str) -> str:
    """deploy/placement.md."""
    found = list(rows)
    above = [_p99(row.placed) / _p99(row.round_robin) for row in found if row.adapters <= RESIDENT]
    names = ("round robin", "placed", "picker")
    heads = [f"{what}, {name}" for what in ("hit rate", "p99 TTFT (ms)") for name in names]
    lines = [
        "# Adapters placed over replicas",
        "",
        f"Made by `{command}` on {time.strftime('%Y-%m-%d')}.",
        f"The page simulates the service model of [capacity](capacity.md) with {UTILISATION:.0%} of the replicas'",
        f"greatest throughput. A replica holds {RESIDENT} adapters. A step waits {LOAD_SECONDS:g} s for another one.",
        "The popularity of adapters follows a Zipf law. The figures cover the second half of "
        f"{_SECONDS:g} s, from a cold start.",
        "",
        "- *Placed*: `AsyncClient(..., placement=Placement())`, one client for all requests.",
        "- *Picker*: the scores and weights of overlay inference-pool's endpoint picker, with metrics up to 50 ms old.",
        "",
    ]
    if above:
        lines += [
            "Use placement if there are more adapters than a replica holds. With fewer, it saves little and sends the",
            "calls of popular adapters to few replicas: its p99 TTFT is then "
            f"{min(above):.1f} to {max(above):.1f} times that of",
            "round robin.",
            "",
        ]
    lines += [
        f"| {' | '.join(['replicas', 'adapters', 'requests/s', *heads])} |",
        "| --- " * (3 + len(heads)) + "|",
    ]
    for row in found:
        hits = [f"{each.hit_rate:.3f}" for each in row.outcomes]
        waits = [f"{1e3 * _p99(each):,.0f}" for each in row.outcomes]
        lines.append(f"| {' | '.join([str(row.replicas), f'{row.adapters:,}', f'{row.rate:.0f}', *hits, *waits])} |")
    return "\n".join([*lines, ""])


def _p99(outcome: Outcome) -> float:
    return outcome.percentiles(outcome.ttft)[2]
