"""A server without an engine, in a process of its own: what a balancer sees of one, TLS, health, drain and all.

SIGTERM ends it as it ends a server. After SIGUSR2 its health says not serving, after SIGUSR1 serving, whatever it
answers.
"""

import asyncio
import signal
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, cast

from server.job import Delta, GenerationJob, ServedTask
from server.registry.catalog import Catalog
from tests.server.adapters import entry
from tests.server.fakes import FakeEngine, Service

# What an answer takes.
_SECONDS = 0.4
_ABOUT_A_DOCUMENT = ServedTask(
    entry("who", document_template="D:{document}\n", template="who?", max_new_tokens=32), "alpha", "1", slot=None,
    activation="task",
)  # fmt: skip


class _Slow(FakeEngine):
    """Answers after a while."""

    async def generate(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        await asyncio.sleep(_SECONDS)
        yield Delta("a", 1, finish_reason="stop")


def stand_in(settings: Mapping[str, Any], ready: Connection) -> None:
    """Run until SIGTERM; `ready` gets a message once it serves."""
    asyncio.run(_serve(settings, ready))


async def _serve(settings: Mapping[str, Any], ready: Connection) -> None:
    service = Service(max_in_flight=64, **settings)
    service.servicer.engine = service.engine = cast(Any, _Slow())
    service.engine.prompts = service.servicer.prompts
    service.servicer.catalog = Catalog({**service.servicer.catalog.tasks, "who": _ABOUT_A_DOCUMENT})
    stop, changes = asyncio.Event(), list[asyncio.Future[None]]()

    def set_health(*, serving: bool) -> None:
        changes.append(asyncio.ensure_future(service.health.set(serving=serving)))

    loop = asyncio.get_running_loop()
    async with service.running():
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.add_signal_handler(signal.SIGUSR1, partial(set_health, serving=True))
        loop.add_signal_handler(signal.SIGUSR2, partial(set_health, serving=False))
        _, close = service.metrics.serve("127.0.0.1", service.settings.metrics_port)
        ready.send(True)
        await stop.wait()
        await service.drain()
        close()
