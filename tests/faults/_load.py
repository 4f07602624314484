"""Load on a server from a thread of its own, with every answer and the times of its tokens."""

import asyncio
import functools
import itertools
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

from benchmarks.harness.asking import closed_loop, open_loop
from benchmarks.harness.percentile import p99
from mtlora.client import OPEN, Access, AsyncClient, Client, ServerError

# Answers long enough to measure gaps between tokens: the task's stop strings do not count.
# Answers of one length, whatever their task's type.
PARAMETERS: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "stop": [], "free": True}
_WORDS = (
    "seven", "apples", "7/30/2018", "walked", "north", "before", "the", "old", "bridge", "cost", "$12.50", "nobody",
    "answered", "twice",
)  # fmt: skip
# Deadline that ends hanging calls; no answer takes nearly as long on any machine.
_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Question:
    task_id: str
    text: str


@dataclass
class Asked:
    """One request. gaps_s: between its tokens. status: gRPC's, empty while the request runs."""

    question: Question
    began: float
    status: str = ""
    detail: str = ""
    text: str = ""
    version: str = ""
    ended: float = 0.0
    gaps_s: list[float] = field(default_factory=list)


def questions(client: Client, number: int, seed: int) -> list[Question]:
    """Random inputs for those of a server's tasks that take one text."""
    rng = random.Random(seed)
    tasks = [task.id for task in client.tasks() if len(task.fields) == 1]
    return [Question(rng.choice(tasks), " ".join(rng.choices(_WORDS, k=rng.randint(8, 24)))) for _ in range(number)]


def ask_many_lengths(client: Client, longest: int = 300) -> None:
    """Send one prompt of every second length, so that memory grows no further with the variety of lengths.

    vLLM's CPU build caches what oneDNN prepares for a number of tokens, for each layer and up to 128 numbers: some
    hundred MB in all.
    """
    task = next(task.id for task in client.tasks() if len(task.fields) == 1)
    for words in range(1, longest + 1, 2):
        # The beginnings differ, so that the prefix cache saves no computation.
        client.generate(task, f"{words}" + " a" * words, max_new_tokens=1, free=True, timeout=_TIMEOUT_S)


def answers(client: Client, asked: Sequence[Question], at_once: int = 12) -> list[str]:
    """Answers of the serving version."""

    def answer(each: Question) -> str:
        return client.generate(each.task_id, each.text, timeout=_TIMEOUT_S, **PARAMETERS).text

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(answer, asked))


class BackgroundLoad:
    """`with BackgroundLoad(...) as load`: `in_flight` streams at a time, or, where given, `rate` new ones a second.

    Leaving waits for every request to end. `asked` holds the requests in the order in which they began.
    """

    def __init__(
        self,
        address: str,
        asked: Sequence[Question],
        *,
        seed: int,
        in_flight: int = 12,
        rate: float | None = None,
        access: Access = OPEN,
    ) -> None:
        self._address = address
        self._access = access
        self._questions = asked
        self._rng = random.Random(seed)
        self._in_flight = in_flight
        self._rate = rate
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.asked: list[Asked] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(_TIMEOUT_S + 30)

    async def _run(self) -> None:
        async with AsyncClient(self._address, self._access, retry=None) as client:
            ask = functools.partial(self._ask, client)
            if (rate := self._rate) is None:
                await closed_loop(self._until_stopped(), self._in_flight, ask)
            else:
                await open_loop(self._until_stopped(), (self._rng.expovariate(rate) for _ in itertools.count()), ask)

    def _until_stopped(self) -> Iterator[Question]:
        while not self._stopping.is_set():
            # Send each question once before any is repeated, because a repeated prompt is in the engine's cache.
            for question in self._rng.sample(self._questions, len(self._questions)):
                if self._stopping.is_set():
                    return
                yield question

    async def _ask(self, client: AsyncClient, question: Question) -> None:
        asked = Asked(question, time.monotonic())
        self.asked.append(asked)
        last = 0.0
        try:
            async for piece in client.stream(question.task_id, question.text, timeout=_TIMEOUT_S, **PARAMETERS):
                now = time.monotonic()
                if last and piece.text:
                    asked.gaps_s.append(now - last)
                last = now
                asked.text += piece.text
                if piece.HasField("summary"):
                    asked.version = piece.summary.adapter_version
            asked.status = "OK"
        except ServerError as error:
            asked.status, asked.detail = error.code.name, error.message
        finally:
            asked.ended = time.monotonic()
        if asked.status == "UNAVAILABLE":
            # A closed loop would spin while the engine restarts.
            await asyncio.sleep(0.5)


def failures(asked: Iterable[Asked]) -> list[Asked]:
    """Requests that did not end in OK."""
    return [each for each in asked if each.status != "OK"]


def p99_name(values: Sequence[float]) -> str:
    """The name of the result of `p99`, which is the maximum for up to a hundred values."""
    return "p99" if len(values) > 100 else "slowest"


def p99_gap_s(asked: Iterable[Asked], since: float = 0.0, until: float = float("inf")) -> float:
    """The 99th percentile of the gaps between tokens, of requests that began in a span of time."""
    gaps = [gap for each in asked if since <= each.began < until for gap in each.gaps_s]
    return p99(gaps) if gaps else float("nan")


@dataclass
class References:
    """The greedy answer of each content to each question."""

    texts: dict[tuple[Question, int], str]

    def wrong(self, asked: Iterable[Asked], content_of: Any) -> list[Asked]:
        """Answers that differ from the reference of their version."""
        return [
            each
            for each in asked
            if each.status == "OK" and each.text.strip() != self.texts[each.question, content_of(each.version)]
        ]

    @property
    def distinct(self) -> int:
        """Number of questions to which the two contents give different answers."""
        return sum(
            self.texts[question, 0] != self.texts[question, 1] for question, content in self.texts if content == 0
        )
