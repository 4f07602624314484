"""Words: sorting, adjective order."""

import random
from itertools import pairwise

from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError, choose, matched, read_options, with_options
from mtlora.suite.bbh_tasks.words import ADJECTIVES, HYPERBATON_NOUNS, SORTED_WORDS

_LIST = "Sort the following words alphabetically: List: "
_CLASS = {adjective: i for i, group in enumerate(ADJECTIVES) for adjective in group}
_HYPERBATON = "Which sentence has the correct adjective order:"


def solve_word_sorting(text: str) -> Solution:
    """Gives no working: a model cannot read a word's letters off its tokens."""
    words = matched(r"^Sort the following words alphabetically: List: (.*)$", text)[1].split()
    return Solution("", " ".join(sorted(words)))


def generate_word_sorting(rng: random.Random) -> str:
    """Three to twenty distinct words."""
    return _LIST + " ".join(rng.sample(SORTED_WORDS, rng.randint(3, 20)))


def solve_hyperbaton(text: str) -> Solution:
    """Works through the classes, 1 to 8, of the first option's adjectives, up to one that is lower than the last."""
    letters = read_options(text)
    ranks: dict[str, list[int]] = {}
    for option in letters:
        *adjectives, _ = option.split()
        if unknown := [word for word in adjectives if word not in _CLASS]:
            raise UnsolvedError(f"{unknown[0]!r} is of no known class")
        ranks[option] = [_CLASS[word] + 1 for word in adjectives]
    right = [option for option, rank in ranks.items() if rank == sorted(rank)]
    if len(right) != 1:
        raise UnsolvedError(f"{len(right)} options are right")
    first, rank = next(iter(ranks.items()))
    fall = next((i for i, (one, other) in enumerate(pairwise(rank), 1) if other < one), len(rank))
    named = [f"{word} {number}" for word, number in zip(first.split(), rank, strict=False)]
    return Solution(" ".join(named[: fall + 1]), choose(letters, right[0]))


def generate_hyperbaton(rng: random.Random) -> str:
    """Two to seven adjectives of different classes, in order and shuffled."""
    count = rng.choice((2, 3, 3, 4, 4, 4, 5, 5, 6, 7))
    right = [rng.choice(ADJECTIVES[i]) for i in sorted(rng.sample(range(len(ADJECTIVES)), count))]
    wrong = list(right)
    while wrong == right:
        rng.shuffle(wrong)
    noun = rng.choice(HYPERBATON_NOUNS)
    options = [" ".join([*right, noun]), " ".join([*wrong, noun])]
    rng.shuffle(options)
    return with_options(_HYPERBATON, options)


TASKS = (
    BBHTask(
        "word_sorting", "Sorts words alphabetically.", solve_word_sorting, 128, generate_word_sorting,
    ),
    BBHTask(
        "hyperbaton", "Chooses the phrase whose adjectives stand in the customary English order.",
        solve_hyperbaton, 48, generate_hyperbaton,
    ),
)  # fmt: skip
