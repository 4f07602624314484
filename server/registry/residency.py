"""Loads adapter versions into the engine's memory, and evicts the least recently used one without running requests.

A request holds its version from the choice to its end, and takes a lease on it before it reaches the engine. If the
version is not resident, it is loaded beside the running steps; requests for resident versions do not wait.

A version's `place` is its state here; only `Residency` changes it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from server.errors import AdapterError, EngineDeadError
from server.registry.version import AdapterVersion, NoRoomError, Place, Stage, StageError
from server.telemetry.routers import AdapterMemory, LoadedAdapter

# If all residents are busy for this many seconds, close the least recently used one: it takes no new requests and is
# evicted after its last. With a shorter time, swapping versions would cost more than waiting.
PATIENCE_S = 1.0
# A version that waits longer than this for room fails. It waits only for running requests to end.
ROOM_S = 30.0

# The context in which a request waits for its version.
Aside = Callable[[], AbstractAsyncContextManager[None]]

Prepare = Callable[[AdapterVersion], Awaitable[None]]


class LoadsSlots(Protocol):
    async def load(self, folder: Path, slots: Sequence[Any]) -> None: ...
    async def unload(self, slots: Sequence[Any]) -> None: ...


class Residency:
    """At most `capacity` versions at a time, with any number of tasks. Pinned versions are not evicted.

    prepare: compiles a version's answer constraints in the engine; called once per version and engine. on_cold: called
    with the seconds that a request waited for its version. on_load: called with the seconds of a load, without its wait
    for room. on_evict: called for each evicted version. room_s: seconds after which a version that waits for room
    fails.
    """

    def __init__(
        self,
        engine: LoadsSlots,
        capacity: int,
        on_cold: Callable[[float], None] = lambda _: None,
        on_load: Callable[[float], None] = lambda _: None,
        on_evict: Callable[[], None] = lambda: None,
        room_s: float = ROOM_S,
        prepare: Prepare | None = None,
    ) -> None:
        self.capacity = capacity
        self._prepare = prepare
        # Versions that this engine was prepared for.
        self._prepared: WeakSet[AdapterVersion] = WeakSet()
        self._engine = engine
        self._room_s = room_s
        self._on_cold = on_cold
        self._on_load = on_load
        self._on_evict = on_evict
        # The load, running or done, of every version that is not OUT.
        self._loads: dict[AdapterVersion, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        # The version that gets the next room holds this lock.
        self._line = asyncio.Lock()
        self._draining: set[AdapterVersion] = set()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def resident(self) -> list[AdapterVersion]:
        """Resident versions, least recently used first. From any thread."""
        return sorted((each for each in list(self._loads) if each.resident), key=lambda each: each.last_used)

    def memory(self) -> AdapterMemory:
        """The adapters in memory, for routers; an adapter's versions count as one. From any thread."""
        latest = sorted(self._loads, key=lambda version: version.last_used, reverse=True)
        loaded: dict[str, bool] = {}
        for version in latest:
            if version.resident:
                loaded[version.name] = loaded.get(version.name, False) or version.pinned
        loading = dict.fromkeys(each.name for each in latest if each.place in (Place.QUEUED, Place.LOADING))
        return AdapterMemory(
            self.capacity,
            tuple(LoadedAdapter(name, pinned) for name, pinned in loaded.items()),
            tuple(name for name in loading if name not in loaded),
        )

    def prefetch(self, version: AdapterVersion) -> None:
        """Begin to load a version for a request that is being prepared."""
        if version.place is Place.OUT:
            self._begin(version)

    @contextmanager
    def hold(self, version: AdapterVersion) -> Iterator[None]:
        """Keep a version's copy on disk, so that it can be loaded even if newer versions are published meanwhile."""
        version.holds += 1
        try:
            yield
        finally:
            version.holds -= 1
            self._given_up(version)

    @asynccontextmanager
    async def lease(self, version: AdapterVersion, aside: Aside = contextlib.nullcontext) -> AsyncIterator[None]:
        """Wait inside `aside` until a version is resident, then keep it resident. The caller must hold the version.

        Raises StageError if it cannot be loaded, EngineDeadError if the engine is lost meanwhile.
        """
        began = time.monotonic()
        while version.place in (Place.CLOSING, Place.UNLOADING):
            async with aside():
                await self._until(lambda: version.place not in (Place.CLOSING, Place.UNLOADING))
        version.leases += 1
        try:
            # The engine may be lost while `aside` ends: then load again.
            while version.place in (Place.OUT, Place.QUEUED, Place.LOADING):
                async with aside():
                    await self._load(version, began)
            version.last_used = time.monotonic()
            yield
        finally:
            version.leases -= 1
            self._given_up(version)

    async def drain(self, version: AdapterVersion) -> None:
        """Evict a version after its last request. Returns after that, or as soon as the version is needed again."""
        self._draining.add(version)
        try:
            await self._settle(version)
            await self._until(
                lambda: not version.leaving or (version.place is Place.OUT and not version.holds and not version.leases)
            )
        finally:
            self._draining.discard(version)

    def reset(self) -> None:
        """Forget all residents, because the engine is lost."""
        for version, loading in self._loads.items():
            loading.cancel()
            version.move(Place.OUT)
        self._loads.clear()
        self._prepared.clear()
        self._spawn(self._notify())

    async def _load(self, version: AdapterVersion, began: float) -> None:
        loading = self._loads.get(version) or self._begin(version)
        try:
            # Shield the load: other requests may wait for it when this one is cancelled.
            await asyncio.shield(loading)
        except asyncio.CancelledError:
            if loading.cancelled():
                raise EngineDeadError from None
            raise
        self._on_cold(time.monotonic() - began)

    def _begin(self, version: AdapterVersion) -> "asyncio.Task[None]":
        version.move(Place.QUEUED)
        version.last_used = time.monotonic()
        loading = self._loads[version] = asyncio.create_task(self._bring_in(version))
        # Retrieve the exception, or asyncio logs it: a prefetch may have no request that waits.
        loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return loading

    async def _bring_in(self, version: AdapterVersion) -> None:
        loading = self._loads[version]
        try:
            async with self._room():
                if self._loads.get(version) is not loading:
                    # `reset` ran while an eviction made room; the eviction swallowed the cancellation.
                    raise EngineDeadError
                version.move(Place.LOADING)
            began = time.monotonic()
            if self._prepare and (version.fewest is None or version not in self._prepared):
                await self._prepare(version)
                self._prepared.add(version)
            await self._engine.load(version.folder, version.distinct_slots)
        except BaseException as error:
            await self._forget(version, loading)
            if isinstance(error, AdapterError) and not isinstance(error, StageError):
                raise StageError(Stage.LOADED, str(error)) from error
            raise
        self._on_load(time.monotonic() - began)
        version.move(Place.RESIDENT)
        await self._settle(version)

    @asynccontextmanager
    async def _room(self) -> AsyncIterator[None]:
        """Queue for room and make it, by an eviction if needed. Raises NoRoomError."""
        until = time.monotonic() + self._room_s
        try:
            async with asyncio.timeout(self._room_s):
                await self._line.acquire()
        except TimeoutError:
            raise self._no_room() from None
        try:
            await self._make_room(until)
            yield
        finally:
            self._line.release()

    def _no_room(self) -> NoRoomError:
        taken = [each for each in self._loads if each.place is not Place.QUEUED]
        pinned = sum(each.pinned for each in taken)
        busy = sum(not each.pinned and each.leases > 0 for each in taken)
        return NoRoomError(
            f"no room in the engine within {self._room_s:g} s: of its {self.capacity} places (adapter_slots), {pinned} "
            f"are pinned and {busy} busy",
            [str(each) for each in taken],
        )

    async def _make_room(self, until: float) -> None:
        patient_until = time.monotonic() + PATIENCE_S
        while sum(each.place is not Place.QUEUED for each in self._loads) >= self.capacity:
            evictable = [each for each in self.resident if not each.pinned]
            if idle := next((each for each in evictable if not each.leases), None):
                self._on_evict()
                await self._evict(idle)
                continue
            now = time.monotonic()
            if now >= until:
                raise self._no_room()
            if now >= patient_until and evictable and not any(each.place is Place.CLOSING for each in evictable):
                evictable[0].move(Place.CLOSING)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S / 4), self._changed:
                    await self._changed.wait()

    async def _settle(self, version: AdapterVersion) -> None:
        """Evict an unused version if it makes room or is leaving."""
        if version.resident and not version.leases:
            if version.place is Place.CLOSING:
                self._on_evict()
                await self._evict(version)
            elif version.leaving and not version.holds:
                await self._evict(version)
        await self._notify()

    def _given_up(self, version: AdapterVersion) -> None:
        """A hold or lease has ended. Settle in the background, and only if somebody waits for that."""
        if not version.leases and (version in self._draining or version.place is Place.CLOSING or self._line.locked()):
            self._spawn(self._settle(version))

    async def _evict(self, version: AdapterVersion) -> None:
        loading = self._loads[version]
        version.move(Place.UNLOADING)
        try:
            # A dead engine needs no unload.
            with contextlib.suppress(EngineDeadError):
                await self._engine.unload(version.distinct_slots)
        finally:
            await self._forget(version, loading)

    async def _forget(self, version: AdapterVersion, loading: "asyncio.Task[None]") -> None:
        """Move a version OUT, unless a new engine has started to load it meanwhile."""
        if self._loads.get(version) is loading:
            del self._loads[version]
            version.move(Place.OUT)
        await self._notify()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)
