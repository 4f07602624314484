"""The task table: which adapter version answers which task.

A catalog is an immutable snapshot, replaced in one assignment, so a request uses the same table from start to end.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from server.job import ServedTask
from server.registry.record import AdapterRecord
from server.registry.source import AdapterFailure
from server.registry.version import AdapterVersion
from server.registry.weights import Split, choose, ordered

_NEAR = 24


@dataclass(frozen=True)
class Catalog:
    """All served tasks. `tasks` is sorted by task id.

    splits: the share of each version, for tasks with a canary; `tasks` has their serving version. visible: a cache of
    the sorted ids that lists of patterns allow; callers fill it.
    """

    tasks: Mapping[str, ServedTask] = field(default_factory=dict)
    splits: Mapping[str, Split[ServedTask]] = field(default_factory=dict)
    adapters: tuple[AdapterVersion, ...] = ()
    failures: tuple[AdapterFailure, ...] = ()
    visible: dict[tuple[str, ...], Sequence[str]] = field(init=False, default_factory=dict)

    def choose(self, task: ServedTask, key: bytes) -> ServedTask:
        """The task's row for the version that answers a request with this routing key."""
        split = self.splits.get(task.spec.id)
        return choose(split, task.adapter_name, key) if split else task

    @cached_property
    def ids(self) -> Sequence[str]:
        """Every task id, in order."""
        return tuple(self.tasks)

    def near(self, task_id: str) -> Sequence[str]:
        """A few ids next to this one in sorted order, which share a prefix with it."""
        place = bisect_right(self.ids, task_id)
        return self.ids[max(0, place - _NEAR) : place + _NEAR]


def build_catalog(records: Iterable[AdapterRecord], before: Catalog, failures: Iterable[AdapterFailure]) -> Catalog:
    """The table of serving versions, with the given `failures` and those of claims.

    A task that several adapters claim stays with the one that had it `before`, or else goes to the first by name. Every
    other claim is a failure.
    """
    tasks: dict[str, ServedTask] = {}
    splits: dict[str, Split[ServedTask]] = {}
    contested: list[AdapterFailure] = []
    serving = sorted((record.serving for record in records if record.serving), key=lambda version: version.name)
    claims: dict[str, list[AdapterVersion]] = {}
    for version in serving:
        for task_id in version.specs:
            claims.setdefault(task_id, []).append(version)
    for task_id, claimants in sorted(claims.items()):
        holder = before.tasks[task_id].adapter_name if task_id in before.tasks else ""
        keeper = next((version for version in claimants if version.name == holder), claimants[0])
        tasks[task_id] = served_task(keeper, task_id)
        if split := _split(keeper.adapter, task_id):
            splits[task_id] = split
        for version in claimants:
            if version is not keeper:
                reason = f"task {task_id} is served by adapter {keeper.name} already, so this adapter does not serve it"
                contested.append(AdapterFailure(version.name, version.version, reason))
    return Catalog(
        MappingProxyType(tasks),
        MappingProxyType(splits),
        tuple(active for version in serving for active in version.adapter.active),
        (*failures, *contested),
    )


def served_task(version: AdapterVersion, task_id: str) -> ServedTask:
    """The row of a task. Raises KeyError if the version does not have the task."""
    return ServedTask(
        version.specs[task_id],
        version.name,
        version.version,
        version.slots[task_id],
        version=version,
        calibration=version.calibration.get(task_id),
        activation=version.activation,
    )


def _split(record: AdapterRecord, task_id: str) -> Split[ServedTask]:
    weights = record.weights.get(task_id) or record.weights.get("", {})
    return tuple(
        (weight, served_task(version, task_id))
        for name, weight in ordered(weights)
        if (version := record.version_of(name)) and task_id in version.slots
    )
