"""Answers from a running server."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mtlora.client import OPEN, Access, Client, ServerError
from mtlora.errors import MtLoRAError
from mtlora.evaluation.answerers import Answerer, Answerers, Labeller, answer_bar
from mtlora.suite.base import Example

# Requests at a time.
_CONCURRENCY = 32


def server_answerers(address: str, access: Access, *, labels: bool) -> Answerers:
    """The server's adapter and its backbone alone. labels: whether the tasks' labels have probabilities there."""
    return Answerers(
        server_answerer(address, access),
        server_answerer(address, access, without_adapter=True),
        server_labeller(address, access) if labels else None,
    )


def server_answerer(
    address: str, access: Access = OPEN, *, without_adapter: bool = False, concurrency: int = _CONCURRENCY
) -> Answerer:
    """Answers from a running server, `concurrency` requests at a time. Raises MtLoRAError if one fails."""

    def answer(examples: Sequence[Example]) -> list[str]:
        def ask(example: Example) -> str:
            image = None if example.image is None else example.encoded_image()
            text = client.generate(example.task_id, example.input, image=image, without_adapter=without_adapter).text
            # Update the bar here: the loop that collects answers waits for the slowest example before each.
            with bar.get_lock():
                bar.update()
            return text

        with (
            _connected(address, access) as client,
            ThreadPoolExecutor(concurrency) as pool,
            answer_bar(len(examples), "ask", not without_adapter) as bar,
        ):
            return list(pool.map(ask, examples))

    return answer


def server_labeller(address: str, access: Access = OPEN) -> Labeller:
    """Probabilities of labels from a running server, not calibrated. Raises MtLoRAError if an input fails."""

    def label(examples: Sequence[Example]) -> list[Mapping[str, float]]:
        def ask(example: Example) -> Mapping[str, float]:
            (score,) = client.score(example.task_id, [example.input], uncalibrated=True)
            if score.error is not None:
                raise score.error
            return score.probabilities

        with _connected(address, access) as client, ThreadPoolExecutor(_CONCURRENCY) as pool:
            return list(pool.map(ask, examples))

    return label


@contextlib.contextmanager
def _connected(address: str, access: Access) -> Iterator[Client]:
    """A client. Raises MtLoRAError for a request that fails inside the block."""
    with Client(address, access) as client:
        try:
            yield client
        except ServerError as error:
            raise MtLoRAError(f"{address}: {error}") from None
