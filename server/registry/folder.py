"""The folder of adapters over time: what has appeared, changed and gone, and what is still being written."""

import asyncio
import time
from dataclasses import replace

from server.registry.events import Event
from server.registry.mirror import MirrorError
from server.registry.parts import Parts
from server.registry.record import AdapterRecord
from server.registry.source import Found, Misnamed, Signature, scan, signature_of
from server.registry.version import Stage, StageError
from server.telemetry.logs import get_logger

logger = get_logger("adapters")

# Files are looked at once they have not changed for this long, and refused only after the longer time: a writer may
# pause.
_SETTLE_S = 0.05
_WRITING_S = 1.0


class Folder:
    """`misnamed`: folders that cannot be adapters, and have been there for two looks, or at the first."""

    def __init__(self, parts: Parts) -> None:
        self.misnamed: set[Misnamed] = set()
        self._root = parts.root
        self._mirror = parts.mirror
        self._events = parts.events
        self._suspects: set[Misnamed] | None = None
        self._first_seen: dict[tuple[str, str, Signature], float] = {}
        self._looking = asyncio.Lock()

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
        """Have an adapter's record say what lies there now; what appeared and what went are events."""
        for version, now in found.items():
            before = record.found.get(version)
            if now.complete and (before is None or before.signature != now.signature):
                self._first_seen[record.name, version, now.signature] = time.monotonic()
                if before is None or not before.complete:
                    self._events.emit(Event(record.name, version, Stage.FOUND))
        for version in set(record.found) - set(found):
            self._events.emit(Event(record.name, version, Stage.VANISHED))
            record.refused.pop(version, None)
            record.passed_over.pop(version, None)
        record.found = found
        self._first_seen = {
            key: seen
            for key, seen in self._first_seen.items()
            if key[0] != record.name or (key[1] in found and found[key[1]].signature == key[2])
        }

    async def settled(self, record: AdapterRecord, found: Found) -> bool:
        """Whether a version's files have stopped changing; where not, they are noted as they are now."""
        await asyncio.sleep(_SETTLE_S)
        signature = await asyncio.to_thread(signature_of, found.folder)
        if signature == found.signature:
            return True
        self.note(record, record.found | {found.version: replace(found, signature=signature)})
        return False

    def age(self, found: Found) -> float:
        """Seconds since a version was first seen as it is now; 0 where it is not there so any more."""
        now = time.monotonic()
        return now - self._first_seen.get((found.name, found.version, found.signature), now)

    async def wait_for_writer(self, found: Found) -> bool:
        """Wait a little, where a version that is wrong is young enough to be written still; False where it is not."""
        if (found.name, found.version, found.signature) not in self._first_seen or self.age(found) >= _WRITING_S:
            return False
        await asyncio.sleep(_WRITING_S / 4)
        return True
