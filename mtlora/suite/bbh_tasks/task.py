"""A solvable task of BIG-Bench Hard: a solver of its inputs and a generator of similar inputs."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Solution(NamedTuple):
    """A short derivation, and the answer in the form of the task's targets."""

    working: str
    answer: str


class UnsolvedError(ValueError):
    """An input that a solver cannot read, or that has no answer."""


@dataclass(frozen=True, slots=True)
class BBHTask:
    """`solve(input)` gives a Solution or raises UnsolvedError; `generate(rng)` draws an input that `solve` can read.

    max_new_tokens covers working and answer under the default backbone's tokenizer.
    """

    id: str
    description: str
    solve: Callable[[str], Solution]
    max_new_tokens: int
    generate: Callable[[random.Random], str]


_OPTION = re.compile(r"^\(([A-Z])\) (.*?)\s*$", re.MULTILINE)


def read_options(text: str) -> dict[str, str]:
    """The letter of each option's text. Raises UnsolvedError if there are no options."""
    _, found, block = text.partition("\nOptions:\n")
    letters = {option: letter for letter, option in _OPTION.findall(block)}
    if not found or not letters:
        raise UnsolvedError("no options")
    return letters


def choose(letters: dict[str, str], option: str) -> str:
    """`(B)` for the option of that text. Raises UnsolvedError for a text that is not an option."""
    if option not in letters:
        raise UnsolvedError(f"{option!r} is no option")
    return f"({letters[option]})"


def look_up(letters: dict[str, str], option: str, shown: Callable[[str], str] = str) -> tuple[str, str]:
    """(the options read out up to the right one, `(B)`).

    A small model can copy what follows a text that it has written. A letter precedes its option, so the working repeats
    the options. `shown` gives the part of an option to read out. Raises UnsolvedError as `choose` does.
    """
    answer = choose(letters, option)
    read = []
    for other, letter in letters.items():
        read.append(f"{letter} {shown(other)}")
        if other == option:
            break
    return " ".join(read), answer


def with_options(question: str, options: Sequence[str]) -> str:
    """An input that ends in lettered options."""
    lines = (f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options))
    return "\n".join([question, "Options:", *lines])


def matched(pattern: str, text: str) -> re.Match[str]:
    """The match of a pattern anywhere in a text. Raises UnsolvedError without a match."""
    found = re.search(pattern, text)
    if found is None:
        raise UnsolvedError(f"no {pattern!r} in {text[:80]!r}")
    return found
