"""The protocol's model repository over the adapter registry: a model is a task, or an adapter with all its tasks."""

from collections.abc import Callable

from server.registry.registry import Registry
from server.rpc.adapters_service import statuses


class Repository:
    """Loads and unloads adapters; the name of a served task stands for its adapter. Raises RequestFailedError."""

    def __init__(self, registry: Callable[[], Registry]) -> None:
        self._registry = registry

    async def load(self, model: str) -> None:
        """Let the adapter's highest version serve."""
        name = self._adapter_of(model)
        with statuses(name):
            await self._registry().load(name)

    async def unload(self, model: str) -> None:
        """Stop serving the adapter."""
        name = self._adapter_of(model)
        with statuses(name):
            await self._registry().unload(name)

    def _adapter_of(self, model: str) -> str:
        task = self._registry().catalog.tasks.get(model)
        return task.adapter_name if task else model
