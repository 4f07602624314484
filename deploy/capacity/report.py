"""Writes deploy/capacity.md: everything in it is computed here."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.capacity.errors import CapacityError
from deploy.capacity.plan import CARDS, Demand, Sizes, make_plan
from deploy.capacity.routing import ROUTERS
from deploy.capacity.service import ServiceModel
from deploy.capacity.simulate import Memory, poisson, simulate

_DEMANDS = (
    (25, 1, 5.0), (25, 1, 50.0), (1000, 50, 50.0), (10_000, 500, 200.0), (10_000, 2000, 1000.0),
)  # fmt: skip


def report(
    measured: ServiceModel,
    lengths: Sequence[tuple[int, int]],
    command: str,
    comparison: Mapping[str, Any] | None = None,
) -> str:
    """The document. `comparison`: what `check` wrote of the simulation against real servers."""
    prompt = sum(p for p, _ in lengths) / len(lengths)
    completion = sum(c for _, c in lengths) / len(lengths)
    lines = [
        "# Capacity",
        "",
        f"Made by `{command}` on {time.strftime('%Y-%m-%d')}. Requests have {prompt:.0f} prompt tokens and "
        f"{completion:.0f} generated ones on average, as in those results; tasks are asked for under a Zipf law.",
        "",
        "## The service model",
        "",
        "A step of one replica costs `base + per_sequence · sequences + per_prompt_token · prompt tokens + per_adapter "
        "· distinct adapters`. Of the server that was measured, fitted to its results"
        + (", one on a single core:" if comparison else ":"),
        "",
        "| base | a sequence | a prompt token | a request, outside the engine | most requests/s |",
        "| --- | --- | --- | --- | --- |",
        f"| {1e3 * measured.base:.1f} ms | {1e3 * measured.per_sequence:.2f} ms | "
        f"{1e3 * measured.per_prompt_token:.3f} ms | {1e3 * measured.overhead:.1f} ms | "
        f"{measured.saturated_rate(prompt, completion):.1f} |",
        "",
        *(compared(comparison) if comparison else ()),
        "Cards without a load test of their own are a roofline of their memory bandwidth and compute at 40 % "
        "efficiency, with 4 ms a step to schedule and launch: an assumption until a load test on one replaces it "
        "(`fit`, then `plan --model`).",
        "",
        "## Plans",
        "",
        "The fewest replicas whose p95 time to first token is at most 1 s, adapter-aware routing:",
        "",
        "| card | tasks T | adapters A | requests/s R | replicas | slots | memory a replica, GiB | adapters in memory "
        "| p95 TTFT, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for card in CARDS.values():
        for tasks, adapters, rate in _DEMANDS:
            row = f"| {card.name} | {tasks:,} | {adapters:,} | {rate:g} | "
            try:
                plan = make_plan(Demand(tasks, adapters, rate), card, measured, lengths)
            except CapacityError as error:
                lines.append(row + f"none: {error} | | | | |")
                continue
            made, p95 = plan.footprint, plan.outcome.percentiles(plan.outcome.ttft)[1]
            lines.append(
                row + f"{plan.replicas} | {made.slots} | {made.total:.1f} | {made.resident:,} | {1e3 * p95:.0f} |"
            )
    lines += [
        "",
        "## Routing",
        "",
        "Adapter-aware routing (consistent hashing with bounded loads) against round robin, at 70 % of what the "
        "replicas can answer; each replica holds half of the adapters in "
        "memory, and a step waits 5 ms for another to load:",
        "",
        "| replicas | tasks | adapters | routing | requests/s | loads a request | adapters a step | p95 TTFT, ms | p95 "
        "end to end, ms | simulated in, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    h100 = CARDS["h100"].model(measured, Sizes())
    for replicas, tasks, adapters in ((4, 1000, 100), (20, 5000, 1000), (100, 10_000, 2000)):
        rate = min(0.7 * replicas * h100.saturated_rate(prompt, completion, 64), 3000.0)
        model = h100.scaled(rate / (0.7 * replicas * h100.saturated_rate(prompt, completion, 64)))
        for name, router in ROUTERS.items():
            began = time.perf_counter()
            requests = poisson(rate, 20.0, tasks=tasks, adapters=adapters, lengths=lengths)
            memory = Memory(max(1, adapters // 2), 0.005)
            outcome = simulate(requests, replicas, model, router(replicas), memory=memory, warm_up=5.0)
            took = time.perf_counter() - began
            ttft, e2e = outcome.percentiles(outcome.ttft)[1], outcome.percentiles(outcome.e2e)[1]
            lines.append(
                f"| {replicas} | {tasks:,} | {adapters:,} | {name} | {outcome.throughput:.0f} | "
                f"{outcome.loads / len(requests):.3f} | {outcome.adapters_per_step:.1f} | {1e3 * ttft:.0f} | "
                f"{1e3 * e2e:.0f} | {took:.1f} |"
            )
    lines += [
        "",
        "Replicas of this table are as fast as needed for 3,000 requests/s at the most, so that a simulation ends "
        "within a minute; what differs between the two rows of a pair is the routing alone.",
        "",
    ]
    return "\n".join(lines)


def compared(comparison: Mapping[str, Any]) -> list[str]:
    """Lines of the document: two real servers and the simulation, side by side."""
    (measured, simulated), (p95, simulated_p95) = comparison["throughput"], comparison["p95_s"]
    return [
        f"Two such servers, a core each, were then offered {comparison['rate']:.1f} requests/s, round robin: they "
        f"answered {measured:.1f}, the simulation {simulated:.1f}; p95 end to end was {p95:.2f} s, in the simulation "
        f"{simulated_p95:.2f} s.",
        "",
    ]
