"""Generated inputs in the form of BIG-Bench Hard's algorithmic tasks; solvers give answer and working."""

from collections.abc import Sequence
from dataclasses import replace

from mtlora.suite import answers
from mtlora.suite.base import ANSWER_MARKER, Example, Split, draw_distinct, seeded, unknown_task
from mtlora.suite.bbh_tasks import BBH_TASKS, BBHTask, UnsolvedError
from mtlora.task import TaskSpec

# A task counts as exhausted after this many draws in a row without a new input.
_MAX_MISSES = 20_000


def bbh_spec(task: BBHTask) -> TaskSpec:
    """The spec of a solvable task, for generated inputs and for a folder's."""
    return TaskSpec(
        id=task.id,
        description=task.description,
        max_new_tokens=task.max_new_tokens,
        answer_marker=ANSWER_MARKER,
        answer=answers.BBH[task.id],
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
    """BIG-Bench Hard's algorithmic tasks. Splits go by the input's hash, as a folder's do, so the two share no input
    across splits."""

    name = "bbh-generated"
    finite = False

    def __init__(self) -> None:
        self.tasks: Sequence[TaskSpec] = tuple(map(bbh_spec, BBH_TASKS.values()))

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. Generated tasks are unlimited, so `count` must be a number."""
        if (task := BBH_TASKS.get(task_id)) is None:
            raise unknown_task(self, task_id)
        rng = seeded(self.name, task_id, split, seed)
        examples = []
        for (text,) in draw_distinct(lambda: (task.generate(rng),), task_id, split, count, _MAX_MISSES):
            solution = task.solve(text)
            examples.append(Example(task_id, text, solution.answer, solution.working or None))
        return examples
