"""A generated task: its spec and the function that draws one example."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from mtlora.suite import answers
from mtlora.suite.base import ANSWER_MARKER
from mtlora.task import TaskSpec

Generate = Callable[[random.Random], tuple[str, str] | tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class GeneratedTask:
    """`generate(rng)` gives (input, target) or (input, target, working) and draws on nothing but `rng`."""

    spec: TaskSpec
    generate: Generate


def task(
    task_id: str,
    generate: Generate,
    *,
    description: str,
    instruction: str,
    max_new_tokens: int,
    allowed_answers: tuple[str, ...] | None = None,
    worked: bool = False,
) -> GeneratedTask:
    """A task whose prompt is an instruction, the input, and `Answer:`. worked: whether `generate` gives working."""
    spec = TaskSpec(
        id=task_id,
        description=description,
        template=f"{instruction}\n{{input}}\nAnswer:",
        max_new_tokens=max_new_tokens,
        allowed_answers=allowed_answers,
        answer=answers.BUILTIN.get(task_id),
        answer_marker=ANSWER_MARKER if worked else None,
    )
    return GeneratedTask(spec, generate)


def enumerate_words(words: list[str]) -> str:
    """`x, y and z`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def split_sum(rng: random.Random, total: int, parts: int, largest: int) -> list[int]:
    """`parts` numbers from 1 to `largest` with sum `total`, which must be possible."""
    numbers = []
    for left in range(parts, 0, -1):
        rest = left - 1
        number = rng.randint(max(1, total - rest * largest), min(largest, total - rest))
        numbers.append(number)
        total -= number
    rng.shuffle(numbers)
    return numbers
