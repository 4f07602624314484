"""Shared by all charts: a backend that needs no screen, colours, and style."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

INK, GRID, MUTED = "#222222", "#e5e7ea", "#c7ccd1"
# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008); the project's blue first.
COLOURS = ("#1f6f8b", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8d979f", "#f0e442")
HEAT = "viridis"
_SMOOTHED_STEPS = 50


@contextmanager
def figure(out: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float], **kwargs: Any) -> Iterator[Any]:
    """(figure, axes [rows, columns]) to draw on; written to `out`, in the format of its suffix, at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **kwargs)
    try:
        yield made, axes
        out.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(out, dpi=130)
    finally:
        plt.close(made)


def clean(axes: Any, title: str, x_label: str = "") -> None:
    """Set the title, a light grid and no box."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x_label)
    axes.grid(color=GRID, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def label(task: str) -> str:
    """A task id in the form of an axis label."""
    return task.replace("_", " ")


def smoothed(values: Sequence[float]) -> np.ndarray:
    """The running mean over a tenth of the steps, at most 50; the result is shorter by window - 1."""
    window = min(_SMOOTHED_STEPS, max(1, len(values) // 10))
    return np.convolve(values, np.ones(window) / window, mode="valid")
