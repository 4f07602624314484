"""The folder of adapters over time: when to look, what has appeared, changed and gone, what is still being written."""

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

# Files are read once they have not changed for this long, and refused only after the longer time: a writer may pause.
_SETTLE_S = 0.05
_WRITING_S = 1.0


class Folder:
    """`misnamed`: folders that cannot be adapters, and have been there for two looks, or at the first."""

    def __init__(self, root: Path, events: Events, mirror: Mirror | None = None) -> None:
        self.misnamed: set[AdapterFailure] = set()
        self._root = root
        self._mirror = mirror
        self._events = events
        self._suspects: set[AdapterFailure] | None = None
        self._looking = asyncio.Lock()

    async def changes(self, poll_s: float) -> AsyncIterator[None]:
        """Something may have changed: at once where the kernel tells, and at least every `poll_s` seconds.

        The kernel does not tell of changes made on another machine (NFS, object storage) or behind a flipped link.
        """
        from watchfiles import awatch

        while True:
            try:
                async for _ in awatch(
                    self._root,
                    watch_filter=None,
                    step=20,
                    debounce=100,
                    rust_timeout=int(poll_s * 1000),
                    yield_on_timeout=True,
                ):
                    yield
            except (OSError, RuntimeError) as error:
                # Out of watches, a file system without them, or a folder that is gone for now.
                logger.warning("no notice of changes, polling", extra={"fields": {"reason": str(error)}})
            yield
            await asyncio.sleep(poll_s)

    async def look(self) -> dict[str, dict[str, Found]] | None:
        """What lies there, by name and version; None, and a line in the log, where that cannot be told."""
        async with self._looking:
            try:
                if self._mirror is not None:
                    await asyncio.to_thread(self._mirror.sync)
                found, misnamed = await asyncio.to_thread(scan, self._root)
            except (OSError, MirrorError) as error:
                logger.warning("adapters cannot be listed", extra={"fields": {"reason": str(error)}})
                return None
        # What is there at the start is meant; later, a folder may be half made, and is looked at twice.
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
        """Have an adapter's record say what lies there now; what appeared and what vanished are events."""
        for version, stage in record.note(found):
            self._events.emit(Event.of(version, stage))

    async def settled(self, version: AdapterVersion) -> bool:
        """Whether a version's files have stopped changing; where not, they are noted as they are now."""
        await asyncio.sleep(_SETTLE_S)
        signature = await asyncio.to_thread(signature_of, version.found.folder)
        if signature == version.found.signature:
            return True
        found = {each.version: each.found for each in version.adapter.found.values()}
        self.note(version.adapter, found | {version.version: replace(version.found, signature=signature)})
        return False

    async def wait_for_writer(self, version: AdapterVersion) -> bool:
        """Wait a little, where a version that is wrong is young enough to be written still; False where it is not."""
        if not version.present or time.monotonic() - version.seen >= _WRITING_S:
            return False
        await asyncio.sleep(_WRITING_S / 4)
        return True
