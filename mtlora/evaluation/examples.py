"""The examples that an evaluation scores."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mtlora.errors import MtLoRAError
from mtlora.suite import SPLITS, Example, FolderSuite, Split, Suite
from mtlora.task import TaskSpec

# Default number of examples per task of a generated suite.
_GENERATED_EXAMPLES = 40


class Scored(NamedTuple):
    """Examples to score, and the ids of tasks without any: `lacking` in the adapter, `empty` in the split."""

    examples: list[Example]
    lacking: list[str]
    empty: list[str]


def scored_examples(
    suite: Suite, tasks: Sequence[TaskSpec], adapter: object, *, split: Split | None, count: int | None, seed: int
) -> Scored:
    """`count` examples of each of the suite's tasks: of `split`, else of a folder of texts all, else of the test split.

    count: None for all of a finite suite, 40 of a generated one. tasks: those that can be answered. adapter: where they
    come from, for errors; None without an adapter. Raises MtLoRAError for a task of the suite that the adapter lacks,
    unless the suite generates images, for labels that the adapter's heads lack, and if no task has an example.
    """
    known = {task.id: task for task in tasks}
    asked = [task for task in suite.tasks if task.id in known]
    lacking = [task.id for task in suite.tasks if task.id not in known]
    # Score only the tasks that the adapter has: it may be trained on a part of a generated suite.
    if lacking and (suite.finite or not asked or not asked[0].image):
        raise MtLoRAError(
            f"{adapter}: the adapter has no task {', '.join(lacking)} of suite {suite.name}; "
            f"it has {', '.join(sorted(known))}"
        )
    if adapter is not None:
        _check_labels(suite, asked, known)
    if count is None and not suite.finite:
        count = _GENERATED_EXAMPLES
    found: list[Example] = []
    empty: list[str] = []
    for task in asked:
        if isinstance(suite, FolderSuite) and split is None:
            examples = suite.all_examples(task.id)[:count]
        else:
            examples = suite.examples(task.id, split or "test", count, seed)
        found += examples
        empty += [] if examples else [task.id]
    if not found:
        others = " or ".join(f"--split {each}" for each in SPLITS if each != (split or "test"))
        raise MtLoRAError(f"suite {suite.name}: found no {split or 'test'} examples; allowed: {others}")
    return Scored(found, lacking, empty)


def _check_labels(suite: Suite, asked: Sequence[TaskSpec], known: Mapping[str, TaskSpec]) -> None:
    """Refuse a suite of images with labels that the adapter's heads lack."""
    for task in asked:
        labels = known[task.id].labels or ()
        if task.image and (lacking := [label for label in task.labels or () if label not in labels]):
            raise MtLoRAError(
                f"task {task.id}: suite {suite.name} has labels {', '.join(lacking)}; allowed: the adapter's, "
                f"{', '.join(labels)}"
            )
