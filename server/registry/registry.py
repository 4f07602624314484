"""Which adapter versions serve, and what changes that: the folder, a call, a new engine.

Every step that can fail comes before the task table changes, and that change is one assignment. So a failure leaves
what serves as it is, and is an event, a metric and a log line. All methods run on the event loop.
"""

import asyncio
from collections.abc import Mapping
from functools import partial

from server.errors import EngineDeadError
from server.registry.catalog import AdapterFailure, Catalog, build_catalog
from server.registry.events import Event
from server.registry.folder import Folder
from server.registry.parts import Parts
from server.registry.record import KEPT, AdapterRecord
from server.registry.source import Found, Signature
from server.registry.version import AdapterVersion, Stage, StageError, version_key
from server.registry.versions import Versions
from server.registry.watch import changes
from server.telemetry.logs import get_logger

logger = get_logger("adapters")

_LOADS_AT_ONCE = 8


class UnknownAdapterError(Exception):
    """No such adapter, or no such version of it; the message says what there is."""


class NotPossibleError(Exception):
    """A call that the adapter's state does not allow; the message says why."""


class Registry:
    """A server's adapters: `verify_all`, then `load_all`, then `run` beside the server. `records` are its state."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.events = parts.events
        self.residency = parts.residency
        self.records: dict[str, AdapterRecord] = {}
        self.catalog = Catalog()
        self._folder = Folder(parts)
        self._versions = Versions(parts, self.records)
        self._locks: dict[str, asyncio.Lock] = {}
        self._busy: dict[str, asyncio.Task[None]] = {}

    async def verify_all(self) -> None:
        """Look once, and verify the best version of every adapter. The engine is not needed."""
        await self._look()

        async def best(record: AdapterRecord) -> None:
            while (found := record.candidate()) is not None:
                try:
                    version = await self._versions.verified(found)
                except StageError as error:
                    self._refuse(record, found, error)
                else:
                    self._serve(record, version, found.signature)
                    return

        await asyncio.gather(*(best(record) for record in list(self.records.values())))
        self._publish()

    async def load_all(self) -> None:
        """Load what serves into the engine, the most recently used last, as far as there is room.

        For a new engine too. What the engine does not take stops serving. Raises EngineDeadError.
        """
        self.residency.reset()
        recent = {version: place for place, version in enumerate(self.residency.lost)}
        active = [(record, version) for record in self.records.values() for version in record.active]
        active.sort(key=lambda pair: (pair[0].pinned, recent.get(pair[1], -1)), reverse=True)
        at_once = asyncio.Semaphore(_LOADS_AT_ONCE)

        async def load(record: AdapterRecord, version: AdapterVersion) -> None:
            try:
                async with at_once, self.residency.lease(version):
                    self.events.emit(Event.of(version, Stage.LOADED))
            except StageError as error:
                self.events.emit(Event.failure(record.name, version.version, error, version.content))
                self._drop(record, version)

        await asyncio.gather(*(load(*each) for each in reversed(active[: self.residency.capacity])))
        self._publish()

    async def run(self, poll_s: float) -> None:
        """Follow the folder until cancelled."""
        async for _ in changes(self._parts.root, poll_s):
            await self._look()
            for record in list(self.records.values()):
                if record.candidate() is not None and record.name not in self._busy:
                    task = self._busy[record.name] = asyncio.create_task(self._follow(record))
                    task.add_done_callback(partial(self._followed, record.name))

    def _followed(self, name: str, task: asyncio.Task[None]) -> None:
        del self._busy[name]
        if not task.cancelled() and (error := task.exception()):
            logger.error("an adapter is not followed", exc_info=error, extra={"fields": {"adapter": name}})

    async def load(self, name: str, version: str = "") -> AdapterVersion:
        """Let a version, the highest by default, serve now; versions above it are passed over.

        Raises UnknownAdapterError, or StageError where it cannot be.
        """
        await self._look()
        record, found = self._find(name, version)
        async with self._lock(name):
            brought = await self._versions.bring(found)
            record.unloaded = False
            record.weights.clear()
            record.passed_over.pop(found.version, None)
            record.pass_over_above(found.version)
            self._flip(record, brought, found.signature)
        return brought

    async def unload(self, name: str) -> None:
        """Stop serving an adapter, until it is loaded by name. Running requests finish."""
        record = self._record(name)
        async with self._lock(name):
            record.unloaded = True
            record.pinned = False
            self.residency.pinned.discard(name)
            gone = record.active
            for version in gone:
                self.events.emit(Event.of(version, Stage.UNLOADED))
            record.weights.clear()
            record.canary.clear()
            if record.serving is not None:
                record.previous.append(record.serving)
                record.serving, record.serving_signature = None, ()
            gone += record.previous[:-KEPT]
            record.previous = record.previous[-KEPT:]
            self._publish()
            for version in gone:
                self._versions.retire(version)

    async def rollback(self, name: str) -> AdapterVersion:
        """Let the version serve that served before. Raises NotPossibleError where there is none."""
        record = self._record(name)
        async with self._lock(name):
            left, signature = record.serving, record.serving_signature
            if record.previous:
                brought, its_signature = record.previous[-1], self._signature(record, record.previous[-1].version)
                await self._versions.warmed(brought)
            else:
                below = self._below(record)
                brought, its_signature = await self._versions.bring(below), below.signature
            if left is not None:
                record.passed_over[left.version] = signature
            record.unloaded = False
            record.weights.clear()
            self._flip(record, brought, its_signature)
            # A second call goes further back, not forth again. What was left is draining now.
            if left in record.previous:
                record.previous.remove(left)
        return brought

    async def set_weights(self, name: str, weights: Mapping[str, int], task: str = "") -> None:
        """Split an adapter's requests, or those of one task, among versions; no weights end the split.

        Raises UnknownAdapterError for a version that is not there, and StageError for one that cannot serve; the split
        stays as it was then.
        """
        record = self._record(name)
        async with self._lock(name):
            if weights and record.serving is None:
                raise NotPossibleError(f"{name}: nothing of it serves; Load it first")
            fresh: list[AdapterVersion] = []
            try:
                for version in weights:
                    if record.version_of(version) is None:
                        fresh.append(await self._versions.bring(self._find(name, version)[1]))
                for each in (*record.active, *fresh):
                    if each.version in weights and task not in ("", *each.slots):
                        raise NotPossibleError(f"{each}: has no task {task}")
            except BaseException:
                for each in fresh:
                    self._versions.retire(each)
                raise
            record.canary |= {version.version: version for version in fresh}
            if weights:
                record.weights[task] = dict(weights)
            else:
                record.weights.pop(task, None)
            wanted = {version for split in record.weights.values() for version in split}
            gone = [record.canary.pop(version) for version in set(record.canary) - wanted]
            self._publish()
            for each in fresh:
                self.events.emit(Event.of(each, Stage.SERVING))
            for each in gone:
                self._versions.retire(each)

    def pin(self, name: str) -> None:
        """Keep an adapter's serving version in the engine. Raises NotPossibleError where pins fill it."""
        record = self._record(name)
        if record.serving is None:
            raise NotPossibleError(f"{name}: nothing of it serves; Load it first")
        # One place stays for what is not pinned.
        if not record.pinned and len(self.residency.pinned) >= self.residency.capacity - 1:
            raise NotPossibleError(f"{len(self.residency.pinned)} adapters are pinned; adapter_slots allows no more")
        record.pinned = True
        self.residency.pinned.add(name)
        self.residency.prefetch(record.serving)

    def unpin(self, name: str) -> None:
        self._record(name).pinned = False
        self.residency.pinned.discard(name)

    async def _look(self) -> None:
        """Take note of what lies in the folder."""
        if (found := await self._folder.look()) is None:
            return
        for name in [*found, *(name for name in self.records if name not in found)]:
            record = self.records.setdefault(name, AdapterRecord(name))
            self._folder.note(record, found.get(name, {}))
            if not record.found and not record.active and not self._lock(name).locked() and name not in self._busy:
                self._forget(record)

    def _forget(self, record: AdapterRecord) -> None:
        """An adapter that is neither here any more nor serves."""
        del self.records[record.name], self._locks[record.name]
        before, record.previous = record.previous, []
        for version in before:
            self._versions.retire(version)

    async def _follow(self, record: AdapterRecord) -> None:
        """Bring an adapter to what should serve, or to the best below it that can."""
        while (found := record.candidate()) is not None:
            if not await self._folder.settled(record, found):
                continue
            async with self._lock(record.name):
                if record.candidate() != found:
                    continue
                try:
                    version = await self._versions.bring(found)
                except EngineDeadError:
                    # Its successor gets it: nothing was refused.
                    return
                except StageError as error:
                    if not await self._folder.wait_for_writer(found):
                        self._refuse(record, found, error)
                        self._publish()
                    continue
                self._flip(record, version, found.signature)
                self._parts.metrics.adapter_swap.observe(self._folder.age(found))

    def _flip(self, record: AdapterRecord, version: AdapterVersion, signature: Signature) -> None:
        """The moment: new requests go to `version`. What served before is drained."""
        old = record.serving
        self._serve(record, version, signature)
        self._publish()
        if old is not version:
            self.events.emit(Event.of(version, Stage.SERVING))
        gone = {old, *record.canary.values()} - {None, version}
        record.canary.clear()
        for each in gone:
            assert each is not None
            self._versions.retire(each)

    def _serve(self, record: AdapterRecord, version: AdapterVersion, signature: Signature) -> None:
        record.refused.pop(version.version, None)
        if record.serving is version:
            record.serving_signature = signature
            return
        for dropped in record.serve(version, signature):
            self._versions.retire(dropped)

    def _drop(self, record: AdapterRecord, version: AdapterVersion) -> None:
        """Stop serving a version that the engine does not take."""
        if record.serving is version:
            record.refused[version.version] = record.serving_signature, "the engine did not take it"
            record.serving, record.serving_signature = None, ()
        record.canary.pop(version.version, None)
        record.weights.clear()
        self._versions.retire(version)

    def _publish(self) -> None:
        failures = [
            AdapterFailure(record.name, version, reason)
            for record in self.records.values()
            for version, (_, reason) in record.refused.items()
        ]
        failures += [AdapterFailure(each.name, each.version, each.reason) for each in self._folder.misnamed]
        before = {(each.name, each.reason) for each in self.catalog.failures}
        catalog = build_catalog(self.records.values(), self.catalog, failures)
        for each in catalog.failures[len(failures) :]:
            if (each.name, each.reason) not in before:
                self.events.emit(Event.failure(each.name, each.version, StageError(Stage.SERVING, each.reason)))
        self.catalog = catalog
        self._parts.publish(catalog)

    def _refuse(self, record: AdapterRecord, found: Found, error: StageError) -> None:
        record.refused[found.version] = found.signature, error.reason
        self.events.emit(Event.failure(record.name, found.version, error))

    def _record(self, name: str) -> AdapterRecord:
        if record := self.records.get(name):
            return record
        raise UnknownAdapterError(f"no adapter {name!r}; there are {', '.join(sorted(self.records)) or 'none'}")

    def _find(self, name: str, version: str) -> tuple[AdapterRecord, Found]:
        record = self._record(name)
        complete = {each.version: each for each in record.found.values() if each.complete}
        if not version and complete:
            version = max(complete, key=version_key)
        if version not in complete:
            there = ", ".join(sorted(complete, key=version_key)) or "none"
            raise UnknownAdapterError(f"{name}: no version {version!r} in the folder; there are {there}")
        return record, complete[version]

    def _below(self, record: AdapterRecord) -> Found:
        """The version next below what serves."""
        lower = [
            found
            for found in record.found.values()
            if found.complete
            and record.serving is not None
            and version_key(found.version) < version_key(record.serving.version)
        ]
        if not lower:
            raise NotPossibleError(f"{record.name}: nothing served before, and no lower version is in the folder")
        return max(lower, key=lambda found: version_key(found.version))

    def _signature(self, record: AdapterRecord, version: str) -> Signature:
        found = record.found.get(version)
        return found.signature if found else ()

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())
