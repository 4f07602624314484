"""A picture with one example image of each task and its answer."""

from collections.abc import Sequence
from pathlib import Path

from mtlora.plot.figure import COLOURS, INK, figure, label
from mtlora.suite.base import Example
from mtlora.suite.vision.pixels import read_pixels

_COLUMNS = 7


def plot_gallery(examples: Sequence[Example], answers: Sequence[str], out: Path) -> None:
    """Draw the first example of each task with its answer; a wrong answer is shown with the correct one."""
    first: dict[str, tuple[Example, str]] = {}
    for example, answer in zip(examples, answers, strict=True):
        first.setdefault(example.task_id, (example, answer))
    rows = -(-len(first) // _COLUMNS)
    with figure(out, rows, _COLUMNS, size=(1.55 * _COLUMNS, 1.95 * rows)) as (_, axes):
        for panel in axes.flat:
            panel.axis("off")
        for panel, (example, answer) in zip(axes.flat, first.values(), strict=False):
            panel.imshow(read_pixels(example))
            panel.set_title(label(example.task_id), fontsize=8, color=INK)
            right = answer == example.target
            told = answer if right else f"{answer} ({example.target})"
            panel.text(0.5, -0.04, told, ha="center", va="top", fontsize=8, transform=panel.transAxes,
                       color=COLOURS[2] if right else COLOURS[5])  # fmt: skip
