"""Walks on a plane, worked out in a form that a small model can follow."""

# Clockwise from straight on.
_COMPASS = "NESW"
DIRECTIONS = {"forward": 0, "right": 1, "backward": 2, "left": 3}


class Walk:
    """A walk worked out as what has been walked each way so far: `W2 S4 W5, N0 S4 E0 W5`. A turn is a letter alone.

    Sums of counts, which never pass zero, and most of them of one term: a small model adds those, not signed numbers.
    """

    def __init__(self) -> None:
        self._totals = dict.fromkeys("NSEW", 0)
        self._steps: list[str] = []

    def turn(self, heading: int) -> None:
        """Face a way, counted clockwise from straight on."""
        self._steps.append(_COMPASS[heading])

    def take(self, steps: int, heading: int) -> None:
        """Go so many steps a way, counted so."""
        way = _COMPASS[heading]
        self._totals[way] += steps
        self._steps.append(f"{way}{self._totals[way]}")

    @property
    def returns(self) -> bool:
        """Whether it ends where it began."""
        return self._totals["N"] == self._totals["S"] and self._totals["E"] == self._totals["W"]

    @property
    def working(self) -> str:
        """The steps, and all four totals."""
        return f"{' '.join(self._steps)}, {' '.join(f'{way}{total}' for way, total in self._totals.items())}"
