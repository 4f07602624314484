"""The task table: which adapter version answers which task.

A catalog is an immutable snapshot. Whoever serves holds one reference to the current snapshot, so a later one takes
its place in one assignment and a request sees one table from start to end.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from server.job import ServedTask
from server.registry.record import AdapterRecord
from server.registry.source import AdapterFailure
from server.registry.version import AdapterVersion
from server.registry.weights import Split, choose, ordered


@dataclass(frozen=True)
class Catalog:
    """A snapshot of what can be asked. `tasks` is in the order of the task ids.

    splits: of tasks whose requests go to several versions, the share of each; `tasks` has the one that serves then.
    """

    tasks: Mapping[str, ServedTask] = field(default_factory=dict)
    splits: Mapping[str, Split[ServedTask]] = field(default_factory=dict)
    adapters: tuple[AdapterVersion, ...] = ()
    failures: tuple[AdapterFailure, ...] = ()

    def choose(self, task: ServedTask, key: bytes) -> ServedTask:
        """The version that answers a request of a task with this routing key."""
        split = self.splits.get(task.spec.id)
        return choose(split, task.adapter_name, key) if split else task

    def page(self, after: str, size: int) -> tuple[list[ServedTask], str]:
        """Up to `size` tasks whose ids come after `after`, and the last one's id if there are more."""
        ids = [task_id for task_id in self.tasks if task_id > after]
        return [self.tasks[task_id] for task_id in ids[:size]], ids[size - 1] if len(ids) > size else ""


def build_catalog(
    records: Iterable[AdapterRecord], before: Catalog, failures: Iterable[AdapterFailure] = ()
) -> Catalog:
    """The table of what serves now.

    A task that several adapters claim stays with the one that has it in the table before, else goes to the first by
    name; every other claim is a failure. `failures` are those known already.
    """
    tasks: dict[str, ServedTask] = {}
    splits: dict[str, Split[ServedTask]] = {}
    contested: list[AdapterFailure] = []
    records = sorted((record for record in records if record.serving), key=lambda record: record.name)
    claims: dict[str, list[AdapterRecord]] = {}
    for record in records:
        assert record.serving is not None
        for task_id in record.serving.specs:
            claims.setdefault(task_id, []).append(record)
    for task_id, claimants in sorted(claims.items()):
        holder = before.tasks[task_id].adapter_name if task_id in before.tasks else ""
        keeper = next((record for record in claimants if record.name == holder), claimants[0])
        assert keeper.serving is not None
        tasks[task_id] = served_task(keeper.serving, task_id)
        if split := _split(keeper, task_id):
            splits[task_id] = split
        for record in claimants:
            if record is not keeper and record.serving is not None:
                reason = f"task {task_id} is {keeper.name}'s already; this claim to it is void"
                contested.append(AdapterFailure(record.name, record.serving.version, reason))
    return Catalog(
        MappingProxyType(tasks),
        MappingProxyType(splits),
        tuple(version for record in records for version in record.active),
        (*failures, *contested),
    )


def served_task(version: AdapterVersion, task_id: str) -> ServedTask:
    """The row of a task. Raises KeyError for a task that the version does not have."""
    return ServedTask(version.specs[task_id], version.name, version.version, version.slots[task_id], version=version)


def _split(record: AdapterRecord, task_id: str) -> Split[ServedTask]:
    weights = record.weights.get(task_id) or record.weights.get("", {})
    return tuple(
        (weight, served_task(version, task_id))
        for name, weight in ordered(weights)
        if (version := record.version_of(name)) and task_id in version.slots
    )
