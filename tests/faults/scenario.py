"""Options of a fault scenario, and the row that it reports."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Options of a scenario. folder: empty, for this scenario alone. full: at full length, not in the short form."""

    backbone: str
    adapters: Path
    folder: Path
    seed: int
    full: bool


@dataclass(frozen=True)
class Row:
    """One row of the table: the goal, the measured figure, and whether it meets the goal."""

    name: str
    goal: str
    figure: str
    met: bool
