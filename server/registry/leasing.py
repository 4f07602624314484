"""Between a request and the engine: its adapter version is in the engine while it runs."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Protocol

from server.job import Delta, GenerationJob, ServedTask
from server.registry.residency import Aside, Residency


class RunsSequences(Protocol):
    def generate(self, job: GenerationJob) -> AsyncIterator[Delta]: ...


class LeasingEngine:
    """An engine whose `generate` first waits for the job's adapter version, and holds it to the end."""

    def __init__(self, engine: RunsSequences, residency: Residency) -> None:
        self._engine = engine
        self._residency = residency

    def prefetch(self, task: ServedTask) -> None:
        """A request for this task was admitted: have its version loaded while the request is prepared."""
        if task.version is not None:
            self._residency.prefetch(task.version)

    async def generate(self, job: GenerationJob, aside: Aside) -> AsyncIterator[Delta]:
        """The sequence's deltas; a wait for the version is inside `aside`.

        Raises StageError where that cannot be loaded.
        """
        version = job.task.version
        if version is None or job.without_adapter:
            async with aclosing(self._engine.generate(job)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    yield delta
            return
        async with (
            self._residency.lease(version, aside),
            aclosing(self._engine.generate(job)) as deltas,  # type: ignore[type-var]
        ):
            async for delta in deltas:
                yield delta
