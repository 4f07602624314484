"""A task suite: named tasks, each with examples in three disjoint splits."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mtlora.errors import MtLoRAError
from mtlora.task import TaskSpec

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# What parts working from answer, in every suite here: one token of the default backbone, and in no task's text.
ANSWER_MARKER = "=>"


class SuiteError(MtLoRAError):
    """A suite that cannot be used: names the file, the place and the cause."""


@dataclass(frozen=True, slots=True)
class Example:
    """One input of a task and its exact answer.

    `working` is a short derivation of the answer that a model may be trained to write before it; scoring ignores it.
    `source` says where it was read, for errors.
    """

    task_id: str
    input: str
    target: str
    working: str | None = None
    source: str | None = field(default=None, compare=False)


class Suite(Protocol):
    """What trainer, evaluation, demo and load test ask of any suite."""

    @property
    def name(self) -> str: ...

    @property
    def finite(self) -> bool:
        """Whether a task has so many examples and no more; a generator has no end."""
        ...

    @property
    def tasks(self) -> Sequence[TaskSpec]:
        """The tasks, in the order in which an adapter numbers them."""
        ...

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """`count` examples with distinct inputs; the same for the same arguments on every machine.

        `count=None` means all there are, for suites that are finite. Splits share no input. Raises SuiteError where
        the task is unknown or the split holds fewer than `count` (naming both numbers).
        """
        ...


def up_to(suite: Suite, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
    """`count` examples, or all there are of a finite suite that has fewer. Raises SuiteError as `Suite.examples`."""
    if suite.finite:
        return suite.examples(task_id, split, None, seed)[:count]
    return suite.examples(task_id, split, count, seed)


def draw_distinct(
    draw: Callable[[], tuple[str, ...]], task_id: str, split: Split, count: int | None, max_misses: int
) -> list[tuple[str, ...]]:
    """`count` draws of a generated task whose inputs, their first parts, are distinct and of one split.

    Raises SuiteError for an unknown split, for a count that is no number, and after `max_misses` draws in a row that
    bring nothing new.
    """
    if split not in SPLITS:
        raise SuiteError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if count is None or count < 0:
        raise SuiteError(f"count of task {task_id} is {count}; generated tasks need one >= 0")
    drawn: dict[str, tuple[str, ...]] = {}
    misses = 0
    while len(drawn) < count:
        parts = draw()
        if parts[0] not in drawn and split_of(task_id, parts[0]) == split:
            drawn[parts[0]] = parts
            misses = 0
            continue
        misses += 1
        if misses >= max_misses:
            raise SuiteError(
                f"task {task_id} has only {len(drawn)} distinct {split} inputs, {count} were asked for "
                f"({misses} draws in a row brought no new one)"
            )
    return list(drawn.values())


def split_of(task_id: str, text: str) -> Split:
    """The split an input belongs to, by hash: 80 % train, 10 % validation, 10 % test.

    A function of the input alone, so no seed, count or version of a generator can leak one split into another.
    """
    bucket = hashlib.sha256(f"{task_id}\0{text}".encode()).digest()[0]
    return "validation" if bucket < 26 else "test" if bucket < 52 else "train"
