"""The pixels of a suite's examples, and which of its files cannot be read."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mtlora.suite.base import Example, SuiteError
from mtlora.vision.images import ImageError
from mtlora.vision.local import decode_local

# Each may hold an image of gigabytes.
_MOST_THREADS = 4


def read_pixels(example: Example, size: int | None = None) -> NDArray[np.uint8]:
    """An example's image, [H, W, 3]; size: see `decode`. Raises ImageError or SuiteError, naming the example."""
    try:
        return decode_local(example.encoded_image(), size=size)
    except ImageError as error:
        raise ImageError(f"{example.source or f'task {example.task_id}'}: {error}") from None


def check_readable(examples: Iterable[tuple[Example, int]]) -> None:
    """Decode every file of (example, size of its input); raises SuiteError with all that cannot be read."""
    # Drawn images have no file.
    files = {example.image: (example, size) for example, size in examples if isinstance(example.image, Path)}

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
        found = []
        for message in pool.map(failure, files.values()):
            bar.update()
            found += [message] if message else []
    if found:
        told = "; ".join(found)
        raise SuiteError(f"{len(found)} of {len(files)} images cannot be read; repair or remove them: {told}")
