"""The suite `documents`: 32 tasks about the same generated documents, with exact answers by construction."""

from collections.abc import Iterator, Sequence
from itertools import islice

from mtlora.suite.base import SPLITS, Example, Split, SuiteError, seeded, split_of, unknown_task
from mtlora.suite.documents.facts import Facts, draw_facts
from mtlora.suite.documents.questions import QUESTIONS
from mtlora.suite.documents.writing import write
from mtlora.task import TaskSpec

__all__ = ["DocumentsSuite"]


class DocumentsSuite:
    """Generates documents on demand. All tasks ask about the same documents, and a document belongs to one split."""

    name = "documents"
    finite = False

    def __init__(self) -> None:
        self._questions = {question.spec.id: question for question in QUESTIONS}
        self.tasks: Sequence[TaskSpec] = tuple(question.spec for question in QUESTIONS)
        # Documents drawn so far, by split and seed.
        self._drawn: dict[tuple[Split, int], list[tuple[str, Facts]]] = {}
        self._streams: dict[tuple[Split, int], Iterator[tuple[str, Facts]]] = {}

    def documents(self, split: Split, count: int, seed: int = 0) -> list[tuple[str, Facts]]:
        """`count` documents of a split, with what they say; a smaller count gives a prefix."""
        if split not in SPLITS:
            raise SuiteError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        drawn = self._drawn.setdefault((split, seed), [])
        stream = self._streams.setdefault((split, seed), self._stream(split, seed))
        drawn += islice(stream, max(0, count - len(drawn)))
        return drawn[:count]

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`. Generated tasks are unlimited, so `count` must be a number."""
        if task_id not in self._questions:
            raise unknown_task(self, task_id)
        if count is None or count < 0:
            raise SuiteError(f"count of task {task_id} is {count}; generated tasks need one >= 0")
        answer = self._questions[task_id].answer
        return [Example(task_id, text, answer(facts)) for text, facts in self.documents(split, count, seed)]

    def _stream(self, split: Split, seed: int) -> Iterator[tuple[str, Facts]]:
        rng, seen = seeded(self.name, split, seed), set()
        while True:
            facts = draw_facts(rng)
            text = write(facts, rng)
            if text not in seen and split_of(self.name, text) == split:
                seen.add(text)
                yield text, facts
