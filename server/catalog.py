"""The task table: which adapter version answers which task.

A catalog is an immutable snapshot. Whoever serves holds one reference to the current snapshot, so a later one takes
its place in one assignment and a request sees one table from start to end.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from server.job import ServedTask
from server.logs import get_logger

if TYPE_CHECKING:
    from mtlora.backbone import BackboneArchitecture
    from mtlora.checkpoint import AdapterManifest

logger = get_logger("catalog")

# (adapter name, version, folder, manifest, first id) -> a vLLM LoRARequest for each task id.
MakeSlots = Callable[[str, str, Path, "AdapterManifest", int], Mapping[str, Any]]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
_NUMBERS = re.compile(r"v?(\d+(?:\.\d+)*)", re.ASCII)


@dataclass(frozen=True)
class Adapter:
    """An adapter version that passed verification, and its distinct slots."""

    name: str
    version: str
    folder: Path
    slots: tuple[Any, ...]


@dataclass(frozen=True)
class AdapterFailure:
    """An adapter version, or a task it claims, that is not served, and why."""

    name: str
    version: str
    reason: str


@dataclass(frozen=True)
class Catalog:
    """A snapshot of what can be asked. `tasks` is in the order of the task ids."""

    tasks: Mapping[str, ServedTask] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    failures: tuple[AdapterFailure, ...] = ()

    def page(self, after: str, size: int) -> tuple[list[ServedTask], str]:
        """Up to `size` tasks whose ids come after `after`, and the last one's id if there are more."""
        ids = [task_id for task_id in self.tasks if task_id > after]
        return [self.tasks[task_id] for task_id in ids[:size]], ids[size - 1] if len(ids) > size else ""

    def without(self, adapter: Adapter, reason: str) -> "Catalog":
        """This catalog less an adapter that turned out not to load."""
        tasks = {
            task_id: task
            for task_id, task in self.tasks.items()
            if (task.adapter_name, task.adapter_version) != (adapter.name, adapter.version)
        }
        return replace(
            self,
            tasks=MappingProxyType(tasks),
            adapters=tuple(other for other in self.adapters if other is not adapter),
            failures=(*self.failures, _failure(adapter.name, adapter.version, reason)),
        )


def read_catalog(folder: Path, backbone: "BackboneArchitecture", make_slots: MakeSlots) -> Catalog:
    """Verify every adapter under `folder` and build the task table from the healthy ones.

    The highest version that is healthy is served. Of two adapters that claim a task, the first by name keeps it.
    """
    from mtlora.checkpoint import CheckpointError, read_checkpoint

    tasks: dict[str, ServedTask] = {}
    adapters: list[Adapter] = []
    failures: list[AdapterFailure] = []
    next_id = 1
    for name, versions in _adapter_folders(folder):
        if not _NAME.fullmatch(name):
            failures.append(_failure(name, "", f"name must match {_NAME.pattern}"))
            continue
        if not versions:
            failures.append(_failure(name, "", "no version folder; an adapter is NAME/VERSION/"))
        for version, path in versions:
            try:
                if not _NAME.fullmatch(version):
                    raise CheckpointError(f"version must match {_NAME.pattern}")
                manifest = read_checkpoint(path, backbone).manifest
            except CheckpointError as error:
                failures.append(_failure(name, version, str(error)))
                continue
            slots = make_slots(name, version, path, manifest, next_id)
            # Tasks without a bias of their own share one slot.
            distinct = {slot.lora_int_id: slot for slot in slots.values()}
            next_id = max(distinct) + 1
            adapters.append(Adapter(name, version, path, tuple(distinct.values())))
            for task in manifest.tasks:
                if keeper := tasks.get(task.id):
                    reason = f"task {task.id} is {keeper.adapter_name}'s already; this claim to it is void"
                    failures.append(_failure(name, version, reason))
                else:
                    tasks[task.id] = ServedTask(task, name, version, slots[task.id])
            break
    return Catalog(MappingProxyType(dict(sorted(tasks.items()))), tuple(adapters), tuple(failures))


def version_key(version: str) -> tuple[int, tuple[int, ...], str]:
    """Sorts versions: words by letter; above them numbers by value, a leading v or not: `2` < `10` < `v10.1`."""
    if match := _NUMBERS.fullmatch(version):
        return 1, tuple(int(part) for part in match[1].split(".")), version
    return 0, (), version


def _adapter_folders(folder: Path) -> Iterator[tuple[str, list[tuple[str, Path]]]]:
    """(name, [(version, folder), highest first]) by name. Hidden folders are unfinished writes, or a mount's own."""
    for adapter in _folders(folder):
        versions = [(version.name, version) for version in _folders(adapter)]
        yield adapter.name, sorted(versions, key=lambda item: version_key(item[0]), reverse=True)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _failure(name: str, version: str, reason: str) -> AdapterFailure:
    logger.error("adapter not served", extra={"fields": {"adapter": name, "version": version, "reason": reason}})
    return AdapterFailure(name, version, reason)
