"""The protocol's model repository over the adapter registry: a model is a task, or an adapter with all its tasks."""

from collections.abc import Callable
from typing import Protocol

from server.registry.registry import Registry
from server.rpc.adapters_service import statuses


class Repository(Protocol):
    """What can load and unload models while the server runs. Both raise RequestFailedError."""

    async def load(self, model: str) -> None:
        """Load what lies in the repository under this name, or its newer version."""

    async def unload(self, model: str) -> None:
        """Stop serving it."""


class RegistryRepository:
    """Loads and unloads adapters. The name of a task that is served stands for the adapter that serves it."""

    def __init__(self, registry: Callable[[], Registry]) -> None:
        self._registry = registry

    async def load(self, model: str) -> None:
        name = self._adapter_of(model)
        with statuses(name):
            await self._registry().load(name)

    async def unload(self, model: str) -> None:
        name = self._adapter_of(model)
        with statuses(name):
            await self._registry().unload(name)

    def _adapter_of(self, model: str) -> str:
        task = self._registry().catalog.tasks.get(model)
        return task.adapter_name if task else model
