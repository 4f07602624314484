"""What a fleet must bear under load: each server restarted in turn, and one killed."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.asking import closed_loop
from mtlora.client import Access, AsyncClient, Placement, Retry, ServerError
from tests.fleet._fleet import Fleet, Member
from tests.waiting import eventually

IN_FLIGHT = 32
# Deadline of calls that hang.
_TIMEOUT_S = 120.0


@dataclass
class FleetCalls:
    """How calls ended: gRPC's status, and its message where that is not OK. running: in flight now.

    open: calls may begin.
    """

    ends: Counter[str] = field(default_factory=Counter)
    running: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def calls(self) -> int:
        return sum(self.ends.values())

    @property
    def failed(self) -> dict[str, int]:
        return {end: count for end, count in self.ends.items() if end != "OK"}

    @property
    def codes(self) -> set[str]:
        """Statuses of the calls that failed."""
        return {end.partition(":")[0] for end in self.failed}


@asynccontextmanager
async def load(
    address: str,
    access: Access,
    tasks: Iterable[str],
    *,
    retry: Retry | None = None,
    placement: Placement | None = None,
    in_flight: int = IN_FLIGHT,
    **asked: Any,
) -> AsyncIterator[FleetCalls]:
    """A closed loop of unary calls, of as many as are in flight; the block's end waits for the last."""
    found, stopping = FleetCalls(), asyncio.Event()
    found.open.set()

    async def ask(task: str) -> None:
        await found.open.wait()
        found.running += 1
        try:
            await client.generate(task, "some words", timeout=_TIMEOUT_S, **asked)
            found.ends["OK"] += 1
        except ServerError as error:
            found.ends[f"{error.code.name}: {error.message}"] += 1
            # A closed loop would spin where nothing answers.
            await asyncio.sleep(0.2)
        finally:
            found.running -= 1

    async with AsyncClient(address, access, retry, placement) as client:
        endless = itertools.takewhile(lambda _: not stopping.is_set(), itertools.cycle(tasks))
        running = asyncio.create_task(closed_loop(endless, in_flight, ask))
        try:
            yield found
        finally:
            stopping.set()
            await running


def only_what_ran_failed(once: Iterable[FleetCalls], ran: int) -> bool:
    """Whether calls that are not repeated failed, with UNAVAILABLE, and no more than ran on the killed server."""
    loads = list(once)
    failed = sum(count for found in loads for count in found.failed.values())
    return 0 < failed <= ran and all(found.codes <= {"UNAVAILABLE"} for found in loads)


async def rolling_restart(fleet: Fleet, found: FleetCalls, calls_between: int) -> None:
    """Restart each server once the load has gone on and each server has answered some of it."""
    for member in fleet.members:
        await _go_on(fleet, found, calls_between)
        await asyncio.to_thread(member.stop)
        await asyncio.to_thread(_start, member)
    await _go_on(fleet, found, calls_between)


async def kill_one(fleet: Fleet, once: Sequence[FleetCalls], calls_between: int) -> int:
    """Kill a server under load, go on without it, start it again; returns the calls that ran there.

    once: the loads whose calls are not repeated. None of these calls begins between the count and the kill.
    """
    found = once[0]
    await _go_on(fleet, found, calls_between)
    victim = fleet.members[0]
    for each in once:
        each.open.clear()
    # Calls on their way arrive.
    await asyncio.sleep(0.02)
    ran = await asyncio.to_thread(_in_flight, victim)
    await asyncio.to_thread(victim.kill)
    for each in once:
        each.open.set()
    before = found.calls
    await eventually(lambda: found.calls >= before + calls_between, _TIMEOUT_S)
    await asyncio.to_thread(_start, victim)
    await _go_on(fleet, found, calls_between)
    return ran


def _start(member: Member) -> None:
    member.start()
    member.wait_ready()


def _in_flight(member: Member) -> int:
    return int(member.page().value("mtlora_requests_in_flight"))


async def _go_on(fleet: Fleet, found: FleetCalls, calls: int) -> None:
    """Wait until more calls have ended and every server has answered some."""
    before = found.calls
    answered = [await asyncio.to_thread(member.answered) for member in fleet.members]
    await eventually(lambda: found.calls >= before + calls, _TIMEOUT_S)
    async with asyncio.timeout(_TIMEOUT_S):
        for member, had in zip(fleet.members, answered, strict=True):
            while await asyncio.to_thread(member.answered) <= had:
                await asyncio.sleep(0.2)
