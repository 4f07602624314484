"""A server without an engine, in a process of its own: what a balancer sees of one, TLS, health, drain and all.

SIGTERM ends it as it ends a server. After SIGUSR2 its health says not serving, after SIGUSR1 serving, whatever it
answers.
"""

import asyncio
import signal
from collections.abc import AsyncGenerator, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from server.job import Delta, GenerationJob, ServedTask
from server.registry.catalog import Catalog
from server.registry.residency import Residency
from server.registry.source import Found
from server.registry.storage import Storage
from server.registry.uploads import Uploads
from tests.server.adapters import entry
from tests.server.fakes import FakeEngine, FakeMemory, Service
from tests.server.slots import serving_version

# Seconds of an answer per allowed token.
_SECONDS = 0.02
_ADAPTERS = 100
_ABOUT_A_DOCUMENT = ServedTask(
    entry("who", document_template="D:{document}\n", template="who?", max_new_tokens=2), "alpha", "1", slot=None,
    activation="task",
)  # fmt: skip


class _Slow(FakeEngine):
    """Answers after a while."""

    async def generate(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        await asyncio.sleep(_SECONDS * job.sampling.max_new_tokens)
        yield Delta("a", 1, finish_reason="stop")


def _tasks() -> Iterator[tuple[str, ServedTask]]:
    """By id: one about documents, and `task-0` and so on of an adapter each."""
    yield "who", _ABOUT_A_DOCUMENT
    for number in range(_ADAPTERS):
        name, task = f"adapter-{number}", f"task-{number}"
        version = serving_version(name, task)
        yield task, ServedTask(entry(task), name, "1", slot=version.slots[task], version=version)


async def _verify(root: Path, found: Found) -> None:
    """Every upload is good."""


def stand_in(settings: Mapping[str, Any], ready: Connection) -> None:
    """Run until SIGTERM; `ready` gets a message once it serves."""
    asyncio.run(_serve(settings, ready))


async def _serve(settings: Mapping[str, Any], ready: Connection) -> None:
    service = Service(max_in_flight=64, **settings)
    slots, on_load = service.settings.adapter_slots, service.metrics.adapter_load.observe
    service.use(_Slow(), residency=Residency(FakeMemory(), slots, on_load=on_load))
    service.servicer.catalog = Catalog(dict(_tasks()))
    root = service.settings.adapters
    service.adapters.uploads = Uploads(
        Path(root) if root else None, _verify, Storage(), max_bytes=64 << 20, max_uploads=8, max_chunk_bytes=256 << 10
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with service.running():
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.add_signal_handler(signal.SIGUSR1, partial(service.health.set, serving=True))
        loop.add_signal_handler(signal.SIGUSR2, partial(service.health.set, serving=False))
        _, close = service.metrics.serve("127.0.0.1", service.settings.metrics_port)
        ready.send(True)
        await stop.wait()
        await service.drain()
        close()
