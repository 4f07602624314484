"""A task suite: named tasks, each with examples in three disjoint splits."""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from mtlora.errors import MtLoRAError
from mtlora.task import TaskSpec

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# The marker between working and answer in all generated suites: one token of the default backbone, absent from tasks'
# texts.
ANSWER_MARKER = "=>"


class SuiteError(MtLoRAError):
    """A suite that cannot be used. Names the file, the place and the cause."""


@dataclass(frozen=True, slots=True)
class Example:
    """One input of a task and its exact answer.

    `working` is a short derivation that a model may learn to write before the answer; scoring ignores it. `source` says
    where the example was read, for errors. `image`: the encoded image or its file, if the task takes one. `input` is
    then the digest of the image for an image task, and the text beside the image (may be empty) for a text task.
    """

    task_id: str
    input: str
    target: str
    working: str | None = None
    source: str | None = field(default=None, compare=False)
    image: bytes | Path | None = field(default=None, compare=False, repr=False)

    def encoded_image(self) -> bytes:
        """The encoded image. Raises SuiteError for an example without one, and for an unreadable file."""
        if isinstance(self.image, bytes):
            return self.image
        if self.image is None:
            raise SuiteError(f"task {self.task_id}: an example without an image: {self.input[:80]!r}")
        try:
            return self.image.read_bytes()
        except OSError as error:
            raise SuiteError(f"{self.image}: cannot be read: {error.strerror}") from None


class Suite(Protocol):
    """The interface of a suite for trainer, evaluation, demo and load test."""

    name: str
    # Whether the number of examples is limited; generated suites are unlimited.
    finite: bool
    # Tasks in the order of an adapter's bias rows.
    tasks: Sequence[TaskSpec]

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """`count` examples with distinct inputs; the same for the same arguments on every machine.

        `count=None` means all of a finite suite. Splits share no input. Raises SuiteError for an unknown task, and if
        the split has fewer than `count` examples (naming both numbers).
        """
        ...


def unknown_task(suite: Suite, task_id: str) -> SuiteError:
    """The error for a task that a suite lacks."""
    return SuiteError(f"suite {suite.name} has no task {task_id!r}; it has {', '.join(t.id for t in suite.tasks)}")


def seeded(*parts: object) -> random.Random:
    """A random generator for these parts, the same on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def drawn(examples: Iterable[Example], task_id: str, split: Split, count: int | None, seed: int) -> list[Example]:
    """`count` of a finite split's examples, all for None, in an order by hash, which other examples do not change.

    A smaller `count` gives a prefix of what a larger one gives. Raises SuiteError for a wrong split or count.
    """
    check_split(split)

    def key(example: Example) -> bytes:
        return hashlib.sha256(f"{task_id}\0{split}\0{seed}\0{example.input}".encode()).digest()

    found = sorted(examples, key=key)
    if count is not None and not 0 <= count <= len(found):
        raise SuiteError(
            f"task {task_id} has {len(found)} {split} inputs, {count} were asked for; 0 to {len(found)} are allowed"
        )
    return found[:count]


def check_split(split: str) -> None:
    """Raise SuiteError for an unknown split."""
    if split not in SPLITS:
        raise SuiteError(f"no split {split!r}; there are {', '.join(SPLITS)}")


def up_to(suite: Suite, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
    """`count` examples, or all of a finite suite that has fewer; of a mix, `count` of each part.

    Raises SuiteError as `Suite.examples` does.
    """
    try:
        return suite.examples(task_id, split, count, seed)
    except SuiteError:
        if not suite.finite:
            raise
        return suite.examples(task_id, split, None, seed)


def draw_distinct(
    draw: Callable[[], tuple[str, ...]], task_id: str, split: Split, count: int | None, max_misses: int
) -> list[tuple[str, ...]]:
    """`count` draws of a generated task with distinct inputs of one split; the first part of a draw is its input.

    Raises SuiteError for an unknown split, a count of None or below 0, and after `max_misses` draws in a row without a
    new input.
    """
    check_split(split)
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

    It depends on the input alone, so no seed, count or version of a generator can leak one split into another.
    """
    bucket = hashlib.sha256(f"{task_id}\0{text}".encode()).digest()[0]
    return "validation" if bucket < 26 else "test" if bucket < 52 else "train"
