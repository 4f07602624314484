"""A task of BIG-Bench Hard that can be worked out: a solver of its inputs and, mostly, a generator of more of them."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Solution(NamedTuple):
    """A short derivation, and the answer in the form that the task's targets have."""

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
    generate: Callable[[random.Random], str] | None = None


_OPTION = re.compile(r"^\(([A-Z])\) (.*?)\s*$", re.MULTILINE)


def read_options(text: str) -> dict[str, str]:
    """Letter of each option's text. Raises UnsolvedError where there are none."""
    _, found, block = text.partition("\nOptions:\n")
    letters = {option: letter for letter, option in _OPTION.findall(block)}
    if not found or not letters:
        raise UnsolvedError("no options")
    return letters


def choose(letters: dict[str, str], option: str) -> str:
    """`(B)` for the option of that text. Raises UnsolvedError where it is none."""
    if option not in letters:
        raise UnsolvedError(f"{option!r} is no option")
    return f"({letters[option]})"


def look_up(letters: dict[str, str], option: str, shown: Callable[[str], str] = str) -> tuple[str, str]:
    """(the options read out up to the right one, `(B)`).

    A small model finds what follows a text it has written, but a letter precedes its option. `shown` is
    what is read out of an option. Raises UnsolvedError where the option is none.
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
    """The match of a pattern anywhere in a text. Raises UnsolvedError where there is none."""
    found = re.search(pattern, text)
    if found is None:
        raise UnsolvedError(f"no {pattern!r} in {text[:80]!r}")
    return found


def a(noun: str) -> str:
    """The noun after its article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
