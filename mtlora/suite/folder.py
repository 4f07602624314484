"""A folder of JSON files in the layout of BIG-Bench Hard as a suite: one task a file.

A file with `picture` (see `ImagePreparation`; may be `{}`) is a task of text and image: each of its examples names an
`image`, the path of an image file.
"""

import codecs
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from mtlora.answer import AnswerType
from mtlora.errors import describe
from mtlora.parameters import TaskDefaults
from mtlora.suite.base import Example, Split, SuiteError, check_split, drawn, split_of, unknown_task
from mtlora.task import TASK_ID_PATTERN, TaskSpec, normalise_answer
from mtlora.vision.image_input import ImagePreparation

MAX_TARGET_CHARS = 256
_STOP = "\n"
_WITH_IMAGE = "{image}\n{input}\nAnswer:"
_LAYOUT = '{"examples": [{"input": "...", "target": "..."}, ...]}'


class _Entry(BaseModel):
    input: str
    target: str = Field(max_length=MAX_TARGET_CHARS)
    # The image's path relative to the folder, if the task takes one.
    image: str | None = None

    @field_validator("input", "target")
    @classmethod
    def _has_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("blank; it needs some text")
        return text

    @field_validator("target")
    @classmethod
    def _is_one_line(cls, target: str) -> str:
        if _STOP in target:
            raise ValueError(f"contains the stop string {_STOP!r}; answers are one line")
        return target


class _File(BaseModel):
    examples: list[_Entry] = Field(min_length=1)
    # See TaskSpec.
    defaults: TaskDefaults | None = None
    # What an answer may be: an addition to the published layout.
    answer: AnswerType | None = None
    picture: ImagePreparation | None = None

    @model_validator(mode="after")
    def _targets_are_answers(self) -> "_File":
        for index, entry in enumerate(self.examples) if self.answer else ():
            if self.answer and not self.answer.check(entry.target):
                raise ValueError(f"examples.{index}: target {entry.target[:80]!r} is no answer of the file's type")
        return self

    @model_validator(mode="after")
    def _images_are_there(self) -> "_File":
        for index, entry in enumerate(self.examples):
            if (entry.image is None) != (self.picture is None):
                found = "no image" if entry.image is None else "an image, but the file has no `picture`"
                raise ValueError(f"examples.{index}: found {found}; `picture` and the examples' images go together")
        return self


def has_texts(folder: Path) -> bool:
    """Whether a JSON file directly in a folder has `examples`, well-formed or not."""
    try:
        return any(b'"examples"' in file.read_bytes() for file in folder.iterdir() if file.suffix.lower() == ".json")
    except OSError:
        return False


class FolderSuite:
    """Reads every `*.json` of a folder at once, to find a wrong file before any work starts.

    Ignores other files, and keys that are not in the layout. A repeated input is used once, with its first target.
    Different targets give only a warning, because published files have them.
    """

    finite = True

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        self.name = folder.resolve().name or "folder"
        if not folder.is_dir():
            raise SuiteError(f"{folder}: not a folder; a suite is a folder of JSON files like {_LAYOUT}")
        files: dict[str, Path] = {}
        try:
            found = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".json")
        except OSError as error:
            raise SuiteError(f"{folder}: cannot be listed: {error.strerror}") from None
        for file in found:
            task_id = file.stem.lower()
            if not re.fullmatch(TASK_ID_PATTERN, task_id):
                raise SuiteError(f"{file}: the file name gives task id {task_id!r}; ids must match {TASK_ID_PATTERN}")
            if task_id in files:
                raise SuiteError(f"{file}: task id {task_id!r} is taken by {files[task_id].name}; ids ignore case")
            files[task_id] = file
        if not files:
            raise SuiteError(f"{folder}: no .json file in the folder; a suite needs at least one like {_LAYOUT}")
        self._folder = folder
        read = {task_id: _read_file(files[task_id]) for task_id in sorted(files)}
        self._examples = {task_id: _examples(task_id, files[task_id], found) for task_id, found in read.items()}
        self.tasks: Sequence[TaskSpec] = tuple(
            self._task(task_id, each, files[task_id]) for task_id, each in read.items()
        )

    def _task(self, task_id: str, read: _File, file: Path) -> TaskSpec:
        try:
            return TaskSpec(
                id=task_id,
                description=f"Task {task_id} of {self.name}.",
                stop=(_STOP,),
                **({"picture": read.picture, "template": _WITH_IMAGE} if read.picture else {}),
                max_new_tokens=estimated_tokens([entry.target for entry in read.examples]),
                defaults=read.defaults,
                answer=read.answer,
            )
        except ValidationError as error:
            raise SuiteError(f"{file}: {describe(error)}") from None

    def all_examples(self, task_id: str) -> list[Example]:
        """Every example of the task's file, of all splits, in the file's order, repeated inputs included."""
        if task_id not in self._examples:
            raise unknown_task(self, task_id)
        return list(self._examples[task_id])

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. A smaller `count` gives a prefix of what a larger one gives."""
        check_split(split)
        first: dict[str, Example] = {}
        for example in self.all_examples(task_id):
            first.setdefault(_asked(example, self._folder), example)
        of_split = (e for asked, e in first.items() if split_of(task_id, asked) == split)
        return drawn(of_split, task_id, split, count, seed)


def _asked(example: Example, folder: Path) -> str:
    """The input, with its image's path from the folder where it has one."""
    if not isinstance(example.image, Path):
        return example.input
    return f"{os.path.relpath(example.image, folder)}\n{example.input}"


def _read_file(file: Path) -> _File:
    if not file.is_file():
        raise SuiteError(f"{file}: not a file; every .json of a suite's folder must be one")
    try:
        # Some editors write a byte order mark.
        return _File.model_validate_json(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise SuiteError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise SuiteError(f"{file}: {describe(error)}; the layout is {_LAYOUT}") from None


def _examples(task_id: str, file: Path, read: _File) -> tuple[Example, ...]:
    examples = tuple(
        Example(
            task_id,
            entry.input,
            entry.target,
            source=f"{file}: example {i}",
            image=file.parent / entry.image if entry.image else None,
        )
        for i, entry in enumerate(read.examples)
    )
    seen: dict[str, int] = {}
    for index, example in enumerate(examples):
        kept = examples[seen.setdefault(_asked(example, file.parent), index)]
        if normalise_answer(kept.target) != normalise_answer(example.target):
            warnings.warn(
                f"{file}: example {index} has the input of example {seen[_asked(example, file.parent)]} but target "
                f"{example.target!r} instead of {kept.target!r}; only the first is trained on",
                stacklevel=2,
            )
    return examples


def estimated_tokens(targets: Sequence[str]) -> int:
    """An upper estimate of the longest target's tokens, with room for answers that the folder does not contain.

    An estimate, because no tokenizer is available here: one token per digit or mark, one per byte of other scripts, and
    one per two letters.
    """

    def estimate(target: str) -> int:
        pieces = re.findall(r"[A-Za-z]+|\S", target)
        return sum((len(p) + 1) // 2 if p.isascii() and p.isalpha() else len(p.encode()) for p in pieces)

    return max(map(estimate, targets)) + 8
