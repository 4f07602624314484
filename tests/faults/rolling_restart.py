"""Two servers behind one client channel are restarted in turn under load: no call may fail.

Each has its own cores, like replicas on two nodes, so that a starting server does not slow the other.
"""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from benchmarks.harness.asking import closed_loop
from benchmarks.harness.native_server import native_server
from benchmarks.harness.ports import free_port
from mtlora.client import AsyncClient, Client, MetricsPage, ServerError
from server.cli.process import ServerProcess
from server.engine.threads import deal
from tests.faults._load import Question, questions
from tests.faults.scenario import Options, Row

ORDER = 110
_IN_FLIGHT = 16
# Calls that a server answers after its restart before the other one is restarted.
_CALLS_BETWEEN = 32
# Short: many calls begin and end while a server stops and starts.
_ANSWER: dict[str, Any] = {"max_new_tokens": 4, "stop": [], "free": True}


class Restarted:
    """A server that can be restarted on its port."""

    server: ServerProcess

    def __init__(self, options: Options, cores: Sequence[int]) -> None:
        self._settings = {
            "backbone": options.backbone, "adapters": options.adapters, "kv_cache_gib": 0.5, "max_num_seqs": 16,
            "omp_threads_bind": ",".join(map(str, cores)), "log_level": "warning", "port": free_port(),
        }  # fmt: skip
        self._life = ExitStack()

    def start(self) -> None:
        self.server = self._life.enter_context(native_server(**self._settings))

    def stop(self) -> None:
        """End it as SIGTERM does."""
        self._life.close()

    def answered(self) -> float:
        """Calls answered since the start."""
        return MetricsPage.fetch(self.server.metrics).value("mtlora_requests_total", status="OK")


def run(options: Options) -> Row:
    """Restart ten times in all (short: twice)."""
    restarts = 10 if options.full else 2
    servers = [Restarted(options, cores) for cores in deal(sorted(os.sched_getaffinity(0)), 2)]
    with ExitStack() as stack:
        for each in servers:
            stack.callback(each.stop)
        with ThreadPoolExecutor() as starting:
            list(starting.map(Restarted.start, servers))
        with Client(servers[0].server.address, retry=None) as client:
            asked = questions(client, 64, options.seed)
        ends = asyncio.run(_restart_under_load(servers, restarts, asked))
    calls, failed = sum(ends.values()), sum(ends.values()) - ends["OK"]
    shown = "; ".join(f"{count} x {end}" for end, count in ends.items() if end != "OK")
    return Row(
        "rolling restart of two servers",
        "0 failed calls",
        f"{failed} of {calls} calls failed in {restarts} restarts" + (f": {shown}" if shown else ""),
        met=not failed and calls > restarts * _CALLS_BETWEEN,
    )


async def _restart_under_load(servers: list[Restarted], restarts: int, asked: list[Question]) -> Counter[str]:
    """The number of calls by status."""
    ends: Counter[str] = Counter()
    stopping = False

    async def ask(question: Question) -> None:
        try:
            await client.generate(question.task_id, question.text, **_ANSWER)
            ends["OK"] += 1
        except ServerError as error:
            ends[f"{error.code.name}: {error.message}"] += 1
            # A closed loop would spin where nothing answers.
            await asyncio.sleep(0.5)

    async def until_each_answers() -> None:
        for each in servers:
            while await asyncio.to_thread(each.answered) < _CALLS_BETWEEN:
                await asyncio.sleep(0.2)

    async with AsyncClient("ipv4:" + ",".join(each.server.address for each in servers), retry=None) as client:
        endless = itertools.takewhile(lambda _: not stopping, itertools.cycle(asked))
        load = asyncio.create_task(closed_loop(endless, _IN_FLIGHT, ask))
        for number in range(restarts):
            await until_each_answers()
            restarted = servers[number % len(servers)]
            await asyncio.to_thread(restarted.stop)
            await asyncio.to_thread(restarted.start)
        await until_each_answers()
        stopping = True
        await load
    return ends
