"""The claim's results as cells, with the estimates that its tables and decisions are made of."""

from collections.abc import Iterable, Sequence
from typing import Any

from mtlora.sweep.report import marks_of
from mtlora.sweep.statistics import Estimate, accuracy, recovery

UPPER, LOWER = "one adapter each task", "linear heads alone"
Result = dict[str, Any]
# Part, method, number of tasks.
Key = tuple[str, str, int]


class Cells:
    """Results by key, then by seed; `keys` in the order in which they came."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._by_key: dict[Key, dict[int, Result]] = {}
        self._single: dict[tuple[str, int], tuple[str, str]] = {}
        for result in results:
            if result["part"] == "upper":
                (task,) = result["tasks"]
                self._single[task, result["seed"]] = marks_of(result, [task])[0]
            else:
                key = result["part"], result["name"], result["num_tasks"]
                self._by_key.setdefault(key, {})[result["seed"]] = result

    @property
    def keys(self) -> list[Key]:
        """All but the upper bound's."""
        return list(self._by_key)

    def first(self, key: Key) -> Result:
        """The result of a key's first seed."""
        return next(iter(self._by_key[key].values()))

    def seeds(self, key: Key, *, bounded: bool = False) -> list[int]:
        """The seeds that a key has. bounded: those that have both bounds of its tasks."""
        found = self._by_key.get(key, {})
        if not bounded:
            return sorted(found)
        lower = self._by_key.get(_lower(key), {})
        return sorted(
            seed
            for seed, r in found.items()
            if seed in lower and all((task, seed) in self._single for task in r["tasks"])
        )

    def accuracy(self, key: Key, seeds: Sequence[int]) -> Estimate:
        """Mean over tasks and seeds."""
        results = [self._by_key[key][seed] for seed in seeds]
        return accuracy([marks_of(result, list(result["tasks"])) for result in results])

    def upper(self, key: Key, seeds: Sequence[int]) -> Estimate:
        """The accuracy of one adapter for each of a key's tasks."""
        return accuracy([[self._single[task, seed] for task in self._by_key[key][seed]["tasks"]] for seed in seeds])

    def recovery(self, key: Key, seeds: Sequence[int]) -> Estimate | None:
        """Recovery over seeds that have both bounds; None where the upper bound is not above the lower one."""
        lower, upper = self.accuracy(_lower(key), seeds), self.upper(key, seeds)
        return recovery(self.accuracy(key, seeds), lower, upper) if upper.value > lower.value else None


def _lower(key: Key) -> Key:
    part, _, number = key
    return part, LOWER, number
