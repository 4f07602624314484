"""Moves versions through their stages: verifies, loads, warms and drains them."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from server.errors import EngineDeadError
from server.job import Lane
from server.registry.events import Event, Events
from server.registry.residency import Residency
from server.registry.source import Found
from server.registry.spool import Spool
from server.registry.verifier import Verified
from server.registry.version import AdapterVersion, Stage, StageError

if TYPE_CHECKING:
    from mtlora.checkpoint.format import AdapterManifest
    from mtlora.task import TaskSpec

# (adapter name, version, folder, manifest, first id) -> a vLLM LoRARequest for each task id.
MakeSlots = Callable[[str, str, Path, "AdapterManifest", int], Mapping[str, Any]]


class Verifies(Protocol):
    async def verify(self, root: Path, found: Found) -> Verified: ...


@dataclass
class Lifecycle:
    """root: the folder of adapters. residencies: one for each engine. warm: runs a short sequence on a version.

    prepare_images: sets a task's image normalisation to the backbone's if the task has none.
    """

    root: Path
    verifier: Verifies
    spool: Spool
    residencies: Mapping[Lane, Residency]
    make_slots: MakeSlots
    warm: Callable[[AdapterVersion], Awaitable[None]]
    events: Events
    prepare_images: Callable[["TaskSpec"], "TaskSpec"] = lambda spec: spec
    _next_id: int = 1
    _draining: set[asyncio.Task[None]] = field(default_factory=set)

    async def bring(self, version: AdapterVersion) -> AdapterVersion:
        """Verify, load and warm a version, unless it is already serving.

        Returns the version to serve: an already known one if it has the same content. Raises StageError; the version is
        then drained.
        """
        version = await self.verify(version)
        if version.stage is Stage.SERVING:
            return version
        try:
            await self._warm(version)
        except BaseException:
            self.retire(version)
            raise
        return version

    async def verify(self, version: AdapterVersion) -> AdapterVersion:
        """Copy a version to the spool, verified. Returns as `bring` does. Raises StageError."""
        if version.copied:
            return version
        files, record = version.found, version.adapter
        verified = await self.verifier.verify(self.root, files)
        for twin in record.versions:
            # The engine identifies versions only by name, version and content.
            if twin.copied and (twin.version, twin.content) == (version.version, verified.content):
                self.spool.release(verified.content)
                if version.present:
                    record.versions.remove(version)
                    twin.be_present(files)
                return twin
        if version.content != verified.content:
            # This label identifies a version in the engine and its prefix cache.
            label = f"{version.version}@{verified.content[:16]}"
            manifest = verified.manifest
            version.slots = self.make_slots(version.name, label, verified.folder, manifest, self._next_id)
            self._next_id = max(slot.lora_int_id for slot in version.slots.values()) + 1
            version.lane = Lane.IMAGES if manifest.images else Lane.TEXT
            version.heads, version.projector = verified.heads, verified.projector
            version.specs = {task.id: self.prepare_images(task) for task in manifest.tasks}
            version.activation = manifest.config.activation
            version.calibration = manifest.calibration
            version.fewest = None
        version.content, version.folder = verified.content, verified.folder
        version.copied = True
        if version not in record.versions:
            # The version's files have vanished meanwhile.
            record.versions.append(version)
        self._reach(version, Stage.VERIFIED)
        return version

    async def _warm(self, version: AdapterVersion) -> None:
        if version.leaving:
            # The version is needed again before its drain has ended.
            version.enter(Stage.VERIFIED)
        residency = self.residencies[version.lane]
        with residency.hold(version):
            async with residency.lease(version):
                self._reach(version, Stage.LOADED)
                try:
                    await self.warm(version)
                except EngineDeadError:
                    raise
                except Exception as error:
                    raise StageError(Stage.WARMED, f"{version}: a first sequence failed: {error}") from error
                self._reach(version, Stage.WARMED)

    def retire(self, version: AdapterVersion) -> None:
        """Drain a version: with its last request it leaves the engine and, unless kept for a rollback, the spool."""
        if not version.leaving:
            version.enter(Stage.DRAINING)
            task = asyncio.create_task(self._drain(version))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

    async def _drain(self, version: AdapterVersion) -> None:
        was_there = version.resident
        await self.residencies[version.lane].drain(version)
        if not version.leaving:
            return
        if was_there:
            self.events.emit(Event.of(version, Stage.DRAINED))
        if version in version.adapter.previous:
            version.enter(Stage.VERIFIED)
            return
        self.spool.release(version.content)
        version.copied = False
        if version.stage is Stage.DRAINING:
            version.enter(Stage.FOUND if version.present else Stage.DRAINED)
        if not version.present:
            version.adapter.versions.remove(version)

    def _reach(self, version: AdapterVersion, stage: Stage) -> None:
        version.enter(stage)
        self.events.emit(Event.of(version, stage))
