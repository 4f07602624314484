"""New versions under load: publish one, wait for it, and collect the answers of both contents."""

import threading
import time
from collections.abc import Collection
from typing import Self

from mtlora_pb.v1 import adapters_pb2

from mtlora.client import Client
from tests.faults._load import Question, References, answers, questions
from tests.faults._server import Target

SERVING = adapters_pb2.ADAPTER_STAGE_SERVING
FAILED = adapters_pb2.ADAPTER_STAGE_FAILED
# Most requests are new to the engine's cache, as users' are. With few questions, prompts of the steady load came from
# the cache and those after a swap did not, which caused most of the difference.
_QUESTIONS = 80


class Watcher:
    """Collects the events of a server's adapters from entering on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._news = threading.Condition()
        self.events: list[tuple[float, adapters_pb2.AdapterEvent]] = []

    def __enter__(self) -> Self:
        self._stream = self._client.watch_adapters()
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to do: the stream ends with the client's channel."""

    def wait(self, version: str, stages: Collection[int], timeout: float) -> adapters_pb2.AdapterEvent:
        """The first event of a version in one of these stages. Raises TimeoutError."""
        until = time.monotonic() + timeout
        with self._news:
            while True:
                for _, event in self.events:
                    if event.version == version and event.stage in stages:
                        return event
                if not self._news.wait(until - time.monotonic()) and time.monotonic() > until:
                    raise TimeoutError(f"version {version}: in none of the stages {stages} after {timeout:g} s")

    def _read(self) -> None:
        try:
            for event in self._stream:
                with self._news:
                    self.events.append((time.monotonic(), event))
                    self._news.notify_all()
        except Exception:
            # The channel is closed.
            return


def swap(target: Target, watcher: Watcher, timeout: float = 30.0) -> str:
    """Put the next version in place and wait until it serves. Raises TimeoutError, or ValueError if it failed."""
    version = target.publish()
    event = watcher.wait(version, {SERVING, FAILED}, timeout)
    if event.stage == FAILED:
        raise ValueError(f"version {version}: {event.reason}")
    return version


def references(target: Target, client: Client, watcher: Watcher, seed: int) -> tuple[list[Question], References]:
    """Questions, and the answers of both contents, asked once. Raises ValueError if too few of them differ."""
    if target.known is not None:
        return target.known
    asked = questions(client, _QUESTIONS, seed)
    texts: dict[tuple[Question, int], str] = {}
    for _ in range(2):
        content = target.content_of(swap(target, watcher))
        texts |= {(question, content): text for question, text in zip(asked, answers(client, asked), strict=True)}
    made = References(texts)
    if made.distinct < _QUESTIONS / 2:
        raise ValueError(f"the two contents differ in {made.distinct} of {_QUESTIONS} answers: too few to tell apart")
    target.known = asked, made
    return target.known
