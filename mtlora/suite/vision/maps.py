"""The same pictures under label maps that contradict each other: `vision-maps-N`, for N maps."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

from mtlora.suite.base import Example, Split, SuiteError, seeded, unknown_task
from mtlora.suite.vision.builtin import VisionSuite
from mtlora.task import TaskSpec

PREFIX = "vision-maps-"
_BASE = "shapes"
_MOST = 256


class LabelMapSuite:
    """N tasks that give the pictures of one task its labels in N orders; the first keeps them as they are."""

    finite = False

    def __init__(self, name: str) -> None:
        number = name.removeprefix(PREFIX)
        if not number.isascii() or not number.isdecimal() or not 2 <= int(number) <= _MOST:
            raise SuiteError(f"suite {name!r}: expected {PREFIX}N, N from 2 to {_MOST}")
        self.name = name
        self._suite = VisionSuite()
        base = next(task for task in self._suite.tasks if task.id == _BASE)
        labels = base.labels or ()
        maps = [labels, *(tuple(seeded(PREFIX, i).sample(labels, len(labels))) for i in range(1, int(number)))]
        self._maps = {f"map-{i:03}": dict(zip(labels, each, strict=True)) for i, each in enumerate(maps)}
        self.tasks: Sequence[TaskSpec] = tuple(
            base.model_copy(update={"id": task_id, "description": f"The kind of figure, by {task_id}."})
            for task_id in self._maps
        )
        self._drawn = lru_cache(maxsize=8)(self._suite.examples)

    @property
    def ceiling(self) -> float:
        """The most that answers which know the figure but not the map can score: each figure's most frequent word."""
        words_of_figures = zip(*(words.values() for words in self._maps.values()), strict=True)
        return fmean(max(Counter(words).values()) / len(words) for words in words_of_figures)

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`: every task has the same pictures."""
        if task_id not in self._maps:
            raise unknown_task(self, task_id)
        words = self._maps[task_id]
        return [
            Example(task_id, example.input, words[example.target], image=example.image)
            for example in self._drawn(_BASE, split, count, seed)
        ]
