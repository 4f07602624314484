"""Who has what after several swaps, among three, five or seven people."""

import random
import re
from dataclasses import dataclass

from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError, matched, read_options, with_options

_PEOPLE = ("Alice", "Bob", "Claire", "Dave", "Eve", "Fred", "Gertrude")


@dataclass(frozen=True, slots=True)
class _Scene:
    """What the people do. `has` stands between a person and a thing, at the start and at the end."""

    intro: str
    has: str
    then: str
    swap: str
    end: str
    things: tuple[str, ...]


_COLORS = ("black", "blue", "brown", "green", "orange", "pink", "purple", "red", "white", "yellow")
_SCENES = (
    _Scene(
        "are dancers at a square dance. At the start of a song, they each have a partner: ", "is dancing with",
        "Throughout the song, the dancers often trade partners.", "switch partners",
        "At the end of the dance, {x} is dancing with",
        ("Helga", "Izzi", "Jamie", "Karl", "Lola", "Melissa", "Ophelia", "Patrick", "Rodrigo", "Sam"),
    ),
    _Scene(
        "are friends and avid readers who occasionally trade books. At the start of the semester, they each buy one "
        "new book: ", "gets", "As the semester proceeds, they start trading around the new books.", "swap books",
        "At the end of the semester, {x} has",
        (
            "Catch-22", "Frankenstein", "Hound of the Baskervilles", "Lolita", "Moby Dick",
            "The Fellowship of the Ring", "The Great Gatsby", "The Odyssey", "The Pearl", "Ulysses",
        ),
    ),
    _Scene(
        "are on the same team in a soccer match. At the start of the match, they are each assigned to a position: ",
        "is playing", "As the game progresses, pairs of players occasionally swap positions.", "trade positions",
        "At the end of the match, {x} is playing",
        (
            "benchwarmer", "center midfielder", "cheerleader", "fullback", "goalkeeper", "left midfielder",
            "left winger", "right midfielder", "right winger", "striker",
        ),
    ),
    _Scene(
        "are playing a game. At the start of the game, they are each holding a ball: ", "has a",
        "As the game progresses, pairs of players trade balls.", "swap balls", "At the end of the game, {x} has the",
        tuple(f"{color} ball" for color in _COLORS),
    ),
    _Scene(
        "are holding a white elephant gift exchange. At the start of the event, they are each holding a present of a "
        "different color: ", "has a", "As the event progresses, pairs of people swap gifts.", "swap their gifts",
        "At the end of the event, {x} has the",
        (*(f"{color} present" for color in _COLORS), "black ball", "orange ball", "pink ball"),
    ),
)  # fmt: skip


def solve_tracking(text: str) -> Solution:
    """Works through who holds which option: everyone at the start, then the two who swapped, then the one asked for."""
    letters = read_options(text)
    start, _, rest = text.partition("\n")
    holding: dict[str, str] = {}
    for option, letter in letters.items():
        has = "|".join(sorted({scene.has for scene in _SCENES}))
        holder = matched(rf"(\w+) (?:{has}) {re.escape(option)}[,.]", f"{start}.")
        holding[holder[1]] = letter
    working = [" ".join(f"{person} {letter}" for person, letter in holding.items())]
    for one, other in re.findall(r"(?:First|Then|Finally), (\w+) and (\w+) (?:switch|swap|trade) ", rest):
        if one not in holding or other not in holding:
            raise UnsolvedError(f"{one} or {other} holds nothing")
        holding[one], holding[other] = holding[other], holding[one]
        working.append(f"{one} {holding[one]} {other} {holding[other]}")
    asked = matched(r"At the end of the \w+, (\w+) ", rest)[1]
    return Solution(", ".join([*working, f"{asked} {holding[asked]}"]), f"({holding[asked]})")


def _generate(rng: random.Random, count: int) -> str:
    scene, people = rng.choice(_SCENES), _PEOPLE[:count]
    things = rng.sample(scene.things, count)
    listed = [f"{person} {scene.has} {thing}" for person, thing in zip(people, things, strict=True)]
    swaps = []
    for i in range(count):
        one, other = rng.sample(people, 2)
        lead = "First" if i == 0 else "Finally" if i == count - 1 else "Then"
        swaps.append(f"{lead}, {one} and {other} {scene.swap}.")
    start = f"{', '.join(people[:-1])}, and {people[-1]} {scene.intro}{', '.join(listed[:-1])}, and {listed[-1]}."
    question = scene.end.format(x=rng.choice(people))
    return with_options(f"{start}\n{scene.then} {' '.join(swaps)} {question}", things)


def _task(word: str, count: int, max_new_tokens: int) -> BBHTask:
    return BBHTask(
        f"tracking_shuffled_objects_{word}_objects",
        f"Follows the possessions of {word} people through {word} swaps and names what one of them ends up with.",
        solve_tracking,
        max_new_tokens,
        lambda rng: _generate(rng, count),
    )


TASKS = (_task("three", 3, 44), _task("five", 5, 68), _task("seven", 7, 100))
