"""Takes adapter versions through their life: found, verified, loaded, warmed, serving, drained.

Every step that can fail comes before the task table changes, and that change is one assignment. So a failure leaves
what serves as it is, and is an event, a metric and a log line. All methods run on the event loop.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from server.catalog import AdapterFailure, Catalog, build_catalog
from server.errors import EngineDeadError
from server.logs import get_logger
from server.metrics import Metrics
from server.registry.events import Event, Events
from server.registry.mirror import Mirror, MirrorError
from server.registry.record import KEPT, AdapterRecord
from server.registry.residency import Residency
from server.registry.source import Found, Misnamed, Signature, scan, signature_of
from server.registry.spool import Spool
from server.registry.verifier import Verified
from server.registry.version import AdapterVersion, Stage, StageError, version_key
from server.registry.watch import changes

if TYPE_CHECKING:
    from mtlora.checkpoint import AdapterManifest

logger = get_logger("adapters")

# (adapter name, version, folder, manifest, first id) -> a vLLM LoRARequest for each task id.
MakeSlots = Callable[[str, str, Path, "AdapterManifest", int], Mapping[str, Any]]

_LOADS_AT_ONCE = 8

# Files are looked at once they have not changed for this long, and refused only after the longer time: a writer may
# pause.
_SETTLE_S = 0.05
_WRITING_S = 1.0


class Verifies(Protocol):
    async def verify(self, root: Path, found: Found) -> Verified: ...


class UnknownAdapterError(Exception):
    """No such adapter, or no such version of it; the message says what there is."""


class NotPossibleError(Exception):
    """A call that the adapter's state does not allow; the message says why."""


@dataclass(frozen=True)
class Parts:
    """What a registry works with. `warm` runs a short sequence on a slot; `publish` gets each new table."""

    root: Path
    verifier: Verifies
    spool: Spool
    residency: Residency
    make_slots: MakeSlots
    warm: Callable[[Any], Awaitable[None]]
    publish: Callable[[Catalog], None]
    events: Events
    metrics: Metrics
    mirror: Mirror | None = None


class Registry:
    """The adapters of one server. `open` it once, then `run` beside the server; `records` are its state, by name."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.events = parts.events
        self.residency = parts.residency
        self.records: dict[str, AdapterRecord] = {}
        self.catalog = Catalog()
        self._next_id = 1
        self._misnamed: set[Misnamed] = set()
        self._suspects: set[Misnamed] | None = None
        self._first_seen: dict[tuple[str, str, Signature], float] = {}
        self._bringing: set[AdapterVersion] = set()
        self._looking = asyncio.Lock()
        self._locks: dict[str, asyncio.Lock] = {}
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[Any]] = set()
        # Every version that may serve, now or again, or still runs requests; each holds its copy in the spool. The
        # engine tells versions apart by name, version and content, so of each of those there is one.
        self._live: dict[tuple[str, str, str], AdapterVersion] = {}

    async def verify_all(self) -> None:
        """Look once, and verify the best version of every adapter. The engine is not needed."""
        await self._look()

        async def best(record: AdapterRecord) -> None:
            while (found := record.candidate()) is not None:
                try:
                    version = await self._verified(record, found)
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
                    self._event(version, Stage.LOADED)
            except StageError as error:
                self._fail(record.name, version.version, error, version.content)
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
            brought = await self._bring(record, found)
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
                self._event(version, Stage.UNLOADED)
            record.weights.clear()
            record.canary.clear()
            if record.serving is not None:
                record.previous.append(record.serving)
                record.serving, record.serving_signature = None, ()
            gone += record.previous[:-KEPT]
            record.previous = record.previous[-KEPT:]
            self._publish()
            for version in gone:
                self._retire(version)

    async def rollback(self, name: str) -> AdapterVersion:
        """Let the version serve that served before. Raises NotPossibleError where there is none."""
        record = self._record(name)
        async with self._lock(name):
            left, signature = record.serving, record.serving_signature
            if record.previous:
                brought, its_signature = record.previous[-1], self._signature(record, record.previous[-1].version)
                await self._warmed(brought)
            else:
                below = self._below(record)
                brought, its_signature = await self._bring(record, below), below.signature
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
                        fresh.append(await self._bring(record, self._find(name, version)[1]))
                for each in (*record.active, *fresh):
                    if each.version in weights and task not in ("", *each.slots):
                        raise NotPossibleError(f"{each}: has no task {task}")
            except BaseException:
                for each in fresh:
                    self._retire(each)
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
                self._event(each, Stage.SERVING)
            for each in gone:
                self._retire(each)

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
        async with self._looking:
            try:
                if self._parts.mirror is not None:
                    await asyncio.to_thread(self._parts.mirror.sync)
                found, misnamed = await asyncio.to_thread(scan, self._parts.root)
            except (OSError, MirrorError) as error:
                logger.warning("adapters cannot be listed", extra={"fields": {"reason": str(error)}})
                return
        # What is there at the start is meant; later, a folder may be half made, and is looked at twice.
        still = set(misnamed) if self._suspects is None else set(misnamed) & self._suspects
        self._suspects = set(misnamed)
        for each in still - self._misnamed:
            self._fail(each.name, each.version, StageError(Stage.FOUND, each.reason))
        self._misnamed = still
        by_name: dict[str, dict[str, Found]] = {}
        for version in found:
            by_name.setdefault(version.name, {})[version.version] = version
        for name in [*by_name, *(name for name in self.records if name not in by_name)]:
            record = self.records.setdefault(name, AdapterRecord(name))
            self._note(record, by_name.get(name, {}))
            if not record.found and not record.active and not self._lock(name).locked() and name not in self._busy:
                self._forget(record)

    def _note(self, record: AdapterRecord, found: dict[str, Found]) -> None:
        for version, now in found.items():
            before = record.found.get(version)
            if now.complete and (before is None or before.signature != now.signature):
                self._first_seen[record.name, version, now.signature] = time.monotonic()
                if before is None or not before.complete:
                    self.events.emit(Event(record.name, version, Stage.FOUND))
        for version in set(record.found) - set(found):
            self.events.emit(Event(record.name, version, Stage.VANISHED))
            record.refused.pop(version, None)
            record.passed_over.pop(version, None)
        record.found = found
        self._first_seen = {
            key: seen
            for key, seen in self._first_seen.items()
            if key[0] != record.name or (key[1] in found and found[key[1]].signature == key[2])
        }

    def _forget(self, record: AdapterRecord) -> None:
        """An adapter that is neither here any more nor serves."""
        del self.records[record.name], self._locks[record.name]
        before, record.previous = record.previous, []
        for version in before:
            self._retire(version)

    async def _follow(self, record: AdapterRecord) -> None:
        """Bring an adapter to what should serve, or to the best below it that can."""
        while (found := record.candidate()) is not None:
            if not await self._settled(record, found):
                continue
            async with self._lock(record.name):
                if record.candidate() != found:
                    continue
                try:
                    version = await self._bring(record, found)
                except EngineDeadError:
                    # Its successor gets it: nothing was refused.
                    return
                except StageError as error:
                    if self._may_be_unfinished(found):
                        await asyncio.sleep(_WRITING_S / 4)
                    else:
                        self._refuse(record, found, error)
                        self._publish()
                    continue
                seen = self._first_seen.get((found.name, found.version, found.signature), time.monotonic())
                self._flip(record, version, found.signature)
                self._parts.metrics.adapter_swap.observe(time.monotonic() - seen)

    async def _settled(self, record: AdapterRecord, found: Found) -> bool:
        """Whether a version's files have stopped changing; where not, they are noted as they are now."""
        await asyncio.sleep(_SETTLE_S)
        signature = await asyncio.to_thread(signature_of, found.folder)
        if signature == found.signature:
            return True
        self._note(record, record.found | {found.version: replace(found, signature=signature)})
        return False

    def _may_be_unfinished(self, found: Found) -> bool:
        seen = self._first_seen.get((found.name, found.version, found.signature), 0.0)
        return time.monotonic() - seen < _WRITING_S

    async def _bring(self, record: AdapterRecord, found: Found) -> AdapterVersion:
        """A version, ready to serve: verified, loaded, warmed. What serves already comes back as it is."""
        version = await self._verified(record, found)
        if version in record.active:
            return version
        self._bringing.add(version)
        try:
            await self._warmed(version)
        except BaseException:
            self._bringing.discard(version)
            self._retire(version)
            raise
        # Until the caller has let it serve, at once, nothing else runs.
        self._bringing.discard(version)
        return version

    async def _verified(self, record: AdapterRecord, found: Found) -> AdapterVersion:
        verified = await self._parts.verifier.verify(self._parts.root, found)
        key = found.name, found.version, verified.content
        if live := self._live.get(key):
            self._parts.spool.release(verified.content)
            return live
        # Part of what the engine, and its prefix cache, know a version by.
        label = f"{found.version}@{verified.content[:16]}"
        slots = self._parts.make_slots(found.name, label, verified.folder, verified.manifest, self._next_id)
        self._next_id = max(slot.lora_int_id for slot in slots.values()) + 1
        version = self._live[key] = AdapterVersion(*key, verified.folder, verified.manifest, slots)
        self._event(version, Stage.VERIFIED)
        return version

    async def _warmed(self, version: AdapterVersion) -> None:
        self.residency.keep(version)
        async with self.residency.lease(version):
            self._event(version, Stage.LOADED)
            try:
                await self._parts.warm(version.distinct_slots[0])
            except EngineDeadError:
                raise
            except Exception as error:
                raise StageError(Stage.WARMED, f"{version}: a first sequence failed: {error}") from error
            self._event(version, Stage.WARMED)

    def _flip(self, record: AdapterRecord, version: AdapterVersion, signature: Signature) -> None:
        """The moment: new requests go to `version`. What served before is drained."""
        old = record.serving
        self._serve(record, version, signature)
        self._publish()
        if old is not version:
            self._event(version, Stage.SERVING)
        gone = {old, *record.canary.values()} - {None, version}
        record.canary.clear()
        for each in gone:
            assert each is not None
            self._retire(each)

    def _serve(self, record: AdapterRecord, version: AdapterVersion, signature: Signature) -> None:
        record.refused.pop(version.version, None)
        if record.serving is version:
            record.serving_signature = signature
            return
        for dropped in record.serve(version, signature):
            self._retire(dropped)

    def _drop(self, record: AdapterRecord, version: AdapterVersion) -> None:
        """Stop serving a version that the engine does not take."""
        if record.serving is version:
            record.refused[version.version] = record.serving_signature, "the engine did not take it"
            record.serving, record.serving_signature = None, ()
        record.canary.pop(version.version, None)
        record.weights.clear()
        self._retire(version)

    def _retire(self, version: AdapterVersion) -> None:
        """Take a version out of the engine once its last request has left, and forget one that nothing brings back."""

        async def drain() -> None:
            was_there = version in self.residency.resident
            await self.residency.retire(version)
            record = self.records.get(version.name) or AdapterRecord(version.name)
            if version in record.active or version in self._bringing:
                return
            if was_there:
                self._event(version, Stage.DRAINED)
            key = version.name, version.version, version.content
            if version not in record.previous and key in self._live:
                del self._live[key]
                self._parts.spool.release(version.content)

        self._spawn(drain())

    def _publish(self) -> None:
        failures = [
            AdapterFailure(record.name, version, reason)
            for record in self.records.values()
            for version, (_, reason) in record.refused.items()
        ]
        failures += [AdapterFailure(each.name, each.version, each.reason) for each in self._misnamed]
        before = {(each.name, each.reason) for each in self.catalog.failures}
        catalog = build_catalog(self.records.values(), self.catalog, failures)
        for each in catalog.failures[len(failures) :]:
            if (each.name, each.reason) not in before:
                self._fail(each.name, each.version, StageError(Stage.SERVING, each.reason))
        self.catalog = catalog
        self._parts.publish(catalog)

    def _refuse(self, record: AdapterRecord, found: Found, error: StageError) -> None:
        record.refused[found.version] = found.signature, error.reason
        self._fail(record.name, found.version, error)

    def _fail(self, name: str, version: str, error: StageError, content: str = "") -> None:
        self.events.emit(Event(name, version, Stage.FAILED, content, error.reason, failed_stage=error.stage))

    def _event(self, version: AdapterVersion, stage: Stage) -> None:
        self.events.emit(Event(version.name, version.version, stage, version.content))

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

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
