"""A registry without an engine: a real folder, real checks, an engine's memory that a test watches."""

import asyncio
from pathlib import Path
from typing import Any

from mtlora.checkpoint.format import CheckpointError
from mtlora.checkpoint.read import read_manifest
from server.job import Lane
from server.registry.catalog import Catalog
from server.registry.check import NoEngineError, VerificationLimits, check
from server.registry.events import Event, Events
from server.registry.folder import Folder
from server.registry.lifecycle import Lifecycle
from server.registry.registry import Registry
from server.registry.residency import Residency
from server.registry.source import Found
from server.registry.spool import Spool
from server.registry.verifier import Verified
from server.registry.version import AdapterVersion, ElsewhereError, Stage, StageError
from server.telemetry.metrics import Metrics
from tests.server.adapters import entry, write_adapter
from tests.server.slots import TINY, Loads, make_slots
from tests.waiting import eventually


def write(folder: Path, *task_ids: str, seed: int = 0, backbone: Any = TINY, task_bias: bool = True) -> None:
    write_adapter(folder, [entry(task) for task in task_ids], backbone=backbone, task_bias=task_bias, seed=seed)


class Verifier:
    """Checks in this process."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    async def verify(self, root: Path, found: Found) -> Verified:
        incoming = self._spool.incoming()
        try:
            content = check(root, found.folder, incoming, {Lane.TEXT: TINY}, VerificationLimits(1 << 20))
        except (CheckpointError, OSError) as error:
            self._spool.discard(incoming)
            raise StageError(Stage.VERIFIED, str(error)) from None
        except NoEngineError as error:
            self._spool.discard(incoming)
            raise ElsewhereError(str(error)) from None
        return Verified(content, self._spool.keep(incoming, content), read_manifest(self._spool.root / content))


class Engine(Loads):
    """Loads nothing, but insists that the files are there."""

    async def load(self, folder: Path, slots: Any) -> None:
        assert (folder / "adapter.safetensors").exists()
        await super().load(folder, slots)


class Watched(Folder):
    """Counts its looks."""

    looks = 0

    async def look(self) -> dict[str, dict[str, Found]] | None:
        found = await super().look()
        self.looks += 1
        return found


class Home:
    """A registry over a folder, and all that it published."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root = root
        self.engine = Engine()
        self.spool = Spool(scratch)
        self.events: list[Event] = []
        self.tables: list[Catalog] = []
        self.warmed: list[str] = []
        self.cold_sequence: Exception | None = None
        metrics = Metrics()
        self.metrics = metrics.registry

        def on_event(event: Event) -> None:
            metrics.record_stage(event.stage.value, event.failed_stage.value if event.failed_stage else None)
            self.events.append(event)

        self.verifier = Verifier(self.spool)
        self.residency = Residency(self.engine, 8)
        events = Events(on_event)
        lifecycle = Lifecycle(
            root=root,
            verifier=self.verifier,
            spool=self.spool,
            residencies={Lane.TEXT: self.residency},
            make_slots=make_slots,
            warm=self._warm,
            events=events,
        )
        self.folder = Watched(root, events)
        self.registry = Registry(self.folder, lifecycle, self.tables.append, on_swap=metrics.adapter_swap.observe)
        self._running: asyncio.Task[None] | None = None

    async def _warm(self, version: AdapterVersion) -> None:
        if self.cold_sequence:
            raise self.cold_sequence
        self.warmed.append(version.distinct_slots[0].lora_name)

    def version_of(self, task: str) -> AdapterVersion:
        """The version that serves a task."""
        version = self.tables[-1].tasks[task].version
        assert version is not None
        return version

    async def open(self) -> None:
        await self.registry.verify_all()
        await self.registry.load_all()

    def follow(self) -> None:
        self._running = asyncio.create_task(self.registry.run(0.1))

    async def close(self) -> None:
        if self._running:
            self._running.cancel()
        self.spool.close()

    def serving(self) -> dict[str, str]:
        return {task: f"{row.adapter_name}/{row.adapter_version}" for task, row in self.tables[-1].tasks.items()}

    def stages(self, version: str) -> list[Stage]:
        return [event.stage for event in self.events if event.version == version]

    async def until_serving(self, task: str, version: str) -> None:
        await eventually(lambda: self.serving().get(task) == version)

    async def looked(self) -> None:
        """Wait until the registry that follows the folder has seen what lies there now, and done what follows."""
        # The first of these looks may have begun before.
        seen = self.folder.looks + 2
        await eventually(lambda: self.folder.looks >= seen)
        await eventually(lambda: not any(record.following for record in self.registry.records.values()))
