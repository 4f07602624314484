"""A manifest of images: `manifest.jsonl`, lines of

    {"task": "leaves", "image": "files/1.png", "label": "oak", "split": "train"}

with `image` by its path from the manifest; without `split`, the file's content decides.
"""

import codecs
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtlora.errors import describe
from mtlora.suite.base import Split, SuiteError
from mtlora.suite.vision.layout import ImageFile
from mtlora.task import TaskId

MANIFEST = "manifest.jsonl"


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    task: TaskId
    image: str = Field(min_length=1)
    label: str = Field(min_length=1)
    split: Split | None = None


def read_manifest(file: Path) -> dict[str, list[ImageFile]]:
    """The files of each task. Raises SuiteError naming the line."""
    tasks: dict[str, list[ImageFile]] = {}
    try:
        # Labels may hold marks that `splitlines` splits at; editors may write a byte order mark.
        lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise SuiteError(f"{file}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SuiteError(
                f"{file}: line {number}: found bytes that are not UTF-8 ({error}); allowed: UTF-8"
            ) from None
        try:
            entry = _Line.model_validate_json(text)
        except ValidationError as error:
            raise SuiteError(f"{file}: line {number}: {describe(error)}") from None
        path = file.parent / entry.image
        # `Path.is_file` raises for a name too long.
        if not os.path.isfile(path):
            raise SuiteError(f"{file}: line {number}: image: no file {path}")
        tasks.setdefault(entry.task, []).append(ImageFile(path, entry.label, entry.split))
    if not tasks:
        raise SuiteError(f"{file}: found no line; allowed: lines of task, image, label and split")
    return tasks
