"""The pixels of a suite's examples, and which of its files cannot be read."""

import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mtlora.suite.base import SPLITS, Example, Split, Suite, SuiteError, drawn
from mtlora.vision.images import ImageError
from mtlora.vision.local import decode_local

# Each may hold an image of gigabytes.
_MOST_THREADS = 4
# Most files in a message.
_MOST = 20


def read_pixels(example: Example, size: int | None = None) -> NDArray[np.uint8]:
    """An example's image, [H, W, 3]; size: see `decode`. Raises ImageError or SuiteError, naming the example."""
    try:
        return decode_local(example.encoded_image(), size=size)
    except ImageError as error:
        raise ImageError(f"{example.source or f'task {example.task_id}'}: {error}") from None


def check_readable(examples: Iterable[tuple[Example, int]]) -> None:
    """Decode every file of (example, size of its input); raises SuiteError with the first 20 that cannot be read."""
    files = _files(examples)
    if found := list(_unreadable(files).values()):
        more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise SuiteError(
            f"{len(found)} of {len(files)} images cannot be read; repair or remove them, or set unreadable_images to "
            f"skip: {'; '.join(found[:_MOST])}{more}"
        )


def readable(suite: Suite) -> Suite:
    """The suite without image files that cannot be read; a warning says how many of which classes. Reads every file."""
    sizes = {task.id: task.image.size for task in suite.tasks if task.image}
    if not sizes or not suite.finite:
        return suite
    files = _files(
        (example, size)
        for task_id, size in sizes.items()
        for split in SPLITS
        for example in suite.examples(task_id, split, None)
    )
    found = _unreadable(files).keys()
    classes = Counter(f"{files[path][0].task_id}/{files[path][0].target}" for path in found)
    if classes:
        told = ", ".join(f"{count} of {name}" for name, count in classes.most_common())
        warnings.warn(f"suite {suite.name}: {len(found)} images left out, which cannot be read: {told}", stacklevel=2)
    return _Readable(suite, found)


class _Readable:
    """A finite suite without the examples of some files."""

    finite = True

    def __init__(self, suite: Suite, without: Collection[Path]) -> None:
        self.name, self.tasks = suite.name, suite.tasks
        self._suite, self._without = suite, without

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. A smaller `count` gives a prefix of what a larger one gives."""
        found = (e for e in self._suite.examples(task_id, split, None, seed) if e.image not in self._without)
        return drawn(found, task_id, split, count, seed)


def _files(examples: Iterable[tuple[Example, int]]) -> dict[Path, tuple[Example, int]]:
    """Examples that are files, with the size of their input. Drawn images have no file."""
    return {example.image: (example, size) for example, size in examples if isinstance(example.image, Path)}


def _unreadable(files: Mapping[Path, tuple[Example, int]]) -> dict[Path, str]:
    """Decode every file; the errors of those that cannot be read."""

    def failure(item: tuple[Example, int]) -> str | None:
        try:
            read_pixels(*item)
        except (ImageError, SuiteError) as error:
            return str(error)
        return None

    with (
        ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool,
        tqdm(total=len(files), desc="check images", unit="image", leave=False, disable=None) as bar,
    ):
        found: dict[Path, str] = {}
        for path, message in zip(files, pool.map(failure, files.values()), strict=True):
            bar.update()
            if message:
                found[path] = message
    return found
