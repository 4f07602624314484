"""From a folder to the image files of its tasks. A file that is not used gives a warning or an error.

    task/{train,test}/class/*.png    validation beside train and test, if there is one
    task/class/*.png                 split by content
    {train,test}/class/*.png         one task, named as the folder
    class/*.png                      one task, split by content

Names that begin with a dot are ignored, and what systems leave beside files.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mtlora.suite.base import Split, SuiteError
from mtlora.vision.local import SUFFIXES

READ = f"read are {', '.join(SUFFIXES)}: convert images of another format"
LAYOUTS = "task/{train,test}/class/*.png, task/class/*.png, {train,test}/class/*.png, class/*.png"
SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_IGNORED = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}
# Levels of folders that are searched for images in a wrong place.
_DEEPEST = 6
# Most names in a message.
_MOST = 5


@dataclass(frozen=True)
class ImageFile:
    """A file of a suite; split: None where its content decides."""

    path: Path
    label: str
    split: Split | None


@dataclass
class _Folder:
    """A listed folder: its folders, its images, and files that are not images."""

    path: Path
    folders: list[Path] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


@dataclass
class _Unused:
    """What a suite's folder holds beside its images, to be told once."""

    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)

    def tell(self, folder: Path) -> None:
        told = []
        if self.images:
            told.append(
                f"{len(self.images)} images outside any class folder, such as {self.images[0]}; "
                f"the layouts are {LAYOUTS}"
            )
        if self.others:
            told.append(f"{_counted(self.others)}; {READ}")
        if self.empty:
            told.append(f"{len(self.empty)} folders without an image: {_some(self.empty)}")
        if told:
            warnings.warn(f"{folder}: not used: {'. Not used: '.join(told)}", stacklevel=3)


def has_images(folder: Path) -> bool:
    """Whether an image is in the folder, at any depth where a suite could have one."""
    return _an_image_below(folder) is not None


def found_in(folder: Path) -> str:
    """The files at any depth of a folder, counted by suffix."""
    files = [Path(where) / name for where, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    return f"found {_counted(files)}" if files else "found no file"


def list_folders(folder: Path) -> dict[str, list[ImageFile]]:
    """The files of each task. Raises SuiteError for a folder or split whose images fit no layout."""
    root, unused = _list(folder), _Unused()
    below = {path: _list(path) for path in root.folders}
    deeper = any(has_images(child) for each in below.values() for child in each.folders)
    tasks: dict[str, list[ImageFile]] = {}
    if _splits(root, below) or (not deeper and any(each.images for each in below.values())):
        tasks[_task_id(folder)] = _of_task(root, unused)
    else:
        unused.images += root.images
        for path, each in below.items():
            if files := _of_task(each, unused):
                if (task_id := _task_id(path)) in tasks:
                    raise SuiteError(
                        f"{path}: a second folder of task {task_id}; names differ in more than case and marks"
                    )
                tasks[task_id] = files
    if not any(tasks.values()):
        raise SuiteError(f"{folder}: {found_in(folder)}, no image; the layouts are {LAYOUTS}")
    unused.tell(folder)
    return tasks


def _of_task(task: _Folder, unused: _Unused) -> list[ImageFile]:
    """The files of a task's folder; none for a folder without any image."""
    below = {path: _list(path) for path in task.folders}
    # Only images are unused here: settings, licences and tables have their place outside class folders.
    unused.images += task.images
    parts: list[tuple[_Folder, Split | None]] = [(task, None)]
    if splits := _splits(task, below):
        parts = [(below[path], split) for path, split in splits.items()]
        for path in below.keys() - splits.keys():
            if (image := _an_image_below(path)) is not None:
                raise SuiteError(
                    f"{path}: found a folder with images ({image}) beside splits; allowed beside them: "
                    f"{', '.join(SPLIT_NAMES)}"
                )
            unused.empty.append(path)
    files: list[ImageFile] = []
    for part, split in parts:
        found = _of_classes(part, split, unused)
        if split is not None:
            unused.images += part.images
        if not found and (image := _an_image_below(part.path)) is not None:
            raise SuiteError(f"{part.path}: found {image}, and no image in a class folder; the layouts are {LAYOUTS}")
        files += found
    if not files:
        unused.empty.append(task.path)
    return files


def _of_classes(part: _Folder, split: Split | None, unused: _Unused) -> list[ImageFile]:
    found: list[ImageFile] = []
    for path in part.folders:
        each = _list(path)
        for deeper in each.folders:
            if (image := _an_image_below(deeper)) is not None:
                raise SuiteError(
                    f"{path}: found an image below a class folder, {image}; allowed: images in the class folder "
                    f"itself. The layouts are {LAYOUTS}; or name a folder further down as the suite"
                )
        unused.others += each.others
        if not each.images:
            unused.empty.append(path)
        found += [ImageFile(image, path.name, split) for image in each.images]
    return found


def _splits(folder: _Folder, below: Mapping[Path, _Folder]) -> dict[Path, Split]:
    """The folders that are splits. A class may be called `train` too: its folder has no folders, unlike its splits."""
    named = {path: SPLIT_NAMES[path.name.lower()] for path in below if path.name.lower() in SPLIT_NAMES}
    if len(named) < len(below) and not any(below[path].folders for path in named):
        return {}
    for split, count in Counter(named.values()).items():
        if count > 1:
            twice = [path.name for path, each in named.items() if each == split]
            raise SuiteError(f"{folder.path}: found {' and '.join(twice)} for the split {split}; allowed: one of them")
    return named


def _an_image_below(folder: Path, levels: int = _DEEPEST) -> Path | None:
    here = _list(folder)
    if here.images:
        return here.images[0]
    deeper = (_an_image_below(path, levels - 1) for path in here.folders) if levels else ()
    return next((image for image in deeper if image is not None), None)


def _list(folder: Path) -> _Folder:
    """What is in a folder, by name. Raises SuiteError if it cannot be listed."""
    found = _Folder(folder)
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name.lower() in _IGNORED:
                    continue
                path = folder / entry.name
                if entry.is_dir():
                    found.folders.append(path)
                elif path.suffix.lower() in SUFFIXES and entry.is_file():
                    found.images.append(path)
                else:
                    found.others.append(path)
    except OSError as error:
        raise SuiteError(f"{folder}: cannot be listed: {error.strerror}") from None
    return found


def _task_id(folder: Path) -> str:
    task_id = re.sub(r"[^a-z0-9_.\-]+", "-", folder.resolve().name.lower()).strip("-_.")
    if not task_id:
        raise SuiteError(f"{folder}: its name gives no task id: letters and digits are needed")
    return task_id


def _counted(files: Sequence[Path]) -> str:
    kinds = Counter(path.suffix.lower() or "no suffix" for path in files)
    counted = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(_MOST))
    return f"{len(files)} files such as {files[0]} ({counted})"


def _some(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _MOST} more" if len(paths) > _MOST else ""
    return ", ".join(map(str, paths[:_MOST])) + more
