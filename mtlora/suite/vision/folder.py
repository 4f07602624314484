"""Folders of image files as a suite, in a layout of `layout.py` or by a manifest.

`task.json` in a task's folder, or for all tasks in the suite's, sets `description` and `image` (see `ImageInput`):
`{"image": {"augment": ["crop", "flip"]}}`. `tasks.json` in the suite's folder has such an object by task id.

Without a validation split, a tenth of training, chosen by content, becomes validation. A test image is in no other
split.
"""

import codecs
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from mtlora.answer import Label
from mtlora.errors import describe
from mtlora.suite.base import SPLITS, Example, Split, SuiteError, check_split, drawn, split_of, unknown_task
from mtlora.suite.vision.layout import ImageFile, has_images, list_folders
from mtlora.suite.vision.manifest import MANIFEST, read_manifest
from mtlora.task import TaskSpec
from mtlora.vision.image_input import ImageInput

_SETTINGS = "task.json"
_ALL_SETTINGS = "tasks.json"
# Most classes in a message.
_MOST = 5
_T = TypeVar("_T")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    description: str | None = None
    image: ImageInput = ImageInput()


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds images at any depth, or a manifest of them."""
    return (folder / MANIFEST).is_file() or has_images(folder)


class ImageFolderSuite:
    """Lists all files at once, to find a wrong layout before any work starts; reads a task's when asked for it."""

    finite = True

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        manifest = self.folder / MANIFEST
        self._files = read_manifest(manifest) if manifest.is_file() else list_folders(self.folder)
        settings = _all_settings(self.folder)
        if unknown := sorted(settings.keys() - self._files.keys()):
            raise SuiteError(
                f"{self.folder / _ALL_SETTINGS}: found task {unknown[0]}; allowed: {', '.join(sorted(self._files))}"
            )
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

    def _spec(self, task_id: str, files: Sequence[ImageFile], settings: _Settings) -> TaskSpec:
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


def _divided(task_id: str, files: Sequence[ImageFile]) -> dict[Split, list[Example]]:
    """The distinct images of every split. The same image under two labels, or in two splits, is told."""
    has_validation = any(file.split == "validation" for file in files)
    found: dict[str, tuple[Example, Split]] = {}
    # Read the test split first, because its images are excluded from the others.
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
    trained = {example.target for example, split in found.values() if split == "train"}
    if untrained := sorted({file.label for file in files} - trained):
        more = f" and {len(untrained) - _MOST} more" if len(untrained) > _MOST else ""
        warnings.warn(f"task {task_id}: no training image of class {', '.join(untrained[:_MOST])}{more}", stacklevel=2)
    return {split: [example for example, where in found.values() if where == split] for split in SPLITS}


def _settings(file: Path) -> _Settings:
    return _read(file, TypeAdapter(_Settings)) if file.is_file() else _Settings()


def _all_settings(folder: Path) -> Mapping[str, _Settings]:
    file = folder / _ALL_SETTINGS
    return _read(file, TypeAdapter(dict[str, _Settings])) if file.is_file() else {}


def _read(file: Path, adapter: TypeAdapter[_T]) -> _T:
    try:
        return adapter.validate_json(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise SuiteError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise SuiteError(f"{file}: {describe(error)}") from None
