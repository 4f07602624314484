"""Which adapter versions are in the engine's memory: least recently used first to go, never while a request runs on it.

A request takes a lease on its version before it reaches the engine. A version that is not in the engine is loaded
then, beside the running steps; requests for versions that are there go straight on.

Each version's `place` says where it is; `Residency` alone moves it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from server.errors import AdapterError, EngineDeadError
from server.registry.version import AdapterVersion, Place, Stage, StageError

# How long a version waits for room before the least recently used one, although busy, has to make it: that one takes
# no new requests then and goes with its last. Below that, swapping versions would cost more than waiting.
PATIENCE_S = 1.0


# What a request does while it waits for its version.
Aside = Callable[[], AbstractAsyncContextManager[None]]


class LoadsSlots(Protocol):
    async def load(self, folder: Path, slots: Sequence[Any]) -> None: ...
    async def unload(self, slots: Sequence[Any]) -> None: ...


class Residency:
    """`capacity` versions at a time, whatever their tasks. Pinned versions are not evicted for others.

    `on_cold` gets the seconds that each request waited whose version was not in the engine, `on_load` those that each
    load took, without the wait for room; `on_evict` is called for every version that makes room for another.
    """

    def __init__(
        self,
        engine: LoadsSlots,
        capacity: int,
        on_cold: Callable[[float], None] = lambda _: None,
        on_load: Callable[[float], None] = lambda _: None,
        on_evict: Callable[[], None] = lambda: None,
    ) -> None:
        self.capacity = capacity
        self._engine = engine
        self._on_cold = on_cold
        self._on_load = on_load
        self._on_evict = on_evict
        # Of every version whose place is not OUT, the work that loads it, or has loaded it.
        self._loads: dict[AdapterVersion, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        # Versions that wait for room wait in line.
        self._line = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def resident(self) -> list[AdapterVersion]:
        """Versions in the engine, least recently used first."""
        return sorted((each for each in self._loads if each.resident), key=lambda each: each.last_used)

    def prefetch(self, version: AdapterVersion) -> None:
        """Begin to load a version that a request is about to want."""
        if version.place is Place.OUT:
            self._begin(version)

    @contextmanager
    def hold(self, version: AdapterVersion) -> Iterator[None]:
        """Keep a version's copy, so that it can be loaded, whatever is published meanwhile."""
        version.holds += 1
        try:
            yield
        finally:
            version.holds -= 1
            if not version.leases:
                # In the background: the request must not wait for an eviction.
                self._spawn(self._settle(version))

    @asynccontextmanager
    async def lease(self, version: AdapterVersion, aside: Aside = contextlib.nullcontext) -> AsyncIterator[None]:
        """Hold a version in the engine, once it is there; where it is not, the wait is inside `aside`.

        Raises StageError where it cannot be loaded.
        """
        began = time.monotonic()
        with self.hold(version):
            while version.place in (Place.CLOSING, Place.UNLOADING):
                async with aside():
                    await self._until(lambda: version.place not in (Place.CLOSING, Place.UNLOADING))
            version.leases += 1
            try:
                # Once more, where the engine was lost on the way back from `aside`.
                while version.place in (Place.OUT, Place.QUEUED, Place.LOADING):
                    async with aside():
                        await self._load(version, began)
                version.last_used = time.monotonic()
                yield
            finally:
                version.leases -= 1

    async def drain(self, version: AdapterVersion) -> None:
        """Take a version out of the engine with its last request. Returns then, or where it is wanted again."""
        await self._settle(version)
        await self._until(lambda: not version.leaving or (version.place is Place.OUT and not version.holds))

    def reset(self) -> None:
        """The engine is gone, and everything in it."""
        for version, loading in self._loads.items():
            loading.cancel()
            version.move(Place.OUT)
        self._loads.clear()
        self._spawn(self._notify())

    async def _load(self, version: AdapterVersion, began: float) -> None:
        loading = self._loads.get(version) or self._begin(version)
        try:
            # Others may wait for it too: a request that is cancelled leaves the loading running.
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
        # Retrieve the exception: the load of a prefetch may have nobody who waits for it.
        loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return loading

    async def _bring_in(self, version: AdapterVersion) -> None:
        loading = self._loads[version]
        try:
            async with self._line:
                await self._make_room()
                if self._loads.get(version) is not loading:
                    raise EngineDeadError
                version.move(Place.LOADING)
            began = time.monotonic()
            await self._engine.load(version.folder, version.distinct_slots)
        except BaseException as error:
            await self._forget(version, loading)
            if isinstance(error, AdapterError):
                raise StageError(Stage.LOADED, str(error)) from error
            raise
        self._on_load(time.monotonic() - began)
        version.move(Place.RESIDENT)
        await self._settle(version)

    async def _make_room(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while sum(each.place is not Place.QUEUED for each in self._loads) >= self.capacity:
            evictable = [each for each in self.resident if not each.pinned]
            if idle := next((each for each in evictable if not each.leases), None):
                self._on_evict()
                await self._evict(idle)
                continue
            if time.monotonic() >= until and evictable and not any(each.place is Place.CLOSING for each in evictable):
                evictable[0].move(Place.CLOSING)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S / 4), self._changed:
                    await self._changed.wait()

    async def _settle(self, version: AdapterVersion) -> None:
        """Evict a version that nobody uses any more and nobody is to use."""
        if version.resident and not version.leases:
            if version.place is Place.CLOSING:
                self._on_evict()
                await self._evict(version)
            elif version.leaving and not version.holds:
                await self._evict(version)
        await self._notify()

    async def _evict(self, version: AdapterVersion) -> None:
        loading = self._loads[version]
        version.move(Place.UNLOADING)
        try:
            # A dead engine has forgotten it already.
            with contextlib.suppress(EngineDeadError):
                await self._engine.unload(version.distinct_slots)
        finally:
            await self._forget(version, loading)

    async def _forget(self, version: AdapterVersion, loading: "asyncio.Task[None]") -> None:
        """It is out, unless another engine has begun to load it since."""
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
