"""Words: sorting, taking apart, adjective order."""

import random

from mtlora.suite.builtin.task import GeneratedTask, task
from mtlora.suite.builtin.words import ADJECTIVES, NOUNS, WORDS


def word_sorting(rng: random.Random) -> tuple[str, str, str]:
    """Three or four words with distinct initials, worked by sorting these.

    A model cannot read later letters off its tokens, but it can know every word's initial.
    """
    n = rng.choice((3, 4))
    while True:
        words = rng.sample(WORDS, n)
        if len({word[0] for word in words}) == n and words != sorted(words):
            return " ".join(words), " ".join(sorted(words)), " ".join(sorted(word[0] for word in words))


def string_operation(rng: random.Random) -> tuple[str, str] | tuple[str, str, str]:
    """Reverses a list of words, or reads off the first or last letters, worked with each word before its letter."""
    words = rng.sample(WORDS, rng.choice((3, 4)))
    name = rng.choice(("reverse", "first letters", "last letters"))
    text = f"{name}: {' '.join(words)}"
    if name == "reverse":
        return text, " ".join(words[::-1])
    letters = [word[0] if name == "first letters" else word[-1] for word in words]
    working = " ".join(f"{word} {letter}" for word, letter in zip(words, letters, strict=True))
    return text, " ".join(letters), working


def adjective_order(rng: random.Random) -> tuple[str, str]:
    """Two or three adjectives in the customary order, beside the same phrase with two of them swapped."""
    classes = sorted(rng.sample(range(len(ADJECTIVES)), rng.choice((2, 3, 3))))
    right = [rng.choice(ADJECTIVES[i]) for i in classes]
    wrong = list(right)
    i, j = rng.sample(range(len(right)), 2)
    wrong[i], wrong[j] = wrong[j], wrong[i]
    noun = rng.choice(NOUNS)
    answer, other = " ".join([*right, noun]), " ".join([*wrong, noun])
    options = [answer, other] if rng.random() < 0.5 else [other, answer]
    return "; ".join(options), answer


TASKS: tuple[GeneratedTask, ...] = (
    task(
        "word_sorting", word_sorting,
        description="Sorts three or four words alphabetically.",
        instruction="Sort the words alphabetically, separated by spaces.",
        max_new_tokens=20, worked=True,
    ),
    task(
        "string_operations", string_operation,
        description="Reverses the order of a few words, or gives their first or last letters.",
        instruction="Reverse the words, or give the first or last letter of each, separated by spaces.",
        max_new_tokens=24, worked=True,
    ),
    task(
        "hyperbaton", adjective_order,
        description="Chooses the phrase whose adjectives stand in the customary English order.",
        instruction="Which phrase has the correct adjective order? Copy it.",
        max_new_tokens=16,
    ),
)  # fmt: skip
