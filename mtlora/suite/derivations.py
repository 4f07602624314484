"""Derivations shared by the built-in tasks and BIG-Bench Hard's: expressions, and walks on a plane."""

from collections.abc import Sequence

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
        """Walk `steps` in a direction, counted the same way."""
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
