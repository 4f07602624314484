"""Strangers hold thousands of connections and calls; a tenant's latency must not change."""

import asyncio
import contextlib
import itertools
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.asking import closed_loop
from benchmarks.harness.native_server import native_server
from benchmarks.harness.percentile import p99
from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.client import Access, AsyncClient, ServerError
from tests.faults._load import Question, questions
from tests.faults._strangers import HALF_OPEN, IDLE, SLOW
from tests.faults.scenario import Options, Row

ORDER = 100
P99_GOAL = 1.25
_IN_FLIGHT = 8
# Share of the strangers' connections and calls that stay open: the server ends some, and they come again.
_HELD = 0.9
# Idle connections, half-open calls and slow connections.
Open = tuple[int, int, int]
# Short answers: more of them.
_PARAMETERS: dict[str, Any] = {"max_new_tokens": 4, "stop": [], "free": True}


def run(options: Options) -> Row:
    """Turns of 5 s without the strangers and with them, 60 s of each (short: 20 s)."""
    turns, turn_s = (12, 5.0) if options.full else (4, 5.0)
    key, entry = tenant("a")
    with (
        native_server(
            backbone=options.backbone, adapters=options.adapters, kv_cache_gib=0.5, max_num_seqs=16,
            tenants=write_tenants(options.folder / "tenants.yaml", entry), log_level="warning",
        ) as server,
        _strangers(server.address) as tell,
    ):  # fmt: skip
        access = Access(api_key=key)
        with server.client(access) as client:
            asked = questions(client, 64, options.seed)
        alone: list[float] = []
        beside: list[float] = []
        ends: Counter[str] = Counter()
        held: list[Open] = []

        def turn(into: list[float]) -> None:
            asyncio.run(_turn(server.address, access, asked, turn_s, into, ends))

        def turn_beside() -> None:
            tell("open")
            turn(beside)
            held.append(tell("count"))
            tell("close")

        # The first turn warms up.
        turn([])
        for number in range(turns):
            for each in (lambda: turn(alone), turn_beside)[:: -1 if number % 2 else 1]:
                each()
    ratio, refused = p99(beside) / p99(alone), sum(ends.values()) - ends["OK"]
    idle, half_open, slow = (min(each) for each in zip(*held, strict=True))
    return Row(
        "strangers' connections",
        f"a tenant's p99 <= {P99_GOAL} x without; none refused; at every turn's end {_HELD:.0%} of {IDLE} idle "
        f"connections, {HALF_OPEN} half-open calls and {SLOW} slow connections are open",
        f"p99 {ratio:.2f} x ({1e3 * p99(alone):.0f} ms to {1e3 * p99(beside):.0f} ms; {len(beside)} requests, "
        f"{refused} refused) beside at least {idle} idle connections, {half_open} half-open calls, {slow} slow "
        "connections",
        met=ratio <= P99_GOAL and not refused and all(map(were_open, held)),
    )


def were_open(found: Open) -> bool:
    """Whether the strangers held enough connections and calls."""
    return all(each >= _HELD * wanted for each, wanted in zip(found, (IDLE, HALF_OPEN, SLOW), strict=True))


@contextlib.contextmanager
def _strangers(address: str) -> Iterator[Callable[[str], Open]]:
    """A process of strangers, and what tells it to open, count or close its connections and waits for its count."""
    command = [sys.executable, "-m", "tests.faults._strangers", address]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:

        def tell(what: str) -> Open:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(f"{what}\n")
            child.stdin.flush()
            if not (line := child.stdout.readline()):
                raise RuntimeError("the strangers' process ended")
            idle, half_open, slow = map(int, line.split())
            return idle, half_open, slow

        try:
            yield tell
        finally:
            child.kill()


async def _turn(
    address: str, access: Access, asked: list[Question], seconds: float, into: list[float], ends: Counter[str]
) -> None:
    """A tenant's closed loop, over a new connection; `into` gets the seconds of its requests."""
    until = time.monotonic() + seconds

    async def ask(question: Question) -> None:
        began = time.perf_counter()
        try:
            await client.generate(question.task_id, question.text, timeout=60, **_PARAMETERS)
            ends["OK"] += 1
        except ServerError as error:
            ends[error.code.name] += 1
        into.append(time.perf_counter() - began)

    async with AsyncClient(address, access, retry=None) as client:
        endless = itertools.takewhile(lambda _: time.monotonic() < until, itertools.cycle(asked))
        await closed_loop(endless, _IN_FLIGHT, ask)
