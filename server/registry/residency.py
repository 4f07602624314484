"""Which adapter versions are in the engine's memory: least recently used first to go, never while a request runs on it.

A request takes a lease on its version before the engine hears of it. A version that is not in the engine is loaded
then, beside the running steps; requests for versions that are there go straight on.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from server.errors import AdapterError, EngineDeadError
from server.registry.version import AdapterVersion, Stage, StageError

# How long a version waits for a place before the least recently used one, busy as it is, has to make room: that one
# takes no new requests then and goes with its last. Below that, swapping places would cost more than waiting.
PATIENCE_S = 1.0


# What a request does while it waits for its version.
Aside = Callable[[], AbstractAsyncContextManager[None]]


class LoadsSlots(Protocol):
    async def load(self, folder: Path, slots: Sequence[Any]) -> None: ...
    async def unload(self, slots: Sequence[Any]) -> None: ...


@dataclass(eq=False)
class _Place:
    """admitted: counts against the capacity. ready: loaded. closed: takes no new lease and goes with its last."""

    version: AdapterVersion
    loading: "asyncio.Task[None]"
    admitted: bool = False
    ready: bool = False
    closed: bool = False
    users: int = 0


class Residency:
    """`capacity` versions at a time, whatever their tasks. Adapters named in `pinned` are not evicted for others.

    `on_cold` gets the seconds that each request waited whose version was not in the engine, `on_load` those that each
    load took, without the wait for a place; `on_evict` is called for every version that makes room for another.
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
        self.pinned: set[str] = set()
        # What the last engine had, least recently used first.
        self.lost: list[AdapterVersion] = []
        self._engine = engine
        self._on_cold = on_cold
        self._on_load = on_load
        self._on_evict = on_evict
        # Least recently used first.
        self._places: OrderedDict[AdapterVersion, _Place] = OrderedDict()
        self._retired: set[AdapterVersion] = set()
        self._changed = asyncio.Condition()
        # Whoever waits for a place waits in line.
        self._line = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def resident(self) -> list[AdapterVersion]:
        """Versions in the engine, least recently used first."""
        return [version for version, place in self._places.items() if place.ready]

    def users(self, version: AdapterVersion) -> int:
        """Requests that run on a version or wait for it."""
        place = self._places.get(version)
        return place.users if place else 0

    def prefetch(self, version: AdapterVersion) -> None:
        """Begin to load a version that a request is about to want."""
        if version not in self._places:
            self._begin(version)

    @asynccontextmanager
    async def lease(self, version: AdapterVersion, aside: Aside = contextlib.nullcontext) -> AsyncIterator[None]:
        """Hold a version in the engine, once it is there; where it is not, the wait is inside `aside`.

        Raises StageError where it cannot be loaded.
        """
        place = self._at_once(version)
        try:
            while place is None:
                async with aside():
                    place = await self._acquire(version)
                if self._places.get(version) is not place:
                    # Lost with its engine on the way back.
                    place = None
            yield
        finally:
            if place is not None:
                place.users -= 1
                if not place.users:
                    # Not the request's to wait for.
                    self._spawn(self._let_go(place))

    async def retire(self, version: AdapterVersion) -> None:
        """Take a version out of the engine when its last request has left; returns then."""
        self._retired.add(version)
        while version in self._retired and (place := self._places.get(version)) is not None:
            await self._let_go(place)
            await self._gone(place, unless=lambda: version not in self._retired)
        self._retired.discard(version)

    def keep(self, version: AdapterVersion) -> None:
        """Call off `retire`: the version serves again."""
        if version in self._retired:
            self._retired.discard(version)
            self._spawn(self._notify())

    def reset(self) -> None:
        """The engine is gone, and everything in it. `lost` tells what that was."""
        self.lost = self.resident or self.lost
        for place in self._places.values():
            place.loading.cancel()
        self._places.clear()

    def _at_once(self, version: AdapterVersion) -> _Place | None:
        place = self._places.get(version)
        if place is None or not place.ready or place.closed:
            return None
        self._places.move_to_end(version)
        place.users += 1
        return place

    async def _acquire(self, version: AdapterVersion) -> _Place:
        began = time.monotonic()
        while (place := self._places.get(version)) is not None and place.closed:
            await self._gone(place)
        place = place or self._begin(version)
        self._places.move_to_end(version)
        place.users += 1
        if place.ready:
            return place
        try:
            # Others may wait for it too: a request that is cancelled leaves the loading running.
            await asyncio.shield(place.loading)
        except asyncio.CancelledError:
            place.users -= 1
            if place.loading.cancelled():
                raise EngineDeadError from None
            self._spawn(self._let_go(place))
            raise
        except BaseException:
            place.users -= 1
            raise
        self._on_cold(time.monotonic() - began)
        return place

    def _begin(self, version: AdapterVersion) -> _Place:
        async def load() -> None:
            try:
                async with self._line:
                    await self._make_room()
                    place.admitted = True
                began = time.monotonic()
                await self._engine.load(version.folder, version.distinct_slots)
            except BaseException as error:
                self._forget(place)
                await self._notify()
                if isinstance(error, AdapterError):
                    raise StageError(Stage.LOADED, str(error)) from error
                raise
            self._on_load(time.monotonic() - began)
            place.ready = True
            await self._let_go(place)

        place = self._places[version] = _Place(version, asyncio.create_task(load()))
        # Where nobody waits for it any more, its failure is nobody's.
        place.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return place

    async def _make_room(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while sum(place.admitted for place in self._places.values()) >= self.capacity:
            evictable = [p for p in self._places.values() if p.ready and p.version.name not in self.pinned]
            if idle := next((place for place in evictable if not place.users), None):
                self._on_evict()
                await self._evict(idle)
                continue
            if time.monotonic() >= until and evictable and not any(place.closed for place in evictable):
                evictable[0].closed = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S / 4), self._changed:
                    await self._changed.wait()

    async def _let_go(self, place: _Place) -> None:
        """Evict a place that nobody uses and nobody is to use."""
        if place.ready and not place.users and (place.closed or place.version in self._retired):
            if place.closed:
                self._on_evict()
            await self._evict(place)
        else:
            await self._notify()

    async def _evict(self, place: _Place) -> None:
        if self._forget(place):
            # A dead engine has forgotten it already.
            with contextlib.suppress(EngineDeadError):
                await self._engine.unload(place.version.distinct_slots)
        await self._notify()

    def _forget(self, place: _Place) -> bool:
        if self._places.get(place.version) is not place:
            return False
        del self._places[place.version]
        return True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _gone(self, place: _Place, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait until a place is given up, or for what comes first."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._places.get(place.version) is not place or unless())
