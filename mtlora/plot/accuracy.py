"""A chart of a checkpoint's scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtlora.plot.figure import COLOURS, GRID, INK, MUTED, figure, label


def plot_accuracy(evaluation: Mapping[str, Any], out: Path) -> None:
    """Draw, per task, the accuracy of adapter and backbone alone as bars, and of the most frequent answer as a mark.

    `evaluation` comes from a manifest or from `mtlora eval --json`. The format follows `out`'s suffix.
    """
    adapter, alone = evaluation["adapter"], evaluation.get("backbone_alone")
    tasks = sorted(adapter["tasks"], key=lambda task: (adapter["tasks"][task]["accuracy"], task))
    rows = range(len(tasks))
    found = [adapter["tasks"][task] for task in tasks]
    with figure(out, size=(8, 0.29 * len(tasks) + 1.2)) as (made, ((axes,),)):
        axes.barh(
            rows,
            [task["accuracy"] for task in found],
            height=0.62,
            color=COLOURS[0],
            label="with the adapter",
            zorder=2,
        )
        if alone:
            axes.barh(
                rows, [alone["tasks"][task]["accuracy"] for task in tasks], height=0.3, color=MUTED, zorder=3,
                label="backbone alone",
            )  # fmt: skip
        axes.scatter(
            [task["majority"] / task["total"] for task in found], list(rows), marker="|", s=90, color=INK, zorder=4,
            label="always the most frequent answer",
        )  # fmt: skip
        axes.set_yticks(list(rows), [label(task) for task in tasks], fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(tasks) - 0.4)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="x", color=GRID, zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        title = f"{len(tasks)} tasks, one adapter: mean accuracy {adapter['mean_accuracy']:.0%}"
        if alone:
            title += f", backbone alone {alone['mean_accuracy']:.0%}"
        axes.set_title(title, loc="left", fontsize=11)
        made.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
