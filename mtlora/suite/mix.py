"""A suite made of parts; each part sets its number of training examples per task."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from mtlora.suite.answers import joined
from mtlora.suite.base import SPLITS, Example, Split, Suite, SuiteError, check_split, unknown_task, up_to
from mtlora.suite.bbh_generated import bbh_spec, with_working
from mtlora.suite.bbh_tasks import BBH_TASKS
from mtlora.task import TaskSpec

# A number for every task, numbers by task id ("*" for the rest), or null for all examples of a finite suite.
Count = Annotated[int, Field(ge=0)]
ExampleCounts = Count | dict[str, Count | None] | None


def count_for(counts: int | Mapping[str, int | None] | None, task_id: str) -> int | None:
    """How many examples of a task are wanted. A task that a mapping does not name gets none, unless it has "*"."""
    return counts.get(task_id, counts.get("*", 0)) if isinstance(counts, Mapping) else counts


class SuitePart(BaseModel):
    """One part of a mix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str = Field(description='"builtin", "bbh-generated", "documents", or a folder in BIG-Bench-Hard layout')
    examples_per_task: ExampleCounts = Field(
        None, description="training examples per task: a number, null for all, or numbers by task id, * for the rest"
    )
    joins: tuple[str, ...] = Field((), description="tasks to join with an earlier part's tasks of the same id")
    train_only: bool = Field(False, description="do not validate with this part")
    worked: bool = Field(False, description="give a folder's examples the working of their solvers")


class MixedSuite:
    """Tasks of several suites in one table.

    If several parts have a task, the later ones must name it in `joins`. The task keeps the first part's template and
    description; answer marker, length and set of answers cover all parts.
    """

    def __init__(self, parts: Sequence[tuple[SuitePart, Suite]]) -> None:
        if not parts:
            raise SuiteError("a mix of suites needs at least one part")
        self._parts = [(part, suite, {task.id for task in suite.tasks}) for part, suite in parts]
        tasks: dict[str, TaskSpec] = {}
        for part, suite, ids in self._parts:
            counts = part.examples_per_task
            named = set(counts) - {"*"} if isinstance(counts, Mapping) else set()
            for field, unknown in (("joins", set(part.joins) - ids), ("examples_per_task", named - ids)):
                if unknown:
                    raise SuiteError(f"{field} of part {part.suite}: it has no task {', '.join(sorted(unknown))}")
            for task in suite.tasks:
                spec = bbh_spec(BBH_TASKS[task.id]) if part.worked and task.id in BBH_TASKS else task
                if task.id not in tasks:
                    if task.id in part.joins:
                        raise SuiteError(f"part {part.suite}: joins names {task.id}, which no earlier part has")
                    tasks[task.id] = spec
                elif task.id in part.joins:
                    tasks[task.id] = _joined(tasks[task.id], spec, part)
                else:
                    raise SuiteError(
                        f"part {part.suite}: task {task.id} is in an earlier part already; "
                        "name it in this part's joins where the two are one task"
                    )
        self.name = " + ".join(suite.name for _, suite in parts)
        self.finite = all(suite.finite for _, suite in parts)
        self.tasks: Sequence[TaskSpec] = tuple(tasks.values())

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """Training: each part's own number, at most `count`. Other splits: up to `count` of each part.

        An input that occurs in two parts is used once, from the first part. It is left out if a finite part reserves it
        for validation or test while this split is less strict. Raises SuiteError for an unknown task.
        """
        parts = [(part, suite) for part, suite, ids in self._parts if task_id in ids]
        if not parts:
            raise unknown_task(self, task_id)
        check_split(split)
        pictures = any(task.id == task_id and task.picture for task in self.tasks)

        def asked(example: Example) -> object:
            """The key of duplicates: the input and, if the task takes text and image, the image."""
            return (example.input, example.image) if pictures else example.input

        held_out = {
            asked(example)
            for part, suite in parts
            if len(parts) > 1 and suite.finite and not part.train_only
            for stricter in SPLITS[SPLITS.index(split) + 1 :]
            for example in suite.examples(task_id, stricter, None)
        }
        found: dict[object, Example] = {}
        for part, suite in parts:
            if split != "train" and part.train_only:
                continue
            wanted = count_for(part.examples_per_task, task_id) if split == "train" else count
            if count is not None:
                wanted = count if wanted is None else min(wanted, count)
            for example in up_to(suite, task_id, split, wanted, seed):
                if asked(example) not in held_out:
                    found.setdefault(asked(example), with_working(example) if part.worked else example)
        return list(found.values())


def _joined(first: TaskSpec, second: TaskSpec, part: SuitePart) -> TaskSpec:
    if first.stop != second.stop:
        raise SuiteError(
            f"part {part.suite}: task {first.id} stops at {second.stop}, the earlier part's at {first.stop}"
        )
    markers = {task.answer_marker for task in (first, second)} - {None}
    if len(markers) > 1:
        raise SuiteError(f"part {part.suite}: task {first.id} has other answer markers than the earlier part's")
    changed: dict[str, Any] = {
        "max_new_tokens": max(first.max_new_tokens, second.max_new_tokens),
        "answer_marker": next(iter(markers), None),
        "allowed_answers": None,
        "answer": joined([first.answer_type, second.answer_type]),
    }
    return TaskSpec.model_validate({**first.model_dump(), **changed})
