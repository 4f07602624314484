"""Versions under random publishes, calls, requests and lost engines: what version.py says holds at all times."""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.errors import EngineDeadError
from server.job import Lane
from server.registry import residency as residency_module
from server.registry.catalog import Catalog
from server.registry.events import Events
from server.registry.lifecycle import Lifecycle
from server.registry.record import AdapterRecord
from server.registry.registry import NotPossibleError, Registry, UnknownAdapterError
from server.registry.residency import PATIENCE_S, Residency
from server.registry.source import AdapterFailure, Found
from server.registry.spool import Spool, SpoolFullError
from server.registry.verifier import Verified
from server.registry.version import AdapterVersion, Place, Stage, StageError
from tests.server.slots import Loads, Slot

CAPACITY = 2
ROOM_S = 50 * PATIENCE_S
# Each copy has one byte. There are four contents, and a copy in the making counts too.
COPIES = 4
# Adapters a and b both claim y.
TASKS = {"a": ("x", "y"), "b": ("y", "z"), "c": ("w",)}
NAMES = st.sampled_from(sorted(TASKS))
VERSIONS = st.sampled_from("1234")
WEIGHTS = st.dictionaries(VERSIONS, st.integers(1, 100), max_size=2)


class Engine(Loads):
    async def load(self, folder: Path, slots: Any) -> None:
        if not folder.exists():
            raise AssertionError(f"{folder} was removed before it was loaded")
        await super().load(folder, slots)


class FolderInMemory:
    """An adapters folder in memory, filled by the test."""

    def __init__(self, events: Events) -> None:
        self.found: dict[str, dict[str, Found]] = {}
        self.misnamed: set[AdapterFailure] = set()

    async def look(self) -> dict[str, dict[str, Found]]:
        await asyncio.sleep(0)
        return {name: dict(versions) for name, versions in self.found.items() if versions}

    def note(self, record: AdapterRecord, found: dict[str, Found]) -> None:
        record.note(found)

    async def settled(self, version: AdapterVersion) -> bool:
        await asyncio.sleep(0)
        return True

    async def wait_for_writer(self, version: AdapterVersion) -> bool:
        return False


class Verifier:
    """Reads a version's content from its signature; 0 marks a bad version."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    async def verify(self, root: Path, found: Found) -> Verified:
        await asyncio.sleep(0)
        content = found.signature[0][1]
        if content == 0:
            raise StageError(Stage.VERIFIED, "bad")
        try:
            incoming = self._spool.incoming(1)
        except SpoolFullError as error:
            raise StageError(Stage.VERIFIED, str(error)) from None
        (incoming / "adapter.json").write_bytes(b"x")
        folder = self._spool.keep(incoming, str(content))
        manifest: Any = SimpleNamespace(
            config=SimpleNamespace(activation="all"),
            tasks=[SimpleNamespace(id=task, image=None) for task in TASKS[found.name]],
            images=False,
            calibration={},
        )
        return Verified(str(content), folder, manifest)


@dataclass(eq=False)
class Request:
    """A request for `version`, chosen when it began."""

    version: AdapterVersion
    engine: int
    end: asyncio.Event = field(default_factory=asyncio.Event)
    runs: bool = False


def make_slots(name: str, label: str, folder: Path, manifest: Any, first_id: int) -> dict[str, Any]:
    return {task.id: Slot(first_id, f"{name}/{label}") for task in manifest.tasks}


class VirtualTime(asyncio.SelectorEventLoop):
    """A loop clock that jumps to the next timer when the loop is idle, so the machine's speed has no effect."""

    now = 0.0

    def time(self) -> float:
        return VirtualTime.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            VirtualTime.now = max(VirtualTime.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTime()
        self.scratch = tempfile.TemporaryDirectory()
        self.signatures = 0
        self.engines = 0
        self.cold = False
        self.requests: list[Request] = []
        self.failures: list[BaseException] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop.run_until_complete(self._open())

    async def _open(self) -> None:
        self.engine = Engine()
        self.spool = Spool(Path(self.scratch.name), COPIES)
        self.residency = Residency(self.engine, CAPACITY, room_s=ROOM_S)
        events = Events()
        self.folder: Any = FolderInMemory(events)
        lifecycle = Lifecycle(
            root=Path(),
            verifier=Verifier(self.spool),
            spool=self.spool,
            residencies={Lane.TEXT: self.residency},
            make_slots=make_slots,
            warm=self._warm,
            events=events,
        )
        self.catalog = Catalog()
        self.registry = Registry(self.folder, lifecycle, self._publish)

    async def _warm(self, version: AdapterVersion) -> None:
        await asyncio.sleep(0)
        if self.cold:
            raise RuntimeError("no first sequence")

    def _publish(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        """Start some work, then let the loop run for a moment."""

        async def guarded() -> None:
            try:
                with suppress(UnknownAdapterError, NotPossibleError, StageError, EngineDeadError):
                    await work
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                self.failures.append(error)

        task = self.loop.create_task(guarded())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        self._go_on(8)

    def _go_on(self, turns: int) -> None:
        async def turn() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turn())

    @initialize()
    def start(self) -> None:
        for name in TASKS:
            for version in "12":
                self._put(name, version, int(version))
        self._begin(self.registry.verify_all())
        self._begin(self.registry.load_all())

    @rule(name=NAMES, version=VERSIONS, content=st.sampled_from([1, 2, 3, 4, 0]))
    def publish(self, name: str, version: str, content: int) -> None:
        self._put(name, version, content)
        self.follow()

    def _put(self, name: str, version: str, content: int) -> None:
        self.signatures += 1
        found = Found(name, version, Path(name, version), ((self.signatures, content, 0, 0, 0),))
        self.folder.found.setdefault(name, {})[version] = found

    @rule(name=NAMES, version=VERSIONS)
    def remove(self, name: str, version: str) -> None:
        self.folder.found.get(name, {}).pop(version, None)
        self.follow()

    @rule()
    def follow(self) -> None:
        async def look() -> None:
            await self.registry._look()
            for record in self.registry.records.values():
                if record.candidate() is not None and record.following is None:
                    record.following = self.loop.create_task(self.registry._follow(record))

        self._begin(look())

    @rule(name=NAMES, version=VERSIONS)
    def load(self, name: str, version: str) -> None:
        self._begin(self.registry.load(name, version))

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        self._begin(self.registry.unload(name))

    @rule(name=NAMES)
    def rollback(self, name: str) -> None:
        self._begin(self.registry.rollback(name))

    @rule(name=NAMES, weights=WEIGHTS, task=st.sampled_from(["", "", "x", "z"]))
    def set_weights(self, name: str, weights: dict[str, int], task: str) -> None:
        self._begin(self.registry.set_weights(name, weights, task))

    @rule(name=NAMES, pin=st.booleans())
    def pin(self, name: str, pin: bool) -> None:
        async def call() -> None:
            (self.registry.pin if pin else self.registry.unpin)(name)

        self._begin(call())

    @precondition(lambda self: self.catalog.tasks)
    @rule(
        numbers=st.lists(st.integers(0, 3), min_size=1, max_size=5),
        key=st.binary(max_size=2),
        queued=st.sampled_from([0, 0, 200]),
    )
    def ask(self, numbers: list[int], key: bytes, queued: int) -> None:
        for number in numbers:
            task = list(self.catalog.tasks)[number % len(self.catalog.tasks)]
            version = self.catalog.choose(self.catalog.tasks[task], key).version
            assert version is not None
            self._ask(version, queued)

    def _ask(self, version: AdapterVersion, queued: int) -> None:
        """Begin a request: its version is held from now on, and leased once it is the request's turn."""
        request = Request(version, self.engines)
        self.requests.append(request)

        async def run() -> None:
            try:
                with self.residency.hold(version):
                    for _ in range(queued):
                        await asyncio.sleep(0)
                    async with self.residency.lease(version):
                        request.engine, request.runs = self.engines, True
                        await request.end.wait()
            finally:
                request.runs = False
                self.requests.remove(request)

        self._begin(run())

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 9))
    def answer(self, number: int) -> None:
        self.requests[number % len(self.requests)].end.set()
        self._go_on(4)

    @precondition(lambda self: self.tasks)
    @rule(number=st.integers(0, 9))
    def cancel(self, number: int) -> None:
        tasks = sorted(self.tasks, key=lambda task: task.get_name())
        tasks[number % len(tasks)].cancel()
        self._go_on(4)

    @rule(version=VERSIONS)
    def engine_refuses_or_takes(self, version: str) -> None:
        refused = {f"{name}/{version}@{content}" for name in TASKS for content in range(5)}
        self.engine.refuse ^= refused

    @rule()
    def first_sequences_fail_or_pass(self) -> None:
        self.cold = not self.cold

    @rule()
    def lose_engine(self) -> None:
        async def reset() -> None:
            self.engines += 1
            self.engine.held.clear()
            self.residency.reset()

        self.loop.run_until_complete(reset())
        self._begin(self.registry.load_all())

    @rule(turns=st.integers(1, 40))
    def wait(self, turns: int) -> None:
        self._go_on(turns)

    @rule()
    def lose_patience(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(2 * PATIENCE_S))

    @precondition(lambda self: any(each.place is Place.QUEUED for each in self.residency._loads))
    @rule()
    def wait_longer_than_for_room(self) -> None:
        waiting = [load for each, load in self.residency._loads.items() if each.place is Place.QUEUED]
        self.loop.run_until_complete(asyncio.sleep(2 * ROOM_S))
        assert all(load.done() for load in waiting)

    @invariant()
    def no_work_failed(self) -> None:
        assert not self.failures

    @invariant()
    def places_are_within_the_capacity(self) -> None:
        assert len(self.engine.held) <= CAPACITY
        assert sum(each.place is not Place.QUEUED for each in self.residency._loads) <= CAPACITY

    @invariant()
    def running_requests_keep_their_version_in_the_engine(self) -> None:
        for request in self.requests:
            if request.runs and request.engine == self.engines:
                assert request.version.resident
                assert request.version.distinct_slots[0].lora_name in self.engine.held

    @invariant()
    def requests_keep_the_copy_of_their_version(self) -> None:
        assert all(request.version.copied and request.version.folder.exists() for request in self.requests)

    @invariant()
    def copies_are_within_the_spools_limit(self) -> None:
        assert self.spool.bytes == len(list(self.spool.root.iterdir())) <= COPIES

    @invariant()
    def what_the_table_has_serves(self) -> None:
        serving = [version for record in self.registry.records.values() for version in record.active]
        assert all(version.stage is Stage.SERVING for version in serving)
        chosen = [row.version for row in self.catalog.tasks.values()]
        chosen += [row.version for split in self.catalog.splits.values() for _, row in split]
        assert set(chosen) <= set(serving)

    def teardown(self) -> None:
        async def end() -> None:
            async with asyncio.timeout(10):
                while self.tasks or any(record.following for record in self.registry.records.values()):
                    for request in self.requests:
                        request.end.set()
                    await asyncio.sleep(0.001)
                await self._until_idle(lambda: not (self.registry._lifecycle._draining or self.residency._background))

        self.loop.run_until_complete(end())
        self.no_work_failed()
        self.what_the_table_has_serves()
        versions = [version for record in self.registry.records.values() for version in record.versions]
        kept = [version for version in versions if version.copied]
        for record in self.registry.records.values():
            assert {version for version in record.versions if version.copied} == {*record.active, *record.previous}
        assert {path.name for path in self.spool.root.iterdir()} == {version.content for version in kept}
        assert all(version.stage is Stage.SERVING for version in self.residency.resident)
        assert all((version.holds, version.leases) == (0, 0) for version in versions)
        self.spool.close()
        self.loop.close()
        self.scratch.cleanup()

    @staticmethod
    async def _until_idle(idle: Callable[[], bool]) -> None:
        while not idle():
            await asyncio.sleep(0.001)


@pytest.mark.slow
def test_random_lives_keep_the_invariants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_module, "time", SimpleNamespace(monotonic=lambda: VirtualTime.now))
    run_state_machine_as_test(Life, settings=settings(stateful_step_count=30))
