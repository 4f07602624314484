"""Generated inputs in the form of BIG-Bench Hard's algorithmic tasks, worked out by their solvers."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from mtlora.suite.base import ANSWER_MARKER, Example, Split, SuiteError, draw_distinct
from mtlora.suite.bbh_tasks import BBH_TASKS, BBHTask, UnsolvedError
from mtlora.task import TaskSpec

# A task counts as exhausted after this many draws in a row without a new input.
_MAX_MISSES = 20_000


def bbh_spec(task: BBHTask) -> TaskSpec:
    """The spec of a solvable task, for generated inputs and for a folder's."""
    return TaskSpec(
        id=task.id,
        description=task.description,
        template="{input}\nAnswer:",
        stop=("\n",),
        max_new_tokens=task.max_new_tokens,
        answer_marker=ANSWER_MARKER,
    )


def with_working(example: Example) -> Example:
    """The example with its solver's working, if a solver gives exactly the target; else the example unchanged."""
    task = BBH_TASKS.get(example.task_id)
    if task is None:
        return example
    try:
        solution = task.solve(example.input)
    except UnsolvedError:
        return example
    if solution.answer != example.target:
        return example
    return replace(example, working=solution.working or None)


class GeneratedBBHSuite:
    """The tasks that have a generator. Splits go by the input's hash, as a folder's do, so the two share no input
    across splits."""

    def __init__(self) -> None:
        self._tasks = {task_id: task for task_id, task in BBH_TASKS.items() if task.generate is not None}

    @property
    def name(self) -> str:
        return "bbh-generated"

    @property
    def finite(self) -> bool:
        return False

    @property
    def tasks(self) -> Sequence[TaskSpec]:
        return tuple(bbh_spec(task) for task in self._tasks.values())

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. Generated tasks have no end, so `count` must be a number here."""
        task = self._tasks.get(task_id)
        if task is None or task.generate is None:
            raise SuiteError(f"suite {self.name} has no task {task_id!r}; it has {', '.join(self._tasks)}")
        digest = hashlib.sha256(f"{self.name}\0{task_id}\0{split}\0{seed}".encode()).digest()
        rng, generate = random.Random(int.from_bytes(digest, "big")), task.generate
        examples = []
        for (text,) in draw_distinct(lambda: (generate(rng),), task_id, split, count, _MAX_MISSES):
            solution = task.solve(text)
            examples.append(Example(task_id, text, solution.answer, solution.working or None))
        return examples
