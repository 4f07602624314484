"""`make fleet`: three servers with a small backbone, behind HAProxy, behind nginx, and reached by the client itself.

Under a closed loop of 32, each server is restarted in turn, then one is killed. At last 100 adapters are asked for on
three servers of 40 slots, in turn and placed. The last line is for machines.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from mtlora.client import Access, Retry
from tests.factories import write_tiny_backbone
from tests.fleet._drills import IN_FLIGHT, Load, kill_one, load, rolling_restart
from tests.fleet._fleet import Balancer, Fleet, RealMember, installed, running_fleet
from tests.fleet._placing import MOST_OF_ROUND_ROBIN, compare, write_adapters

_BALANCERS = ("haproxy", "nginx", "round robin")
# Three servers share the cores of one machine.
_SETTINGS: dict[str, Any] = {
    "kv_cache_gib": 0.1, "max_num_seqs": 16, "adapter_slots": 40, "grace_period_s": 60, "drain_delay_s": 3,
    "log_level": "warning",
}  # fmt: skip
# Short: many calls begin and end while a server stops and starts.
_ANSWER: dict[str, Any] = {"max_new_tokens": 8, "stop": []}


def main() -> int:
    """0 if every goal is met."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet", description=__doc__)
    parser.add_argument("--calls", type=int, default=200, help="calls between two restarts; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=_BALANCERS, default=_BALANCERS)
    options = parser.parse_args()
    missing = [name for name in options.only if name != "round robin" and not installed(name)]
    if missing:
        print(f"fleet: {', '.join(missing)} not installed; on Debian: apt-get install {' '.join(missing)}")
        return 2
    parts, kills, met = list[str](), list[str](), True
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        backbone = write_tiny_backbone(Path(folder, "backbone"))
        adapters = write_adapters(Path(folder, "adapters"), backbone, 100)
        settings = {**_SETTINGS, "backbone": backbone, "adapters": adapters}
        with running_fleet(RealMember, Path(folder), **settings) as fleet:
            tasks = _tasks(fleet)
            for name in options.only:
                restarted, once, repeated = asyncio.run(_drill(fleet, name, tasks, options.calls))
                met &= not restarted.failed and not repeated.failed and once.codes <= {"UNAVAILABLE"}
                _print(f"{name}, rolling restart", restarted)
                _print(f"{name}, kill -9", once)
                _print(f"{name}, kill -9, repeated by the client", repeated)
                parts.append(f"{name} {_failed(restarted)} over a rolling restart")
                kills.append(f"{name} {_failed(once)}, repeated {_failed(repeated)}")
            in_turn, placed = asyncio.run(compare(fleet, tasks))
    met &= placed <= MOST_OF_ROUND_ROBIN * in_turn
    loads = f"cold loads: placed {placed:,}, in turn {in_turn:,}"
    print(f"fleet: {', '.join(parts)}; kill: {', '.join(kills)}; {loads}: {'met' if met else 'MISSED'}")
    return int(not met)


async def _drill(fleet: Fleet, name: str, tasks: list[str], calls: int) -> tuple[Load, Load, Load]:
    """The loads of a rolling restart, and of a kill: calls made once, and calls that the client repeats."""
    if name == "round robin":
        return await _under_load(fleet, fleet.address, fleet.access(), tasks, calls)
    with Balancer(name, fleet) as balancer:
        return await _under_load(fleet, balancer.address, balancer.access(), tasks, calls)


async def _under_load(
    fleet: Fleet, address: str, access: Access, tasks: list[str], calls: int
) -> tuple[Load, Load, Load]:
    async with load(address, access, tasks, **_ANSWER) as restarted:
        await rolling_restart(fleet, restarted, calls)
    half: dict[str, Any] = {"in_flight": IN_FLIGHT // 2, **_ANSWER}
    async with (
        load(address, access, tasks, **half) as once,
        load(address, access, tasks, retry=Retry(), **half) as repeated,
    ):
        await kill_one(fleet, once, calls)
    return restarted, once, repeated


def _tasks(fleet: Fleet) -> list[str]:
    with fleet.client(fleet.members[0].address) as client:
        return [task.id for task in client.tasks()]


def _print(what: str, found: Load) -> None:
    print(f"{what:<44} {_failed(found)} {found.failed or ''}", flush=True)


def _failed(found: Load) -> str:
    return f"{sum(found.failed.values())} failed of {found.calls:,}"


if __name__ == "__main__":
    sys.exit(main())
