"""Real images that installed packages carry, as the suite `packaged-vision`: scikit-learn's digits.

The package's file is read, its code is not imported.
"""

import gzip
import hashlib
import importlib.util
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mtlora.answer import Label
from mtlora.suite.base import Example, Split, SuiteError, drawn, split_of, unknown_task
from mtlora.task import TaskSpec
from mtlora.vision.image_input import ImageInput

_TASK = "handwritten_digits"
_SIDE, _WHITE = 8, 16


def digits_file() -> Path | None:
    """scikit-learn's digits: lines of 64 values from 0 to 16 and the digit; None where the package is not installed."""
    spec = importlib.util.find_spec("sklearn")
    for location in (spec.submodule_search_locations if spec else None) or ():
        if (path := Path(location) / "datasets" / "data" / "digits.csv.gz").is_file():
            return path
    return None


class PackagedSuite:
    """Splits are by content, as in folders."""

    name = "packaged-vision"
    finite = True

    def __init__(self) -> None:
        found = digits_file()
        if found is None:
            raise SuiteError("packaged-vision: no package with images is installed; pip install scikit-learn")
        self._file = found
        self.tasks: Sequence[TaskSpec] = (
            TaskSpec(
                id=_TASK,
                description="The digit, written by hand.",
                answer=Label(labels=tuple("0123456789")),
                # No flips, because a mirrored digit is not a digit.
                image=ImageInput(augment=("crop",)),
            ),
        )

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`."""
        if task_id != _TASK:
            raise unknown_task(self, task_id)
        return drawn((e for e in self._examples if split_of(_TASK, e.input) == split), task_id, split, count, seed)

    @cached_property
    def _examples(self) -> list[Example]:
        rows = np.loadtxt(io.BytesIO(gzip.decompress(self._file.read_bytes())), delimiter=",", dtype=np.int64)
        found: dict[str, Example] = {}
        for row in rows:
            pixels = (255 * row[:-1].reshape(_SIDE, _SIDE) // _WHITE).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            found.setdefault(digest, Example(_TASK, digest, str(row[-1]), source=str(self._file), image=png.getvalue()))
        return list(found.values())
