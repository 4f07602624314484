"""What a fault scenario is given and what it reports."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """How to run: `full` is full length, otherwise the short form; `folder` is empty and the scenario's own."""

    backbone: str
    adapters: Path
    folder: Path
    seed: int
    full: bool


@dataclass(frozen=True)
class Row:
    """One row of the table: what must hold, what was found, and whether it held."""

    name: str
    goal: str
    figure: str
    met: bool
