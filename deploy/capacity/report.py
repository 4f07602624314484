"""Writes deploy/capacity.md; computes every figure in it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.capacity import CapacityError
from deploy.capacity.plan import LOAD_SECONDS, MEMORY_GIB, Demand, make_plan
from deploy.capacity.service import ServiceModel

_DEMANDS = (
    (25, 1, 5.0), (25, 1, 50.0), (1000, 50, 50.0), (10_000, 500, 200.0), (10_000, 2000, 1000.0),
)  # fmt: skip


def report(
    measured: ServiceModel,
    lengths: Sequence[tuple[int, int]],
    command: str,
    comparison: Mapping[str, Any] | None = None,
) -> str:
    """The document. `comparison`: the figures of `check`, the simulation against real servers."""
    prompt = sum(p for p, _ in lengths) / len(lengths)
    completion = sum(c for _, c in lengths) / len(lengths)
    lines = [
        "# Capacity",
        "",
        f"Made by `{command}` on {time.strftime('%Y-%m-%d')}.",
        f"Requests have {prompt:.0f} prompt tokens and {completion:.0f} generated tokens on average, as in those",
        "results.",
        "The popularity of tasks follows a Zipf law.",
        "",
        "## The service model",
        "",
        "A step of one replica takes",
        "",
        "    base + per_sequence · sequences + per_prompt_token · prompt tokens + per_adapter · distinct adapters",
        "",
        "The measured server" + (", on a single core:" if comparison else ":"),
        "",
        "| base | a sequence | a prompt token | a request, outside the engine | most requests/s |",
        "| --- | --- | --- | --- | --- |",
        f"| {1e3 * measured.base:.1f} ms | {1e3 * measured.per_sequence:.2f} ms | "
        f"{1e3 * measured.per_prompt_token:.3f} ms | {1e3 * measured.overhead:.1f} ms | "
        f"{measured.saturated_rate(prompt, completion):.1f} |",
        "",
        *(compared(comparison) if comparison else ()),
        "## Plans",
        "",
        "The table gives the fewest replicas of that server with a p95 time to first token of at most 1 s and",
        f"adapter-aware routing. A replica has {MEMORY_GIB:g} GiB. A step waits {LOAD_SECONDS:g} s for an adapter that",
        "is not in memory. For another machine, make a load test there (`fit`, then `plan --model`).",
        "",
        "| tasks T | adapters A | requests/s R | replicas | slots | memory a replica, GiB | adapters in memory "
        "| p95 TTFT, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tasks, adapters, rate in _DEMANDS:
        row = f"| {tasks:,} | {adapters:,} | {rate:g} | "
        try:
            plan = make_plan(Demand(tasks=tasks, adapters=adapters, rate=rate), measured, lengths)
        except CapacityError as error:
            lines.append(row + f"none: {error} | | | | |")
            continue
        made, p95 = plan.footprint, plan.outcome.percentiles(plan.outcome.ttft)[1]
        lines.append(row + f"{plan.replicas} | {made.slots} | {made.total:.1f} | {made.resident:,} | {1e3 * p95:.0f} |")
    return "\n".join([*lines, ""])


def compared(comparison: Mapping[str, Any]) -> list[str]:
    """Lines of the document that compare two real servers with the simulation."""
    (measured, modelled), (p95, simulated_p95) = comparison["saturated"], comparison["p95_s"]
    return [
        f"Two such servers with one core each, at full load, answered {measured:.1f} requests/s, by the model "
        f"{modelled:.1f}.",
        "The fit did not use these servers. A load of "
        f"{comparison['rate']:.1f} requests/s was then sent round robin: p95 end to end was",
        f"{p95:.2f} s, in the simulation {simulated_p95:.2f} s.",
        "",
    ]
