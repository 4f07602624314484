"""The folder of adapters over time: when to look, what has appeared, changed or gone, what is still being written."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from server.registry.events import Event, Events
from server.registry.mirror import Mirror, MirrorError
from server.registry.record import AdapterRecord
from server.registry.source import AdapterFailure, Found, scan, signature_of
from server.registry.version import AdapterVersion, Stage, StageError
from server.telemetry.logs import get_logger

logger = get_logger("adapters")

# Files are read once they have not changed for the first time, and refused only after the second: a writer may pause.
_SETTLE_S = 0.05
_WRITING_S = 1.0


class Folder:
    """`misnamed`: folders that cannot be adapters, seen by the first look or by two looks in a row."""

    def __init__(self, root: Path, events: Events, mirror: Mirror | None = None) -> None:
        self.misnamed: set[AdapterFailure] = set()
        self._root = root
        self._mirror = mirror
        self._events = events
        self._suspects: set[AdapterFailure] | None = None
        self._looking = asyncio.Lock()

    async def changes(self, poll_s: float) -> AsyncIterator[None]:
        """Yield when to look: as soon as the kernel reports a change, and at least every `poll_s` seconds.

        The kernel reports no change made on another machine (NFS, object storage) or by a flipped link.
        """
        from watchfiles import awatch

        while True:
            try:
                async for _ in awatch(
                    self._root,
                    watch_filter=None,
                    # The watching thread wakes up at every step, and takes the interpreter from the event loop.
                    step=100,
                    debounce=200,
                    rust_timeout=int(poll_s * 1000),
                    yield_on_timeout=True,
                ):
                    yield
            except (OSError, RuntimeError) as error:
                # No watches left, a file system without them, or a folder that is gone for now.
                logger.warning("no notice of changes, polling", extra={"fields": {"reason": str(error)}})
            yield
            await asyncio.sleep(poll_s)

    async def look(self) -> dict[str, dict[str, Found]] | None:
        """What lies there, by name and version; None, with a line in the log, if it cannot be listed."""
        async with self._looking:
            try:
                if self._mirror is not None:
                    await asyncio.to_thread(self._mirror.sync)
                found, misnamed = await asyncio.to_thread(scan, self._root)
            except (OSError, MirrorError) as error:
                logger.warning("adapters cannot be listed", extra={"fields": {"reason": str(error)}})
                return None
        # The first look takes folders as they are; a later one may see a folder half made, so two must agree.
        still = set(misnamed) if self._suspects is None else set(misnamed) & self._suspects
        self._suspects = set(misnamed)
        for each in still - self.misnamed:
            self._events.emit(Event.failure(each.name, each.version, StageError(Stage.FOUND, each.reason)))
        self.misnamed = still
        by_name: dict[str, dict[str, Found]] = {}
        for version in found:
            by_name.setdefault(version.name, {})[version.version] = version
        return by_name

    def note(self, record: AdapterRecord, found: dict[str, Found]) -> None:
        """Tell an adapter's record what lies there now, and emit what appeared and what vanished."""
        for version, stage in record.note(found):
            self._events.emit(Event.of(version, stage))

    async def settled(self, version: AdapterVersion) -> bool:
        """Whether a version's files have stopped changing. If not, note them as they are now."""
        await asyncio.sleep(_SETTLE_S)
        signature = await asyncio.to_thread(signature_of, version.found.folder)
        if signature == version.found.signature:
            return True
        found = {each.version: each.found for each in version.adapter.found.values()}
        self.note(version.adapter, found | {version.version: replace(version.found, signature=signature)})
        return False

    async def wait_for_writer(self, version: AdapterVersion) -> bool:
        """Wait a little if a bad version may still be being written; False if it is too old for that, or gone."""
        if not version.present or time.monotonic() - version.seen >= _WRITING_S:
            return False
        await asyncio.sleep(_WRITING_S / 4)
        return True
