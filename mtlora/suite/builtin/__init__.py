"""The built-in suite: 25 generated tasks with exact answers, for training and trying the system without any data."""

import hashlib
import random
from collections.abc import Sequence

from mtlora.suite.base import Example, Split, SuiteError, draw_distinct
from mtlora.suite.builtin import business, counting, logic, text, world
from mtlora.suite.builtin.task import GeneratedTask
from mtlora.task import TaskSpec

__all__ = ["BuiltinSuite", "builtin_suite"]

# The order numbers the tasks of an adapter: append, never reorder.
_TASKS: tuple[GeneratedTask, ...] = logic.TASKS + counting.TASKS + text.TASKS + world.TASKS + business.TASKS

# A task counts as exhausted after this many draws in a row without a new input. The test split holds a tenth of all
# inputs, so less than a thousandth of its inputs are left then.
_MAX_MISSES = 50_000


class BuiltinSuite:
    """Generates examples on demand; a smaller `count` gives a prefix of what a larger one gives."""

    def __init__(self, tasks: Sequence[GeneratedTask] = _TASKS, max_misses: int = _MAX_MISSES) -> None:
        self._tasks = {task.spec.id: task for task in tasks}
        self._max_misses = max_misses

    @property
    def name(self) -> str:
        return "builtin"

    @property
    def finite(self) -> bool:
        return False

    @property
    def tasks(self) -> Sequence[TaskSpec]:
        return tuple(task.spec for task in self._tasks.values())

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. Generated tasks have no end, so `count` must be a number here."""
        if task_id not in self._tasks:
            raise SuiteError(f"suite builtin has no task {task_id!r}; it has {', '.join(self._tasks)}")
        digest = hashlib.sha256(f"{task_id}\0{split}\0{seed}".encode()).digest()
        rng = random.Random(int.from_bytes(digest, "big"))
        generate = self._tasks[task_id].generate
        drawn = draw_distinct(lambda: generate(rng), task_id, split, count, self._max_misses)
        return [Example(task_id, *parts) for parts in drawn]


def builtin_suite() -> BuiltinSuite:
    """The built-in suite."""
    return BuiltinSuite()
