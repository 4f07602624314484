"""The suite `builtin-vision`: generated pictures with exact labels."""

import hashlib
import io
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mtlora.answer import Label
from mtlora.suite.base import Example, Split, SuiteError, check_split, seeded, unknown_task
from mtlora.suite.vision import figures, readings, signs, surfaces
from mtlora.suite.vision.canvas import SIZE, PictureTask
from mtlora.task import TaskSpec
from mtlora.vision.image_input import ImageInput

__all__ = ["VisionSuite"]

# The order numbers the tasks of an adapter: append, never reorder.
_TASKS: tuple[PictureTask, ...] = figures.TASKS + readings.TASKS + signs.TASKS + surfaces.TASKS


class VisionSuite:
    """Draws pictures on demand; a smaller `count` gives a prefix of what a larger one gives."""

    name = "builtin-vision"
    finite = False

    def __init__(self) -> None:
        self._tasks = {task.id: task for task in _TASKS}
        self.tasks: Sequence[TaskSpec] = tuple(map(_spec, _TASKS))

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. Generated tasks have no end, so `count` must be a number here.

        Labels come in random order, each as often as the others up to one. Every picture has its own noise, so
        no two are the same, in a split or across splits.
        """
        if task_id not in self._tasks:
            raise unknown_task(self, task_id)
        check_split(split)
        if count is None or count < 0:
            raise SuiteError(f"count of task {task_id} is {count}; generated tasks need one >= 0")
        rng, task = seeded(task_id, split, seed), self._tasks[task_id]
        found: list[Example] = []
        while len(found) < count:
            for label in rng.sample(task.labels, len(task.labels)):
                found.append(_example(task, rng, label, split))
        return found[:count]


def _example(task: PictureTask, rng: random.Random, label: str, split: Split) -> Example:
    pixels = task.draw(rng, label, split)
    return Example(task.id, hashlib.sha256(pixels.tobytes()).hexdigest(), label, image=_png(pixels))


def _png(pixels_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _spec(task: PictureTask) -> TaskSpec:
    return TaskSpec(
        id=task.id,
        description=task.description,
        answer=Label(labels=task.labels),
        # No augmentation: training draws new pictures anyway.
        image=ImageInput(size=SIZE, augment=()),
    )
