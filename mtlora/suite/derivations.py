"""What the built-in tasks share with BIG-Bench Hard's: expressions, brackets, walks on a plane, days and hours."""

import datetime
import random
from collections.abc import Sequence

US_DATE = "%m/%d/%Y"
CLOSER = {"(": ")", "[": "]", "{": "}", "<": ">"}

# Clockwise, from straight ahead.
_COMPASS = "NESW"
DIRECTIONS = {"forward": 0, "right": 1, "backward": 2, "left": 3}


def or_of_ands(values: Sequence[bool], operators: Sequence[str]) -> bool:
    """The value of an expression without brackets: `and` binds tighter than `or`."""
    groups = [[values[0]]]
    for operator, value in zip(operators, values[1:], strict=True):
        if operator == "or":
            groups.append([value])
        else:
            groups[-1].append(value)
    return any(all(group) for group in groups)


def draw_brackets(rng: random.Random, length: int, closing: float) -> tuple[list[str], list[str]]:
    """(`length` brackets, those that are open at the end). closing: how often one closes where it can."""
    symbols: list[str] = []
    stack: list[str] = []
    for _ in range(length):
        if stack and rng.random() < closing:
            symbols.append(CLOSER[stack.pop()])
        else:
            stack.append(rng.choice("([{<"))
            symbols.append(stack[-1])
    return symbols, stack


def closed(stack: Sequence[str]) -> str:
    """The brackets that close the open ones."""
    return " ".join(CLOSER[opener] for opener in reversed(stack))


def with_article(noun: str) -> str:
    """The noun after `a` or `an`, by its first letter; that is right for every noun of the word lists."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def months_later(date: datetime.date, months: int) -> datetime.date:
    """The same day that many months on, or the month's last one."""
    index = date.year * 12 + date.month - 1 + months
    last = datetime.date((index + 1) // 12, (index + 1) % 12 + 1, 1) - datetime.timedelta(days=1)
    return last.replace(day=min(date.day, last.day))


def clock_hour(hour: int) -> str:
    """An hour from 0 to 23 as `9am` or `1pm`."""
    return f"{(hour - 1) % 12 + 1}{'am' if hour < 12 else 'pm'}"


class Walk:
    """The working of a walk: the steps in each direction so far, and whether opposite directions are equal.

    Example: `W2 S4 W2+3=5, N0 S4 differ, E0 W5 differ`; a turn is a single letter. Counts are never negative, and each
    sum and comparison stands beside its terms, because a small model can compute in one token only from tokens nearby.
    """

    def __init__(self) -> None:
        self._totals = dict.fromkeys("NSEW", 0)
        self._steps: list[str] = []

    def turn(self, heading: int) -> None:
        """Face a direction, counted clockwise from straight ahead."""
        self._steps.append(_COMPASS[heading])

    def take(self, steps: int, heading: int) -> None:
        """Walk `steps` in a direction, counted clockwise from straight ahead."""
        way = _COMPASS[heading]
        before = self._totals[way]
        self._totals[way] += steps
        self._steps.append(f"{way}{before}+{steps}={before + steps}" if before else f"{way}{steps}")

    @property
    def returns(self) -> bool:
        """Whether the walk ends at its start."""
        return all(self._totals[there] == self._totals[back] for there, back in ("NS", "EW"))

    @property
    def working(self) -> str:
        """The steps, the totals and their comparison."""
        totals = self._totals
        pairs = [
            f"{there}{totals[there]} {back}{totals[back]} {'same' if totals[there] == totals[back] else 'differ'}"
            for there, back in ("NS", "EW")
        ]
        return f"{' '.join(self._steps)}, {', '.join(pairs)}"
