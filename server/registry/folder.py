"""The folder of adapters over time: when to look, what has appeared, changed or gone, what is still being written."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from server.registry.events import Event, Events
from server.registry.mirror import Mirror, MirrorError
from server.registry.record import AdapterRecord
from server.registry.source import MANIFEST_FILE, UPLOADS_FOLDER, AdapterFailure, Found, scan, signature_of
from server.registry.storage import Beat, Storage
from server.registry.version import AdapterVersion, Stage, StageError
from server.telemetry.logs import get_logger

logger = get_logger("adapters")

# Seconds without change before files are read, and before bad files are refused, because a writer may pause.
_SETTLE_S = 0.05
_WRITING_S = 1.0


def _not_an_upload(_: Any, path: str) -> bool:
    """Ignore changes by uploads: each piece would cause a look."""
    return f"/{UPLOADS_FOLDER}/" not in path


class Folder:
    """`misnamed`: folders that cannot be adapters, if the first look or two consecutive looks saw them."""

    def __init__(
        self, root: Path, events: Events, mirror: Mirror | None = None, storage: Storage | None = None
    ) -> None:
        self.misnamed: set[AdapterFailure] = set()
        self._root = root
        self._storage = storage or Storage()
        self._mirror = mirror
        self._events = events
        self._suspects: set[AdapterFailure] | None = None
        self._looking = asyncio.Lock()

    async def changes(self, poll_s: float) -> AsyncIterator[None]:
        """Yield when to look: as soon as the kernel reports a change, and at least every `poll_s` seconds.

        The kernel reports no change made on another machine (NFS, object storage) or by a flipped link.
        """
        loop, changed, stop = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def notify() -> None:
            # The loop may have ended.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        # Do not use watchfiles' awatch: it sets up the watch on the event loop, which a hanging storage would block.
        threading.Thread(target=self._watch, args=(notify, stop, poll_s), name="adapters-watch", daemon=True).start()
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(poll_s):
                        await changed.wait()
                changed.clear()
                yield
        finally:
            stop.set()

    def _watch(self, notify: Callable[[], None], stop: threading.Event, retry_s: float) -> None:
        """Call `notify` for every change that the kernel reports, until `stop`. In a thread."""
        from watchfiles import watch

        while not stop.is_set():
            try:
                # A long step: the watching thread wakes up at each one and takes the interpreter from the event loop.
                for _ in watch(self._root, watch_filter=_not_an_upload, step=100, debounce=400, stop_event=stop):
                    notify()
            except (OSError, RuntimeError) as error:
                # The kernel has no watches left, the file system has none, or the folder is missing at the moment.
                logger.warning("no notice of changes, polling", extra={"fields": {"reason": str(error)}})
            stop.wait(retry_s)

    async def look(self) -> dict[str, dict[str, Found]] | None:
        """List the folder by name and version; logs a line and returns None if that fails."""
        async with self._looking:
            try:
                if self._mirror is not None:
                    await self._storage.call(self._mirror.sync)
                found, misnamed = await self._storage.call(partial(scan, self._root))
            except (OSError, MirrorError) as error:
                logger.warning("adapters cannot be listed", extra={"fields": {"reason": str(error)}})
                return None
        # Report at the first look; later, a folder may be incomplete, so two consecutive looks must agree.
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
        try:
            signature = await self._storage.call(lambda _: signature_of(version.found.folder))
        except TimeoutError as error:
            logger.warning(
                "an adapter cannot be read", extra={"fields": {"version": str(version), "reason": str(error)}}
            )
            return False
        if signature == version.found.signature:
            return True
        found = {each.version: each.found for each in version.adapter.found.values()}
        self.note(version.adapter, found | {version.version: replace(version.found, signature=signature)})
        return False

    async def manifest(self, version: AdapterVersion) -> bytes:
        """The bytes of a version's manifest. Raises OSError, or CheckpointError if it is no regular file."""
        from mtlora.checkpoint.read import MAX_MANIFEST_BYTES
        from mtlora.checkpoint.untrusted import open_file

        def read(_: Beat) -> bytes:
            with open_file(version.found.folder, MANIFEST_FILE) as file:
                return file.read(MAX_MANIFEST_BYTES)

        return await self._storage.call(read)

    async def wait_for_writer(self, version: AdapterVersion) -> bool:
        """Wait a little if a bad version may still be being written; False if it is too old for that, or gone."""
        if not version.present or time.monotonic() - version.seen >= _WRITING_S:
            return False
        await asyncio.sleep(_WRITING_S / 4)
        return True
