"""`make fleet`: three servers with a small backbone, behind HAProxy, behind nginx, and reached by the client itself.

100 adapters are asked for on three servers of 40 slots, in turn and placed. Then, under a closed loop of 32 through
each way, the servers are restarted in turn, and one is killed. The last line is for machines.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlora.client import Access, Retry
from tests.factories import write_tiny_backbone
from tests.fleet._drills import IN_FLIGHT, FleetCalls, kill_one, load, only_what_ran_failed, rolling_restart
from tests.fleet._fleet import Balancer, Fleet, RealMember, StandIn, installed, running_fleet
from tests.fleet._placing import MOST_OF_ROUND_ROBIN, compare, write_adapters

_BALANCERS = ("haproxy", "nginx")
# Three servers share the cores of one machine.
_SETTINGS: dict[str, Any] = {
    "kv_cache_gib": 0.1, "max_num_seqs": 16, "max_in_flight": 256, "adapter_slots": 40, "grace_period_s": 60,
    "drain_delay_s": 5, "log_level": "warning",
}  # fmt: skip
# Short: many calls begin and end while a server stops and starts.
_ANSWER: dict[str, Any] = {"max_new_tokens": 8}


@dataclass(frozen=True)
class Way:
    """A way to the servers: by a balancer, or by the client's own round robin."""

    name: str
    address: str
    access: Access


def main() -> int:
    """0 if every goal is met."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet", description=__doc__)
    parser.add_argument("--calls", type=int, default=200, help="calls between two restarts; default: %(default)s")
    parser.add_argument(
        "--stand-in", action="store_true", help="servers without an engine: the balancers alone, in a minute"
    )
    options = parser.parse_args()
    if missing := [name for name in _BALANCERS if not installed(name)]:
        print(f"fleet: {', '.join(missing)} not installed; on Debian: apt-get install {' '.join(missing)}")
        return 2
    with tempfile.TemporaryDirectory(prefix="fleet-") as name, ExitStack() as stack:
        folder = Path(name)
        if options.stand_in:
            fleet = stack.enter_context(running_fleet(StandIn, folder, adapter_slots=40, drain_delay_s=5))
        else:
            backbone = write_tiny_backbone(folder / "backbone", hidden_size=64, heads=2)
            adapters = write_adapters(folder / "adapters", backbone, 100)
            settings = {**_SETTINGS, "backbone": backbone, "adapters": adapters}
            fleet = stack.enter_context(running_fleet(RealMember, folder, **settings))
        balancers = [stack.enter_context(Balancer(each, fleet)) for each in _BALANCERS]
        ways = [Way(each.name, each.address, each.access()) for each in balancers]
        ways.append(Way("round robin", fleet.address, fleet.access()))
        tasks = _tasks(fleet)
        print(f"{len(fleet.members)} servers serve", flush=True)
        in_turn, placed = asyncio.run(compare(fleet, tasks))
        print(f"cold loads of {len(tasks)} adapters: placed {placed:,}, in turn {in_turn:,}", flush=True)
        restarted, _ = asyncio.run(
            _under_load(ways, tasks, lambda once: rolling_restart(fleet, once[0], options.calls))
        )
        _print("rolling restart", restarted)
        killed, ran = asyncio.run(
            _under_load(ways, tasks, lambda once: kill_one(fleet, once, options.calls), twice=True)
        )
        _print("kill -9", killed)
    repeated = {name: found for name, found in killed.items() if name.endswith("repeated")}
    once = {name: found for name, found in killed.items() if name not in repeated}
    met = (
        placed <= MOST_OF_ROUND_ROBIN * in_turn
        and not any(found.failed for found in (*restarted.values(), *repeated.values()))
        and only_what_ran_failed(once.values(), ran)
    )
    print(
        f"fleet: {_all(restarted)} over a rolling restart; kill: {ran} calls ran there, {_all(killed)}; "
        f"cold loads: placed {placed:,}, in turn {in_turn:,}: {'met' if met else 'MISSED'}"
    )
    return int(not met)


async def _under_load(
    ways: list[Way], tasks: list[str], drill: Callable[[list[FleetCalls]], Awaitable[Any]], *, twice: bool = False
) -> tuple[dict[str, FleetCalls], Any]:
    """A drill, with its result, under a closed loop of 32 through every way. It gets the loads that make calls once.

    twice: half of each makes calls once, half repeats them.
    """
    loads: dict[str, FleetCalls] = {}
    async with AsyncExitStack() as stack:
        for way in ways:
            for suffix, retry in (("", None), (", repeated", Retry()))[: 2 if twice else 1]:
                loads[way.name + suffix] = await stack.enter_async_context(
                    load(way.address, way.access, tasks, retry=retry, in_flight=IN_FLIGHT // (1 + twice), **_ANSWER)
                )
        result = await drill([loads[way.name] for way in ways])
    return loads, result


def _tasks(fleet: Fleet) -> list[str]:
    with fleet.client(fleet.members[0].address) as client:
        return [task.id for task in client.tasks() if task.id.startswith("task-")]


def _print(what: str, loads: dict[str, FleetCalls]) -> None:
    for name, found in loads.items():
        print(f"{what}, {name:<24} {_failed(found)} {found.failed or ''}", flush=True)


def _all(loads: dict[str, FleetCalls]) -> str:
    return ", ".join(f"{name} {_failed(found)}" for name, found in loads.items())


def _failed(found: FleetCalls) -> str:
    return f"{sum(found.failed.values())} failed of {found.calls:,}"


if __name__ == "__main__":
    sys.exit(main())
