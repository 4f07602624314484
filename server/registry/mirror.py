"""Copies adapters from object storage (an fsspec URL) to a local folder of the same layout."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server.registry.source import MANIFEST_FILE, NAME, TENSORS_FILE
from server.registry.spool import Spool
from server.telemetry.logs import get_logger

logger = get_logger("adapters")

_FILES = (MANIFEST_FILE, TENSORS_FILE)


class MirrorError(Exception):
    """The storage cannot be read."""


class Mirror:
    """Makes `folder` follow `url`: a version appears whole, changes in one step, and goes when `url` loses it.

    `spool` includes the copies in its limit.
    """

    def __init__(self, url: str, folder: Path, max_bytes: int, spool: Spool | None = None) -> None:
        self._spool = spool
        self._url = url
        self._max_bytes = max_bytes
        self._open()
        self._folder = folder
        # The state of the files that each mirrored version was copied from.
        self._seen: dict[tuple[str, str], Any] = {}
        # Run one sync at a time: a call that was abandoned as hung may still be running.
        self._syncing = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def _open(self) -> None:
        """Open the storage with the current credentials."""
        import fsspec

        self._files, self._root = fsspec.core.url_to_fs(self._url, skip_instance_cache=True)

    def sync(self, beat: Callable[[], None] = lambda: None) -> None:
        """Make the folder equal to the storage. Blocks. Raises MirrorError if that cannot be read, and removes nothing.

        Calls `beat` whenever bytes arrive. Logs a version that cannot be fetched, and tries it again next time.
        """
        with self._syncing:
            self._sync(beat)

    def _sync(self, beat: Callable[[], None]) -> None:
        try:
            listed = dict(self._list())
        except Exception as error:
            # Reopen at the next attempt, because credentials may have changed.
            self._open()
            raise MirrorError(f"{self._url}: {error or type(error).__name__}") from error
        for key, files in listed.items():
            state = [self._files.ukey(files[name]["name"]) if name in files else None for name in _FILES]
            if self._seen.get(key) == state:
                continue
            beat()
            try:
                self._fetch(*key, files, beat)
            except Exception as error:
                logger.warning(
                    "not fetched", extra={"fields": {"adapter": key[0], "version": key[1], "reason": str(error)}}
                )
            else:
                self._seen[key] = state
        for name, version in set(self._seen) - set(listed):
            del self._seen[name, version]
            if self._spool:
                self._spool.free(f"mirror/{name}/{version}")
            shutil.rmtree(self._folder / name / version, ignore_errors=True)

    def _list(self) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
        """Every version, as ((name, version), {file name: listing entry})."""
        # Discard fsspec's cached listings.
        self._files.invalidate_cache()
        root = self._root.rstrip("/")
        versions: dict[tuple[str, str], dict[str, Any]] = {}
        for path, entry in self._files.find(root, detail=True).items():
            parts = path[len(root) :].lstrip("/").split("/")
            if len(parts) == 3 and parts[2] in _FILES and all(NAME.fullmatch(part) for part in parts[:2]):
                versions.setdefault((parts[0], parts[1]), {})[parts[2]] = entry
        yield from versions.items()

    def _fetch(self, name: str, version: str, files: dict[str, Any], beat: Callable[[], None]) -> None:
        from fsspec.callbacks import Callback

        from mtlora.files import folder_in_the_making, put_in_place

        if len(files) < len(_FILES):
            # Skip a version that is still being uploaded.
            raise FileNotFoundError(f"no {next(file for file in _FILES if file not in files)} yet")
        if (size := sum(int(entry.get("size") or 0) for entry in files.values())) > self._max_bytes:
            raise ValueError(f"expected at most {self._max_bytes} bytes in all, found {size}")
        if self._spool:
            self._spool.reserve(f"mirror/{name}/{version}", size)
        with folder_in_the_making(self._folder / name / version) as made:
            for file, entry in files.items():
                progress = Callback(hooks={"beat": lambda *_, **__: beat()})
                self._files.get_file(entry["name"], str(made / file), callback=progress)
                beat()
            put_in_place(made, self._folder / name / version)
