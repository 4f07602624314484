"""Versions from verification to their last request: each has its copy in the spool and its place in the engine."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from server.errors import EngineDeadError
from server.registry.events import Event
from server.registry.parts import Parts
from server.registry.record import AdapterRecord
from server.registry.source import Found
from server.registry.version import AdapterVersion, Stage, StageError


class Versions:
    """`records`: the registry's, which tell what serves and what may serve again."""

    def __init__(self, parts: Parts, records: Mapping[str, AdapterRecord]) -> None:
        self._parts = parts
        self._records = records
        self._next_id = 1
        self._bringing: set[AdapterVersion] = set()
        self._background: set[asyncio.Task[Any]] = set()
        # Every version that may serve, now or again, or still runs requests; each holds its copy in the spool. The
        # engine tells versions apart by name, version and content, so of each of those there is one.
        self._live: dict[tuple[str, str, str], AdapterVersion] = {}

    async def verified(self, found: Found) -> AdapterVersion:
        """What was found, verified. Raises StageError."""
        parts = self._parts
        verified = await parts.verifier.verify(parts.root, found)
        key = found.name, found.version, verified.content
        if live := self._live.get(key):
            parts.spool.release(verified.content)
            return live
        # Part of what the engine, and its prefix cache, know a version by.
        label = f"{found.version}@{verified.content[:16]}"
        slots = parts.make_slots(found.name, label, verified.folder, verified.manifest, self._next_id)
        self._next_id = max(slot.lora_int_id for slot in slots.values()) + 1
        version = self._live[key] = AdapterVersion(*key, verified.folder, verified.manifest, slots)
        parts.events.emit(Event.of(version, Stage.VERIFIED))
        return version

    async def bring(self, found: Found) -> AdapterVersion:
        """A version, ready to serve: verified, loaded, warmed. What serves already comes back as it is.

        Raises StageError, with nothing left of what was begun. Until the caller has let it serve, it must not wait.
        """
        version = await self.verified(found)
        if version in self._record(version).active:
            return version
        self._bringing.add(version)
        try:
            await self.warmed(version)
        except BaseException:
            self._bringing.discard(version)
            self.retire(version)
            raise
        self._bringing.discard(version)
        return version

    async def warmed(self, version: AdapterVersion) -> None:
        """Load a version, and run a first sequence on it. Raises StageError."""
        parts = self._parts
        parts.residency.keep(version)
        async with parts.residency.lease(version):
            parts.events.emit(Event.of(version, Stage.LOADED))
            try:
                await parts.warm(version.distinct_slots[0])
            except EngineDeadError:
                raise
            except Exception as error:
                raise StageError(Stage.WARMED, f"{version}: a first sequence failed: {error}") from error
            parts.events.emit(Event.of(version, Stage.WARMED))

    def retire(self, version: AdapterVersion) -> None:
        """Take a version out of the engine once its last request has left, and forget one that nothing brings back."""
        self._spawn(self._drain(version))

    async def _drain(self, version: AdapterVersion) -> None:
        parts = self._parts
        was_there = version in parts.residency.resident
        await parts.residency.retire(version)
        record = self._record(version)
        if version in record.active or version in self._bringing:
            return
        if was_there:
            parts.events.emit(Event.of(version, Stage.DRAINED))
        key = version.name, version.version, version.content
        if version not in record.previous and key in self._live:
            del self._live[key]
            parts.spool.release(version.content)

    def _record(self, version: AdapterVersion) -> AdapterRecord:
        return self._records.get(version.name) or AdapterRecord(version.name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
