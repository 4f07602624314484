"""Folders of image files as a suite.

    task/{train,test}/class/*.png    or jpg, jpeg, webp; validation beside train and test, if there is one
    task/class/*.png                 split by content
    {train,test}/class/*.png         one task, named as the folder
    manifest.jsonl                   lines of {"task": ..., "image": file, "label": ..., "split": "train" or "test"}

`task.json` in a task's folder, or `tasks.json` beside the manifest with such an object for each task, sets
`description` and `image` (see `ImageInput`): `{"image": {"augment": ["crop", "flip"]}}`.

Where there is no validation split, a tenth of training, by content, is it. An image of the test split is in no other.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mtlora.answer import Label
from mtlora.errors import describe
from mtlora.suite.base import SPLITS, Example, Split, SuiteError, check_split, drawn, split_of, unknown_task
from mtlora.task import TaskId, TaskSpec
from mtlora.vision.image_input import ImageInput

MANIFEST = "manifest.jsonl"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SETTINGS = "task.json"
_ALL_SETTINGS = "tasks.json"
_LAYOUT = f"task/{{train,test}}/class/*.png, task/class/*.png or {MANIFEST}"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    description: str | None = None
    image: ImageInput = ImageInput()


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    task: TaskId
    image: str = Field(min_length=1)
    label: str = Field(min_length=1)
    split: Split | None = None


@dataclass(frozen=True)
class _File:
    path: Path
    label: str
    split: Split | None


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds a suite of images rather than one of text."""
    if (folder / MANIFEST).is_file():
        return True
    levels = [folder.glob(f"{'*/' * depth}*") for depth in (2, 3)]
    return any(path.suffix.lower() in _SUFFIXES for level in levels for path in level)


class ImageFolderSuite:
    """Lists all files at once, to find a wrong layout before any work starts; reads a task's when asked for it."""

    finite = True

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        manifest = self.folder / MANIFEST
        self._files = _manifest(manifest) if manifest.is_file() else _folders(self.folder)
        if not self._files:
            raise SuiteError(f"{folder}: no image in it; the layout is {_LAYOUT}")
        settings = _all_settings(self.folder) if manifest.is_file() else {}
        specs = []
        for task_id, files in sorted(self._files.items()):
            own = settings.get(task_id) or _settings(self._settings_file(task_id))
            specs.append(self._spec(task_id, files, own))
        self.tasks: Sequence[TaskSpec] = tuple(specs)
        self._split: dict[str, dict[Split, list[Example]]] = {}

    def _settings_file(self, task_id: str) -> Path:
        path = next(file.path for file in self._files[task_id])
        for folder in path.parents:
            if (folder / _SETTINGS).is_file() or folder == self.folder:
                return folder / _SETTINGS
        return self.folder / _SETTINGS

    def _spec(self, task_id: str, files: Sequence[_File], settings: _Settings) -> TaskSpec:
        try:
            labels = tuple(sorted({file.label for file in files}))
            return TaskSpec(
                id=task_id,
                description=settings.description or f"Images of {self.name}: {task_id}.",
                answer=Label(labels=labels),
                image=settings.image,
            )
        except ValidationError as error:
            raise SuiteError(f"{self.folder}: task {task_id}: {describe(error)}") from None

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. A smaller `count` gives a prefix of what a larger one gives."""
        if task_id not in self._files:
            raise unknown_task(self, task_id)
        check_split(split)
        if task_id not in self._split:
            self._split[task_id] = _divided(task_id, self._files[task_id])
        return drawn(self._split[task_id][split], task_id, split, count, seed)

    def all_examples(self, task_id: str) -> list[Example]:
        """Every distinct image of a task."""
        return [example for split in SPLITS for example in self.examples(task_id, split, None)]


def _divided(task_id: str, files: Sequence[_File]) -> dict[Split, list[Example]]:
    """The distinct images of every split. The same image under two labels, or in two splits, is told."""
    has_validation = any(file.split == "validation" for file in files)
    found: dict[str, tuple[Example, Split]] = {}
    # Test first: what it holds is in no other split.
    order = {"test": 0, "validation": 1, "train": 2, None: 3}
    for file in sorted(files, key=lambda file: (order[file.split], file.path)):
        try:
            digest = hashlib.sha256(file.path.read_bytes()).hexdigest()
        except OSError as error:
            raise SuiteError(f"{file.path}: cannot be read: {error.strerror}") from None
        split = file.split
        if split is None or (split == "train" and not has_validation):
            by_content = split_of(task_id, digest)
            split = by_content if split is None else "validation" if by_content == "validation" else "train"
        example = Example(task_id, digest, file.label, source=str(file.path), image=file.path)
        first, where = found.setdefault(digest, (example, split))
        if first.target != file.label or where != split:
            warnings.warn(
                f"{file.path}: the same image as {first.source} ({where}, {first.target}); only that one is used",
                stacklevel=2,
            )
    return {split: [example for example, where in found.values() if where == split] for split in SPLITS}


def _folders(folder: Path) -> dict[str, list[_File]]:
    if any((folder / split).is_dir() for split in SPLITS):
        return {_task_id(folder.resolve().name, folder): list(_of_task(folder))}
    tasks: dict[str, list[_File]] = {}
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        if files := list(_of_task(child)):
            task_id = _task_id(child.name, child)
            if task_id in tasks:
                raise SuiteError(
                    f"{child}: a second folder of task {task_id}; names differ in more than case and marks"
                )
            tasks[task_id] = files
    return tasks


def _of_task(folder: Path) -> Iterator[_File]:
    parts: list[tuple[Path, Split | None]] = [(folder / split, split) for split in SPLITS if (folder / split).is_dir()]
    for part, split in parts or [(folder, None)]:
        for label in sorted(path for path in part.iterdir() if path.is_dir()):
            for path in sorted(label.iterdir()):
                if path.suffix.lower() in _SUFFIXES and path.is_file():
                    yield _File(path, label.name, split)


def _task_id(name: str, folder: Path) -> str:
    task_id = re.sub(r"[^a-z0-9_.\-]+", "-", name.lower()).strip("-_.")
    if not task_id:
        raise SuiteError(f"{folder}: its name gives no task id: letters and digits are needed")
    return task_id


def _manifest(file: Path) -> dict[str, list[_File]]:
    tasks: dict[str, list[_File]] = {}
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = _Line.model_validate_json(line)
        except ValidationError as error:
            raise SuiteError(f"{file}: line {number}: {describe(error)}") from None
        path = file.parent / entry.image
        if not path.is_file():
            raise SuiteError(f"{file}: line {number}: image: no file {path}")
        tasks.setdefault(entry.task, []).append(_File(path, entry.label, entry.split))
    return tasks


def _settings(file: Path) -> _Settings:
    try:
        return _Settings.model_validate_json(file.read_bytes()) if file.is_file() else _Settings()
    except ValidationError as error:
        raise SuiteError(f"{file}: {describe(error)}") from None


def _all_settings(folder: Path) -> Mapping[str, _Settings]:
    file = folder / _ALL_SETTINGS
    if not file.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, _Settings]).validate_python(json.loads(file.read_bytes()))
    except ValidationError as error:
        raise SuiteError(f"{file}: {describe(error)}") from None
    except ValueError as error:
        raise SuiteError(f"{file}: {error}") from None
