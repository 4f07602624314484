"""Decides which adapter versions serve: after changes of the folder, calls of admins, and the loss of an engine.

Every step that can fail comes before the task table changes, which is one assignment. So a failure does not change what
serves; it becomes an event, a metric and a log line. All methods run on the event loop.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

from server.errors import EngineDeadError
from server.job import Lane
from server.registry.catalog import Catalog, build_catalog
from server.registry.events import Event
from server.registry.folder import Folder
from server.registry.lifecycle import Lifecycle
from server.registry.record import AdapterRecord
from server.registry.source import AdapterFailure
from server.registry.version import AdapterVersion, ElsewhereError, NoRoomError, Stage, StageError, version_key
from server.telemetry.logs import get_logger

logger = get_logger("adapters")

_LOADS_AT_ONCE = 8


class UnknownAdapterError(Exception):
    """The adapter or version does not exist; the message lists existing ones."""


class NotPossibleError(Exception):
    """The adapter's state does not allow the call; the message says why."""


class Registry:
    """A server's adapters. Call `verify_all`, then `load_all`, then `run` beside the server.

    publish: called with each new table. on_swap: called with the seconds from a version's appearance in the folder
    until it serves.
    """

    def __init__(
        self,
        folder: Folder,
        lifecycle: Lifecycle,
        publish: Callable[[Catalog], None],
        on_swap: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.events = lifecycle.events
        self.records: dict[str, AdapterRecord] = {}
        self.catalog = Catalog()
        self._folder = folder
        self._lifecycle = lifecycle
        self._residencies = lifecycle.residencies
        self._on_publish = publish
        self._on_swap = on_swap

    async def verify_all(self) -> None:
        """Look once, and verify the best version of every adapter. Needs no engine."""
        await self._look()

        async def best(record: AdapterRecord) -> None:
            while (version := record.candidate()) is not None:
                try:
                    self._serve(record, await self._lifecycle.verify(version))
                except StageError as error:
                    self._fail(version, error)

        await asyncio.gather(*(best(record) for record in list(self.records.values())))
        self._publish()

    async def load_all(self, lane: Lane = Lane.TEXT) -> None:
        """Fill a new engine with its serving versions, pinned and most recently used ones first.

        A version that the engine refuses stops serving. Raises EngineDeadError.
        """
        residency = self._residencies[lane]
        residency.reset()
        active = [each for record in self.records.values() for each in record.active if each.lane is lane]
        active.sort(key=lambda version: (version.pinned, version.last_used), reverse=True)
        at_once = asyncio.Semaphore(_LOADS_AT_ONCE)

        async def load(version: AdapterVersion) -> None:
            try:
                with residency.hold(version):
                    async with at_once, residency.lease(version):
                        self.events.emit(Event.of(version, Stage.LOADED))
            except NoRoomError:
                # Requests for it will try to load it again.
                pass
            except StageError as error:
                self._drop(version, error)

        await asyncio.gather(*(load(each) for each in reversed(active[: residency.capacity])))
        self._publish()

    async def run(self, poll_s: float) -> None:
        """Follow the folder until cancelled."""
        async for _ in self._folder.changes(poll_s):
            await self._look()
            for record in list(self.records.values()):
                if record.candidate() is not None and record.following is None:
                    record.following = asyncio.create_task(self._follow(record))

    async def load(self, name: str, version: str = "") -> AdapterVersion:
        """Make a version (by default the highest) serve now, and pass over all higher versions.

        Raises UnknownAdapterError, or StageError if the version cannot serve.
        """
        await self._look()
        record = self._record(name)
        async with record.changing:
            brought = await self._lifecycle.bring(self._find(record, version))
            record.unloaded = False
            record.weights.clear()
            brought.passed_over = False
            record.pass_over_above(brought.version)
            self._flip(record, brought)
        return brought

    async def unload(self, name: str) -> None:
        """Stop serving an adapter until it is loaded by name. Running requests finish."""
        record = self._record(name)
        async with record.changing:
            record.unloaded = True
            record.pinned = False
            gone = record.active
            for version in gone:
                self.events.emit(Event.of(version, Stage.UNLOADED))
            record.weights.clear()
            record.canary.clear()
            gone += record.stop()
            self._publish()
            self._retire(gone)

    async def rollback(self, name: str) -> AdapterVersion:
        """Serve the version that served before this one. Raises NotPossibleError if no version did."""
        record = self._record(name)
        async with record.changing:
            left = record.serving
            brought = await self._lifecycle.bring(record.previous[-1] if record.previous else self._below(record))
            record.unloaded = False
            record.weights.clear()
            self._flip(record, brought)
            if left is not None:
                left.passed_over = True
                # Remove it from the list, so that a second call goes further back.
                if left in record.previous:
                    record.previous.remove(left)
        return brought

    async def set_weights(self, name: str, weights: Mapping[str, int], task: str = "") -> None:
        """Split an adapter's requests, or those of one task, among versions. Empty weights end the split.

        Raises UnknownAdapterError for an unknown version, NotPossibleError for one without the task, and StageError for
        one that cannot serve. After an error, the split is unchanged.
        """
        await self._look()
        record = self._record(name)
        async with record.changing:
            if weights and record.serving is None:
                raise NotPossibleError(f"{name}: no version serves; load one first")
            fresh: list[AdapterVersion] = []
            try:
                for version in weights:
                    if record.version_of(version) is None:
                        fresh.append(await self._lifecycle.bring(self._find(record, version)))
                for each in (*record.active, *fresh):
                    if each.version in weights and task not in ("", *each.slots):
                        raise NotPossibleError(f"{each}: has no task {task}")
            except BaseException:
                self._retire(fresh)
                raise
            record.canary |= {version.version: version for version in fresh}
            if weights:
                record.weights[task] = dict(weights)
            else:
                record.weights.pop(task, None)
            wanted = {version for split in record.weights.values() for version in split}
            gone = [record.canary.pop(version) for version in set(record.canary) - wanted]
            for each in fresh:
                each.enter(Stage.SERVING)
            self._publish()
            for each in fresh:
                self.events.emit(Event.of(each, Stage.SERVING))
            self._retire(gone)

    def pin(self, name: str) -> None:
        """Keep an adapter's serving version in the engine. Raises NotPossibleError if pins fill the engine."""
        record = self._record(name)
        if record.serving is None:
            raise NotPossibleError(f"{name}: no version serves; load one first")
        lane = record.serving.lane
        residency = self._residencies[lane]
        pinned = sum(
            each.pinned for each in self.records.values() if each.serving is not None and each.serving.lane is lane
        )
        # Leave room for one version without a pin, so that all other versions can still be loaded.
        if not record.pinned and pinned >= residency.capacity - 1:
            raise NotPossibleError(f"{pinned} adapters are pinned; allowed: all but one of adapter_slots")
        record.pinned = True
        residency.prefetch(record.serving)

    def unpin(self, name: str) -> None:
        self._record(name).pinned = False

    async def manifest(self, name: str, version: str = "") -> tuple[str, bytes]:
        """(version, its manifest's bytes): by default of the serving version, or else of the highest.

        Raises UnknownAdapterError.
        """
        await self._look()
        record = self._record(name)
        found = self._find(record, version or (record.serving.version if record.serving else ""))
        try:
            return found.version, await self._folder.manifest(found)
        except (OSError, ValueError) as error:
            raise UnknownAdapterError(f"{found}: {error}") from None

    async def _look(self) -> None:
        """Update all records by the folder's content."""
        if (found := await self._folder.look()) is None:
            return
        for name in [*found, *(name for name in self.records if name not in found)]:
            record = self.records.setdefault(name, AdapterRecord(name))
            self._folder.note(record, found.get(name, {}))
            if not record.found and not record.active and not record.changing.locked() and record.following is None:
                self._forget(record)

    def _forget(self, record: AdapterRecord) -> None:
        """Drop an adapter that has no files and does not serve, once its last request has ended.

        Until then the engine has its versions' names, so files that come back must map to these versions.
        """
        kept, record.previous = record.previous, []
        self._retire(kept)
        if not record.versions:
            del self.records[record.name]

    async def _follow(self, record: AdapterRecord) -> None:
        """Start the version that should serve, or else the highest lower one that can."""
        try:
            while (version := record.candidate()) is not None:
                if not await self._folder.settled(version):
                    continue
                async with record.changing:
                    if record.candidate() is version:
                        await self._swap(record, version)
        except EngineDeadError:
            # The engine failed, not the version: try again with the next engine.
            pass
        except NoRoomError as error:
            fields = {"adapter": record.name, "reason": error.reason, "taken_by": error.taken}
            logger.warning("an adapter waits for room in the engine", extra={"fields": fields})
        except Exception:
            logger.error("an adapter was not updated", exc_info=True, extra={"fields": {"adapter": record.name}})
        finally:
            record.following = None

    async def _swap(self, record: AdapterRecord, version: AdapterVersion) -> None:
        """Make a version from the folder serve, unless it fails."""
        try:
            brought = await self._lifecycle.bring(version)
        except NoRoomError:
            raise
        except StageError as error:
            if not await self._folder.wait_for_writer(version):
                self._fail(version, error)
                self._publish()
        else:
            self._flip(record, brought)
            self._on_swap(time.monotonic() - brought.seen)

    def _flip(self, record: AdapterRecord, version: AdapterVersion) -> None:
        """Send new requests to `version` from now on, and drain the version that served before."""
        gone = [each for each in record.active if each is not version]
        begins = record.serving is not version
        self._serve(record, version)
        record.canary.clear()
        self._publish()
        if begins:
            self.events.emit(Event.of(version, Stage.SERVING))
        self._retire(gone)

    def _serve(self, record: AdapterRecord, version: AdapterVersion) -> None:
        if version.stage is not Stage.SERVING:
            version.enter(Stage.SERVING)
        self._retire(record.serve(version))

    def _retire(self, versions: Iterable[AdapterVersion]) -> None:
        for version in versions:
            self._lifecycle.retire(version)

    def _drop(self, version: AdapterVersion, error: StageError) -> None:
        """Stop serving a version that the engine refused."""
        record = version.adapter
        if record.serving is version:
            record.serving = None
        record.canary.pop(version.version, None)
        record.weights.clear()
        self._lifecycle.retire(version)
        self._fail(version, error)

    def _publish(self) -> None:
        failures = [
            AdapterFailure(record.name, version.version, version.reason)
            for record in self.records.values()
            for version in record.versions
            if version.stage is Stage.FAILED and not version.elsewhere
        ]
        failures += self._folder.misnamed
        before = {(each.name, each.reason) for each in self.catalog.failures}
        catalog = build_catalog(self.records.values(), self.catalog, failures)
        for each in catalog.failures[len(failures) :]:
            if (each.name, each.reason) not in before:
                self.events.emit(Event.failure(each.name, each.version, StageError(Stage.SERVING, each.reason)))
        self.catalog = catalog
        self._on_publish(catalog)

    def _fail(self, version: AdapterVersion, error: StageError) -> None:
        """Do not try a version again, nor keep it for rollbacks, until its files change."""
        record = version.adapter
        record.previous = [each for each in record.previous if each is not version]
        version.enter(Stage.FAILED)
        version.reason, version.elsewhere = error.reason, isinstance(error, ElsewhereError)
        self.events.emit(Event.failure(version.name, version.version, error, version.content))

    def _record(self, name: str) -> AdapterRecord:
        if record := self.records.get(name):
            return record
        raise UnknownAdapterError(f"no adapter {name!r}; allowed: {', '.join(sorted(self.records)) or 'none'}")

    def _find(self, record: AdapterRecord, version: str) -> AdapterVersion:
        complete = {name: each for name, each in record.found.items() if each.found.complete}
        if not version and complete:
            version = max(complete, key=version_key)
        if version not in complete:
            there = ", ".join(sorted(complete, key=version_key)) or "none"
            raise UnknownAdapterError(f"{record.name}: no version {version!r} in the folder; there are {there}")
        return complete[version]

    def _below(self, record: AdapterRecord) -> AdapterVersion:
        """The highest version below the serving one. Raises NotPossibleError if there is none."""
        lower = [
            version
            for version in record.found.values()
            if version.found.complete
            and record.serving is not None
            and version_key(version.version) < version_key(record.serving.version)
        ]
        if not lower:
            raise NotPossibleError(f"{record.name}: nothing served before, and no lower version is in the folder")
        return max(lower, key=lambda version: version_key(version.version))
