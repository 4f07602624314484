"""Numbers: counting things, arithmetic, walks."""

import random
import re

from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError, matched
from mtlora.suite.bbh_tasks.words import THINGS
from mtlora.suite.derivations import DIRECTIONS, Walk, with_article

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Singular and plural -> kind.
_KIND = {form: kind for kind, things in THINGS.items() for thing in things for form in thing}


def _read_entry(entry: str) -> tuple[int, str]:
    """(how many, of what) of `three heads of broccoli`."""
    word, _, thing = entry.partition(" ")
    if word in ("a", "an"):
        return 1, thing
    if word not in _NUMBERS or not thing:
        raise UnsolvedError(f"no count of things: {entry!r}")
    return _NUMBERS.index(word), thing


def solve_object_counting(text: str) -> Solution:
    """Works it out as a running sum over the things of the kind asked for."""
    body = matched(r"^I have (.*)\. How many (.*) do I have\?$", text)
    running, working = 0, []
    for entry in re.split(r", and |, | and ", body[1]):
        count, thing = _read_entry(entry)
        if body[2] != "objects" and thing not in _KIND:
            raise UnsolvedError(f"{thing!r} is of no known kind")
        if body[2] in ("objects", _KIND.get(thing)):
            running += count
            working.append(f"{thing.rpartition(' of ')[2]} {running}")
    return Solution(" ".join(working), str(running))


def generate_object_counting(rng: random.Random) -> str:
    """Two to ten entries of one kind, sometimes with up to three others among them."""
    kind = rng.choice(("objects", "vegetables", "animals", "musical instruments", "fruits"))
    things = THINGS[kind]
    chosen = rng.sample(things, rng.randint(2, min(10, len(things))))
    if kind != "objects" and rng.random() < 0.4:
        others = [thing for other in THINGS if other != kind for thing in THINGS[other]]
        chosen = chosen[:9] + rng.sample(others, rng.randint(1, 3))
        rng.shuffle(chosen)
    many = set(rng.sample(range(len(chosen)), rng.choice((0, 0, 1, 2, 3, 4)) if len(chosen) > 3 else rng.randint(0, 1)))
    entries = [
        f"{_NUMBERS[rng.choice((2, 2, 3, 3, 4, 4, 5))]} {plural}" if i in many else with_article(single)
        for i, (single, plural) in enumerate(chosen)
    ]
    return f"I have {', '.join(entries[:-1])}, and {entries[-1]}. How many {kind} do I have?"


def _equation(left: int, operator: str, right: int) -> tuple[str, int]:
    value = left + right if operator == "+" else left - right if operator == "-" else left * right
    return f"{left}{operator}{right}={value}", value


def _solve_side(text: str) -> tuple[list[str], int]:
    """(equations, value) of numbers with operators between them: products first, each from left to right."""
    words = text.split()
    numbers, operators = [int(word) for word in words[::2]], words[1::2]
    equations = []
    for group in ("*", "+-"):
        i = 0
        while i < len(operators):
            if operators[i] in group:
                equation, numbers[i] = _equation(numbers[i], operators.pop(i), numbers.pop(i + 1))
                equations.append(equation)
            else:
                i += 1
    return equations, numbers[0]


_SIDE = r"\((-?\d(?: [-+*] -?\d)*)\)"


def solve_arithmetic(text: str) -> Solution:
    """Works it out equation by equation: the left side, the right side, both."""
    body = matched(rf"^\({_SIDE} ([-+*]) {_SIDE}\) =$", text)
    left_equations, left = _solve_side(body[1])
    right_equations, right = _solve_side(body[3])
    equation, value = _equation(left, body[2], right)
    parts = (" ".join(left_equations), " ".join(right_equations), equation)
    return Solution("; ".join(part for part in parts if part), str(value))


def generate_arithmetic(rng: random.Random) -> str:
    """Two sides of four numbers from -9 to 9, and an operator between them."""

    def side() -> str:
        numbers = [str(rng.randint(-9, 9)) for _ in range(4)]
        return numbers[0] + "".join(f" {rng.choice('+-*')} {number}" for number in numbers[1:])

    return f"(({side()}) {rng.choice('+-*')} ({side()})) ="


_QUESTION = "If you follow these instructions, do you return to the starting point? "
_ENDING = "\nOptions:\n- Yes\n- No"
_TURNS = {"right": 1, "around": 2, "left": 3}


def solve_navigate(text: str) -> Solution:
    """Works it out as a `Walk`."""
    walk, heading = Walk(), 0
    for sentence in matched(r"point\? (?:Always face forward\. )?(.*)\.\n", text)[1].split(". "):
        if turn := re.fullmatch(r"Turn (left|right|around)", sentence):
            heading = (heading + _TURNS[turn[1]]) % 4
            walk.turn(heading)
            continue
        taken = matched(r"^Take (\d+) steps?(?: (forward|backward|left|right))?$", sentence)
        walk.take(int(taken[1]), DIRECTIONS[taken[2]] if taken[2] else heading)
    return Solution(walk.working, "Yes" if walk.returns else "No")


def generate_navigate(rng: random.Random) -> str:
    """Moves in four directions, or walks and turns; half of them end at the start."""
    wanted = rng.choice(("Yes", "No"))
    forward = rng.random() < 0.5
    while True:
        steps = [f"Take {n} step{'s' if n > 1 else ''}" for n in (rng.randint(1, 10) for _ in range(9))]
        if forward:
            count = rng.randint(2, 8)
            axis = rng.choice((("forward", "backward"), ("left", "right"), tuple(DIRECTIONS)))
            parts = [f"{step} {rng.choice(axis)}" for step in steps[:count]]
        else:
            count = rng.randint(3, 9)
            turns = ("Turn around", "Turn around", "Turn left", "Turn right")
            parts = [step if rng.random() < 0.6 else rng.choice(turns) for step in steps[:count]]
        lead = "Always face forward. " if forward else ""
        text = f"{_QUESTION}{lead}{'. '.join(parts)}.{_ENDING}"
        if "Take" in text and solve_navigate(text).answer == wanted:
            return text


TASKS = (
    BBHTask(
        "object_counting", "Counts the things of one kind in a list of possessions.",
        solve_object_counting, 96, generate_object_counting,
    ),
    BBHTask(
        "multistep_arithmetic_two", "Evaluates an arithmetic expression of eight numbers.",
        solve_arithmetic, 112, generate_arithmetic,
    ),
    BBHTask(
        "navigate", "Says whether moves and turns lead back to the start.", solve_navigate, 96, generate_navigate,
    ),
)  # fmt: skip
