"""Things, places and times: walking, swapping, tables, colours, dates, schedules."""

import calendar
import datetime
import random
from itertools import pairwise

from mtlora.suite.builtin.task import GeneratedTask, split_sum, task
from mtlora.suite.builtin.words import COLORS, ITEMS, NAMES, PLACES
from mtlora.suite.derivations import DIRECTIONS, US_DATE, Walk, clock_hour, months_later, with_article

_AXES = (("left", "right"), ("forward", "backward"))


def navigate(rng: random.Random) -> tuple[str, str, str]:
    """Moves that cancel on every axis, or would but for one count or direction; worked as a `Walk`."""
    returns = rng.random() < 0.5
    layout = rng.choices(((3,), (2, 2), (3, 2)), weights=(1, 2, 5))[0]
    axes = rng.sample(_AXES, len(layout))
    moves: list[tuple[int, str]] = []
    for axis, n in zip(axes, layout, strict=True):
        there, back = rng.sample(axis, 2)
        total = rng.randint(n - 1, 9)
        moves += [(steps, there) for steps in split_sum(rng, total, n - 1, total)]
        moves.append((total, back))
    rng.shuffle(moves)
    if not returns:
        i = rng.randrange(len(moves))
        steps, direction = moves[i]
        if rng.random() < 0.7:
            moves[i] = (rng.choice([n for n in range(1, 10) if n != steps]), direction)
        else:
            # Reversing a move shifts the end by twice its steps, so the walk cannot end at the start.
            (axis,) = (axis for axis in _AXES if direction in axis)
            moves[i] = (steps, axis[1 - axis.index(direction)])
    text = ", ".join(f"{steps} step{'s' if steps > 1 else ''} {direction}" for steps, direction in moves)
    walk = Walk()
    for steps, direction in moves:
        walk.take(steps, DIRECTIONS[direction])
    return f"Take {text}.", "Yes" if returns else "No", walk.working


def shuffled_objects(rng: random.Random) -> tuple[str, str, str]:
    """Three holders and two swaps. The two are drawn independently, so each of the three things is equally likely.

    Worked as who holds what: all three at the start, then the two who swapped, and who is asked.
    """
    people, things = rng.sample(NAMES, 3), rng.sample(ITEMS, 3)
    holding = dict(zip(people, things, strict=True))
    start = ", ".join(f"{person} has the {thing}" for person, thing in holding.items())
    working = [" ".join(f"{person} {thing}" for person, thing in holding.items())]
    swaps = []
    for _ in range(2):
        a, b = rng.sample(people, 2)
        holding[a], holding[b] = holding[b], holding[a]
        swaps.append(f"{a} and {b} swap")
        working.append(f"{a} {holding[a]} {b} {holding[b]}")
    asked = rng.choice(people)
    text = f"{start}. {swaps[0]}, then {swaps[1]}. What does {asked} have?"
    working.append(f"{asked} {holding[asked]}")
    return text, holding[asked], ", ".join(working)


def table_lookup(rng: random.Random) -> tuple[str, str, str]:
    """A table of three people: a cell, the owner of a value, or an extreme. No value occurs twice in a column.

    Worked as the column in question beside the names and, where an extreme is asked for, its value.
    """
    names = rng.sample(NAMES, 3)
    ages = rng.sample(range(2, 10), 3)
    heights = rng.sample(range(40, 100, 5), 3)
    i = rng.randrange(3)
    question, answer, column, extreme = rng.choice((
        (f"How old is {names[i]}?", str(ages[i]), ages, None),
        (f"How tall is {names[i]}?", str(heights[i]), heights, None),
        (f"Who is {ages[i]} years old?", names[i], ages, None),
        (f"Who is {heights[i]} cm tall?", names[i], heights, None),
        ("Who is the oldest?", names[ages.index(max(ages))], ages, max(ages)),
        ("Who is the youngest?", names[ages.index(min(ages))], ages, min(ages)),
        ("Who is the tallest?", names[heights.index(max(heights))], heights, max(heights)),
        ("Who is the shortest?", names[heights.index(min(heights))], heights, min(heights)),
    ))  # fmt: skip
    working = " ".join(f"{name} {value}" for name, value in zip(names, column, strict=True))
    if extreme is not None:
        working += f", {extreme}"
    rows = "\n".join(f"{name}, {age}, {height}" for name, age, height in zip(names, ages, heights, strict=True))
    return f"name, age, height\n{rows}\n{question}", answer, working


def colored_objects(rng: random.Random) -> tuple[str, str, str]:
    """Four things in a row; the colour of one, told by its name, a neighbour or its end; worked by naming the thing."""
    things = rng.sample(ITEMS, 4)
    colors = rng.sample(COLORS, 4)
    target = rng.randrange(4)
    ways = [f"the {things[target]}"]
    if target > 0:
        ways.append(f"the item directly right of the {things[target - 1]}")
    if target < 3:
        ways.append(f"the item directly left of the {things[target + 1]}")
    if target == 0:
        ways.append("the leftmost item")
    if target == 3:
        ways.append("the rightmost item")
    row = ", ".join(with_article(f"{color} {thing}") for color, thing in zip(colors, things, strict=True))
    return f"In a row, left to right: {row}. What color is {rng.choice(ways)}?", colors[target], things[target]


_SHIFTS = (
    ("tomorrow", 1, 0), ("yesterday", -1, 0), ("in 2 days", 2, 0), ("2 days ago", -2, 0), ("in 3 days", 3, 0),
    ("3 days ago", -3, 0), ("in one week", 7, 0), ("one week ago", -7, 0), ("in one month", 0, 1),
    ("one month ago", 0, -1), ("in one year", 0, 12), ("one year ago", 0, -12),
)  # fmt: skip


def _wrapped(value: int, change: int, length: int) -> str:
    """`28+7=35-31=4`: a sum that passes the end of a month of `length` days, or of a year of 12 months."""
    result = value + change
    text = f"{value}{change:+}={result}"
    if result > length:
        return f"{text}-{length}={result - length}"
    return text if result > 0 else f"{text}+{length}={result + length}"


def _date_working(date: datetime.date, days: int, months: int) -> str:
    if days:
        # Backwards, the day is in the month before.
        month = date if days > 0 else date.replace(day=1) - datetime.timedelta(days=1)
        return _wrapped(date.day, days, calendar.monthrange(month.year, month.month)[1])
    if abs(months) == 12:
        return f"{date.year}{months // 12:+}={date.year + months // 12}"
    return _wrapped(date.month, months, 12)


def date_arithmetic(rng: random.Random) -> tuple[str, str, str]:
    """A day, some days, a week, a month or a year before or after a date; worked by the sum that changes it."""
    phrase, days, months = rng.choice(_SHIFTS)
    # If the month changes, use days that every month has: "one month ago" then has one meaning.
    first = datetime.date(1970, 1, 1)
    date = first + datetime.timedelta(days=rng.randrange(70 * 365))
    while months and date.day > 28:
        date = first + datetime.timedelta(days=rng.randrange(70 * 365))
    answer = months_later(date, months) if months else date + datetime.timedelta(days=days)
    verb = "was" if days + months < 0 else "is"
    text = f"Today is {date.strftime(US_DATE)}. What {verb} the date {phrase}?"
    return text, answer.strftime(US_DATE), _date_working(date, days, months)


def free_slot(rng: random.Random) -> tuple[str, str, str]:
    """A day of three or four stretches, given in any order but for one, which is the answer.

    Worked as the hours at which one stretch follows another, up to the gap: `7am 9am`.
    """
    person, places = rng.choice(NAMES), rng.sample(PLACES, rng.choice((2, 3)))
    hours = [rng.randint(5, 9)]
    for _ in range(len(places) + 1):
        hours.append(hours[-1] + rng.randint(1, 3))
    stretches = [f"{clock_hour(a)} to {clock_hour(b)}" for a, b in pairwise(hours)]
    gap = rng.randrange(len(stretches))
    free = stretches.pop(gap)
    working = " ".join(map(clock_hour, hours[: gap + 1]))
    rng.shuffle(stretches)
    busy = ", ".join(f"{place} {stretch}" for place, stretch in zip(places, stretches, strict=True))
    return f"{person} was up from {clock_hour(hours[0])} to {clock_hour(hours[-1])}: {busy}.", free, working


TASKS: tuple[GeneratedTask, ...] = (
    task(
        "navigate", navigate,
        description="Says whether a few moves, facing forward all the time, lead back to the start.",
        instruction="Do these moves, always facing forward, lead back to the start? Answer Yes or No.",
        max_new_tokens=48, allowed_answers=("Yes", "No"), worked=True,
    ),
    task(
        "tracking_shuffled_objects", shuffled_objects,
        description="Follows three objects through two swaps and names the one a person ends up with.",
        instruction="Name the object.",
        max_new_tokens=48, worked=True,
    ),
    task(
        "table_lookup", table_lookup,
        description="Answers a question about a table of three people with a name or a number.",
        instruction="Answer with a name or a number.",
        max_new_tokens=32, worked=True,
    ),
    task(
        "colored_objects", colored_objects,
        description="Names the color of one of four things in a row.",
        instruction="Answer with a color.",
        max_new_tokens=12, allowed_answers=COLORS, worked=True,
    ),
    task(
        "date_arithmetic", date_arithmetic,
        description="Gives the date some days, a week, a month or a year before or after a given one.",
        instruction="Give the date as MM/DD/YYYY.",
        max_new_tokens=36, worked=True,
    ),
    task(
        "temporal_sequences", free_slot,
        description="Finds the one stretch of a day that a person's schedule leaves free.",
        instruction="When was the person free? Answer like: 9am to 11am",
        max_new_tokens=32, worked=True,
    ),
)  # fmt: skip
