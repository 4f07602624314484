"""Jain's index of fairness."""

from collections.abc import Iterable


def jain(shares: Iterable[float]) -> float:
    """(Σx)² / (n·Σx²): 1 where all have the same, 1/n where one has everything. 1 for none and for all zero."""
    xs = list(shares)
    squares = sum(x * x for x in xs)
    return sum(xs) ** 2 / (len(xs) * squares) if squares else 1.0
