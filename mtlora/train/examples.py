"""The examples that a run trains on and validates with, encoded."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtlora.prompt import PromptEncoder
from mtlora.suite import load_suite
from mtlora.suite.base import Example, Split, Suite, SuiteError, up_to
from mtlora.suite.mix import MixedSuite, count_for
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingConfig
from mtlora.train.data import Encoded, encode

if TYPE_CHECKING:
    from mtlora.model.soft_tokens import ImageReader


class RunExamples:
    """`train` and `validation`, encoded, and in `skipped` how many of each task are too long to train on.

    evaluated: the examples of `validation`. They are short enough that the task's longest answer fits into `room`, the
    backbone's positions in tokens. Raises SuiteError for an example that the configuration does not allow, and for a
    task without a training example.
    """

    def __init__(
        self,
        config: TrainingConfig,
        suite: Suite,
        tasks: Sequence[TaskSpec],
        prompts: PromptEncoder,
        room: int,
        reader: "ImageReader | None" = None,
    ) -> None:
        self._config = config
        self._suite = suite
        self._tasks = tasks
        self._prompts = prompts
        self._reader = reader
        self.skipped: Counter[str] = Counter()
        # Validation leaves out too long examples as well, but only training's are reported.
        self.train = [encoded for _, encoded in self._encode("train", self.skipped)]
        held_out = self._encode("validation", Counter(), room)
        self.validation = [encoded for _, encoded in held_out]
        self.evaluated = [example for example, _ in held_out]
        self._check_tasks_have_examples()

    def tokens_by_task(self, batches: Sequence[Sequence[int]]) -> dict[str, int]:
        """Tokens of prompts and answers in `batches` of training examples, without padding."""
        tokens = dict.fromkeys((task.id for task in self._tasks), 0)
        for example in (self.train[i] for batch in batches for i in batch):
            tokens[self._tasks[example.task_index].id] += len(example)
        return tokens

    def _encode(self, split: Split, skipped: Counter[str], room: float = math.inf) -> list[tuple[Example, Encoded]]:
        config = self._config
        chosen = wanted_examples(config, self._suite, self._tasks, split)
        return encode(
            self._prompts, self._tasks, chosen, max_length=config.max_length, room=room,
            skipped=skipped if config.longer_examples == "skip" else None, reader=self._reader,
        )  # fmt: skip

    def _check_tasks_have_examples(self) -> None:
        config, suite = self._config, self._suite.name
        trained = {example.task_index for example in self.train}
        for index, task in enumerate(self._tasks):
            if index in trained or count_for(config.examples_per_task, task.id) == 0:
                continue
            skipped = self.skipped[task.id]
            cause = f"all {skipped} are longer than max_length {config.max_length}" if skipped else "none found"
            raise SuiteError(f"suite {suite}: task {task.id} has no training example ({cause})")
        if not self.train:
            raise SuiteError(f"suite {suite}: no training examples; examples_per_task asks for none")


def load_run_suite(config: TrainingConfig) -> Suite:
    """The configuration's suite, without unreadable images where it says so. Raises SuiteError."""
    suite = load_suite(config.suite)
    if config.unreadable_images == "error":
        return suite
    # Import here: images need packages that text suites do not need.
    from mtlora.suite.vision.pixels import readable

    return readable(suite)


def wanted_examples(config: TrainingConfig, suite: Suite, tasks: Sequence[TaskSpec], split: Split) -> list[Example]:
    """The split's examples as the configuration asks for them, task by task; all of a task that has fewer."""
    found: list[Example] = []
    fewer = []
    for task in tasks:
        count = count_for(config.examples_per_task, task.id) if split == "train" else config.validation_per_task
        examples = up_to(suite, task.id, split, count, config.seed) if count != 0 else []
        if count is not None and len(examples) < count:
            fewer.append(f"{task.id} ({len(examples)})")
        found += examples
    # A mix counts for each of its parts, so less than the number is no surprise there.
    if fewer and split == "train" and not isinstance(suite, MixedSuite):
        warnings.warn(
            f"suite {suite.name}: fewer train examples than examples_per_task asks for, so all are used: "
            f"{', '.join(fewer)}",
            stacklevel=2,
        )
    return found


def chosen_tasks(suite: Suite, chosen: Sequence[str] | None) -> list[TaskSpec]:
    """The suite's tasks of these ids, in this order; None means all. Raises SuiteError."""
    if chosen is None:
        return list(suite.tasks)
    by_id = {task.id: task for task in suite.tasks}
    if unknown := [task_id for task_id in chosen if task_id not in by_id]:
        raise SuiteError(f"suite {suite.name} has no task {', '.join(unknown)}; it has {', '.join(by_id)}")
    if twice := [task_id for task_id, count in Counter(chosen).items() if count > 1]:
        raise SuiteError(f"tasks: each task is named once; {', '.join(twice)} more than once")
    if not chosen:
        raise SuiteError("tasks: at least one task is needed; null means all of the suite")
    return [by_id[task_id] for task_id in chosen]
