"""The built-in suite: 25 generated tasks with exact answers, for training and trying the system without any data."""

from collections.abc import Sequence

from mtlora.suite.base import Example, Split, draw_distinct, seeded, unknown_task
from mtlora.suite.builtin import business, counting, logic, text, world
from mtlora.suite.builtin.task import GeneratedTask
from mtlora.task import TaskSpec

__all__ = ["BuiltinSuite"]

# The order numbers the tasks of an adapter: append, never reorder.
_TASKS: tuple[GeneratedTask, ...] = logic.TASKS + counting.TASKS + text.TASKS + world.TASKS + business.TASKS

# A task counts as exhausted after this many draws in a row without a new input. The test split holds a tenth of all
# inputs, so less than a thousandth of its inputs are left then.
_MAX_MISSES = 50_000


class BuiltinSuite:
    """Generates examples on demand; a smaller `count` gives a prefix of what a larger one gives."""

    name = "builtin"
    finite = False

    def __init__(self, tasks: Sequence[GeneratedTask] = _TASKS, max_misses: int = _MAX_MISSES) -> None:
        self._tasks = {task.spec.id: task for task in tasks}
        self.tasks: Sequence[TaskSpec] = tuple(task.spec for task in tasks)
        self._max_misses = max_misses

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. Generated tasks are unlimited, so `count` must be a number."""
        if task_id not in self._tasks:
            raise unknown_task(self, task_id)
        rng, generate = seeded(task_id, split, seed), self._tasks[task_id].generate
        drawn = draw_distinct(lambda: generate(rng), task_id, split, count, self._max_misses)
        return [Example(task_id, parts[0], parts[1], parts[2] if len(parts) > 2 else None) for parts in drawn]
