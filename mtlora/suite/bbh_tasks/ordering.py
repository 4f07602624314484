"""The order of three, five or seven things, from clues."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError, look_up, matched, read_options, with_options
from mtlora.suite.derivations import with_article

_ORDINALS = ("first", "second", "third", "fourth")
_INTRO = (
    "The following paragraphs each describe a set of {n} objects arranged in a fixed order. "
    "The statements are logically consistent within each paragraph. "
)


@dataclass(frozen=True, slots=True)
class _Scene:
    """One way to tell an order. `less` and `more` compare; `low` and `high` name places from either end."""

    pool: Sequence[str]
    intro: str
    with_article: bool
    less: str
    more: str
    low: tuple[str, ...]
    high: tuple[str, ...]
    noun: str = "The {x}"


def _ends(first: str, nth: str) -> tuple[str, ...]:
    return (first, *(nth.format(n=ordinal) for ordinal in _ORDINALS[1:]))


_BOOKS = tuple(
    f"{c} book" for c in ("black", "blue", "brown", "gray", "green", "orange", "purple", "red", "white", "yellow")
)
_LEFT, _RIGHT = (_ends(f"is the {side}most", f"is the {{n}} from the {side}") for side in ("left", "right"))
_SCENES = (
    _Scene(
        ("blue jay", "cardinal", "crow", "falcon", "hawk", "hummingbird", "owl", "quail", "raven", "robin"),
        "On a branch, there are {n} birds: ", True, "is to the left of the {y}", "is to the right of the {y}",
        _LEFT, _RIGHT,
    ),
    _Scene(
        _BOOKS, "On a shelf, there are {n} books: ", True, "is to the left of the {y}", "is to the right of the {y}",
        _LEFT, _RIGHT,
    ),
    _Scene(
        (
            "bus", "convertible", "hatchback", "limousine", "minivan", "motorcyle", "sedan", "station wagon",
            "tractor", "truck",
        ),
        "In an antique car show, there are {n} vehicles: ", True, "is older than the {y}", "is newer than the {y}",
        _ends("is the oldest", "is the {n}-oldest"), _ends("is the newest", "is the {n}-newest"),
    ),
    _Scene(
        (
            "apples", "cantaloupes", "kiwis", "loquats", "mangoes", "oranges", "peaches", "pears", "plums",
            "watermelons",
        ),
        "A fruit stand sells {n} fruits: ", False, "are less expensive than the {y}", "are more expensive than the {y}",
        _ends("are the cheapest", "are the {n}-cheapest"),
        _ends("are the most expensive", "are the {n}-most expensive"),
    ),
    _Scene(
        ("Ada", "Amy", "Ana", "Dan", "Eli", "Eve", "Joe", "Mel", "Mya", "Rob"),
        "In a golf tournament, there were {n} golfers: ", False, "finished above {y}", "finished below {y}",
        _ends("finished first", "finished {n}"), _ends("finished last", "finished {n}-to-last"), noun="{x}",
    ),
)  # fmt: skip


def _reader(scene: _Scene, things: Sequence[str]) -> re.Pattern[str]:
    """Matches a statement of the scene: groups x, and one of less, more, low, high."""
    noun = "|".join(re.escape(thing) for thing in things)

    def comparison(name: str, text: str) -> str:
        return f"{re.escape(text.replace('{y}', '@')).replace('@', f'(?P<{name}>{noun})')}"

    def places(name: str, texts: Sequence[str]) -> str:
        return f"(?P<{name}>{'|'.join(map(re.escape, texts))})"

    predicates = (
        comparison("less", scene.less), comparison("more", scene.more), places("low", scene.low),
        places("high", scene.high),
    )  # fmt: skip
    return re.compile(rf"{scene.noun.replace('{x}', f'(?P<x>{noun})')} (?:{'|'.join(predicates)})")


def _place(match: re.Match[str], scene: _Scene, count: int) -> int:
    """The place, from 0, that a statement gives its thing."""
    if match["low"]:
        return scene.low.index(match["low"])
    return count - 1 - scene.high.index(match["high"])


# A clue: (earlier, later), or (thing, place from 0).
_Clue = tuple[str, str] | tuple[str, int]


def _orders(things: Sequence[str], clues: Sequence[_Clue]) -> list[list[str]]:
    """Up to two orders that fit all clues, filled from the first place."""
    found: list[list[str]] = []
    at = {thing: place for thing, place in clues if isinstance(place, int)}
    before = [(x, y) for x, y in clues if isinstance(y, str)]

    def extend(order: list[str]) -> None:
        if len(found) > 1:
            return
        if len(order) == len(things):
            found.append(list(order))
            return
        for thing in things:
            if thing in order or at.get(thing, len(order)) != len(order):
                continue
            if any(y == thing and x not in order for x, y in before):
                continue
            extend([*order, thing])

    extend([])
    return found


def _thing(reader: re.Pattern[str], option: str) -> str:
    """The thing that an option is about."""
    match = reader.fullmatch(option)
    if match is None:
        raise UnsolvedError(f"no place: {option!r}")
    return match["x"]


def solve_ordering(text: str) -> Solution:
    """Works through the clues, the order, who is asked for, and whom the options name up to the right one.

    Clues are in one notation: `x<y`, or `x=2` for the second place.
    """
    letters = read_options(text)
    body = matched(r"within each paragraph\. (.*?: )(.*?)\. (.*)\.\nOptions", text)
    scenes = [scene for scene in _SCENES if scene.intro.partition("{n}")[0] == re.split(r"\w+ \w+: $", body[1])[0]]
    scenes = [scene for scene in scenes if scene.intro.rpartition(" ")[0].split()[-1] == body[1].split()[-1]]
    if not scenes:
        raise UnsolvedError(f"no known scene: {body[1]!r}")
    scene = scenes[0]
    things = [re.sub(r"^(?:and )?(?:an? )?", "", part) for part in re.split(r", | and ", body[2]) if part]
    reader = _reader(scene, things)
    clues: list[_Clue] = []
    for sentence in body[3].split(". "):
        if (match := reader.fullmatch(sentence)) is None:
            raise UnsolvedError(f"no clue: {sentence!r}")
        if match["less"]:
            clues.append((match["x"], match["less"]))
        elif match["more"]:
            clues.append((match["more"], match["x"]))
        else:
            clues.append((match["x"], _place(match, scene, len(things))))
    orders = _orders(things, clues)
    if len(orders) != 1:
        raise UnsolvedError(f"{len(orders)} orders fit")
    (order,) = orders
    for option in letters:
        match = reader.fullmatch(option)
        if match is None or match["less"] or match["more"]:
            raise UnsolvedError(f"no place: {option!r}")
        if order[_place(match, scene, len(things))] == match["x"]:
            notes = [f"{x}<{y}" if isinstance(y, str) else f"{x}={y + 1}" for x, y in clues]
            read, answer = look_up(letters, option, lambda other: _thing(reader, other))
            return Solution(f"{', '.join(notes)}: {' '.join(order)}, {match['x']}: {read}", answer)
    raise UnsolvedError("no option is right")


def _generate(rng: random.Random, word: str, count: int) -> str:
    scene = rng.choice(_SCENES)
    order = rng.sample(list(scene.pool), count)
    things = rng.sample(order, count)
    neighbours: list[_Clue] = [(order[i], order[j]) for i in range(count) for j in range(i + 1, min(count, i + 4))]
    places: list[_Clue] = [(thing, place) for place, thing in enumerate(order)]
    while True:
        # Start with one clue fewer than things; about half of the clues are comparisons.
        share = rng.choice((0, 1, 1, 2, 3))
        clues = rng.sample(places, min(share, count - 1))
        clues += rng.sample(neighbours, min(len(neighbours), count - 1 - len(clues)))
        while len(_orders(things, clues)) > 1 and len(clues) < count + 1:
            clues.append(rng.choice([clue for clue in neighbours if clue not in clues] or places))
        if len(_orders(things, clues)) == 1:
            break
    rng.shuffle(clues)
    sentences = []
    for x, y in clues:
        if isinstance(y, int):
            sentences.append(f"{scene.noun.format(x=x)} {_said(scene, y, count, rng)}.")
        elif rng.random() < 0.5:
            sentences.append(f"{scene.noun.format(x=x)} {scene.less.format(y=y)}.")
        else:
            sentences.append(f"{scene.noun.format(x=y)} {scene.more.format(y=x)}.")
    listed = [with_article(thing) if scene.with_article else thing for thing in things]
    intro = f"{_INTRO.format(n=word)}{scene.intro.format(n=word)}{', '.join(listed[:-1])}, and {listed[-1]}."
    asked = _said(scene, rng.randrange(count), count, rng)
    return with_options(f"{intro} {' '.join(sentences)}", [f"{scene.noun.format(x=thing)} {asked}" for thing in things])


def _said(scene: _Scene, place: int, count: int, rng: random.Random) -> str:
    """A place in words, from the nearer end; the middle from either end."""
    from_high = count - 1 - place
    if place < from_high or (place == from_high and rng.random() < 0.5):
        return scene.low[place]
    return scene.high[from_high]


def _task(word: str, count: int, max_new_tokens: int) -> BBHTask:
    return BBHTask(
        f"logical_deduction_{word}_objects",
        f"Finds the order of {word} things from clues and says which statement about a place is true.",
        solve_ordering,
        max_new_tokens,
        lambda rng: _generate(rng, word, count),
    )


TASKS = (_task("three", 3, 80), _task("five", 5, 144), _task("seven", 7, 208))
