"""What gives answers to examples: a model in this process, heads on images, or a server."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tqdm import tqdm

from mtlora.suite.base import Example

# Gives an answer to each example, in order.
Answerer = Callable[[Sequence[Example]], list[str]]
# Gives the probability of every label of each example, in order; not calibrated.
Labeller = Callable[[Sequence[Example]], list[Mapping[str, float]]]


class Answerers(NamedTuple):
    """The ways to answer that one evaluation compares. Nothing is computed before they are called.

    adapter: None without a checkpoint. labeller: the adapter's, None where labels have no probabilities.
    """

    adapter: Answerer | None
    backbone_alone: Answerer
    labeller: Labeller | None


def with_other_images(answerer: Answerer) -> Answerer:
    """Answers about the image of the task's next example: how far the texts alone lead."""

    def answer(examples: Sequence[Example]) -> list[str]:
        images: dict[str, list[Any]] = {}
        for example in examples:
            images.setdefault(example.task_id, []).append(example.image)
        rotated = {task_id: iter([*found[1:], found[0]]) for task_id, found in images.items()}
        return answerer([replace(example, image=next(rotated[example.task_id])) for example in examples])

    return answer


def answer_bar(total: int, what: str, with_adapter: bool) -> "tqdm[Any]":
    return tqdm(total=total, desc=f"{what} ({'adapter' if with_adapter else 'backbone alone'})", unit="ex", leave=False)
