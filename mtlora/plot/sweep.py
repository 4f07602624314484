"""Charts of a sweep: the methods side by side, their losses, and accuracy against the number of tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtlora.plot.figure import COLOURS, INK, clean, figure, smoothed

Row = dict[str, Any]


def plot_methods(rows: Sequence[Row], out: Path) -> None:
    """Accuracy with its interval, parameters, seconds and peak memory of every configuration, at the most tasks."""
    most = max(row["num_tasks"] for row in rows)
    shown = [row for row in rows if row["num_tasks"] == most][::-1]
    names = [row["name"] for row in shown]
    panels = [
        ("accuracy (95 %)", [row["accuracy"]["mean"] for row in shown], "{:.2f}"),
        ("parameters, millions", [row["parameters"] / 1e6 for row in shown], "{:.2f}"),
        ("training, seconds", [row["seconds"] for row in shown], "{:.0f}"),
        ("peak memory, GiB", [row["peak_memory_bytes"] / 2**30 for row in shown], "{:.2f}"),
    ]
    with figure(out, 1, len(panels), size=(13, 0.42 * len(shown) + 1.3), sharey=True) as (made, axes):
        for panel, (title, values, form) in zip(axes[0], panels, strict=True):
            panel.barh(names, values, height=0.62, color=COLOURS[0], zorder=2)
            for y, value in enumerate(values):
                panel.text(0.015, y, form.format(value), va="center", fontsize=8, color=INK, zorder=4,
                           transform=panel.get_yaxis_transform(),
                           bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5})  # fmt: skip
            clean(panel, title)
        for y, row in enumerate(shown):
            mean, (low, high) = row["accuracy"]["mean"], row["accuracy"]["interval"]
            axes[0][0].errorbar(
                mean, y, xerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]], color=INK, capsize=3, zorder=3
            )
        seeds = max(len(row["seeds"]) for row in shown)
        made.suptitle(f"{most} tasks, {seeds} seed{'s' if seeds > 1 else ''}, equal budgets", x=0.01, ha="left")


def plot_losses(logs: Mapping[str, Sequence[Sequence[Row]]], out: Path) -> None:
    """Draw the smoothed training loss over steps: each configuration's seeds in light colour, and their mean.

    logs: the records of each seed's log, by configuration.
    """
    with figure(out, size=(7.5, 4.4)) as (_, axes):
        panel = axes[0][0]
        for i, (name, seeds) in enumerate(logs.items()):
            colour = COLOURS[i % len(COLOURS)]
            losses = [[record["loss"] for record in log if "loss" in record] for log in seeds]
            fewest = min(map(len, losses))
            curves = [smoothed(seed[:fewest]) for seed in losses]
            steps = range(fewest - len(curves[0]) + 1, fewest + 1)
            for curve in curves if len(curves) > 1 else ():
                panel.plot(steps, curve, color=colour, alpha=0.25, linewidth=0.7)
            panel.plot(steps, np.mean(curves, axis=0), color=colour, linewidth=1.6, label=name)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.legend(frameon=False, fontsize=9)
        clean(panel, "loss of answers in training, running mean", "step")


def plot_scaling(rows: Sequence[Row], out: Path) -> None:
    """Accuracy against the number of tasks: over all tasks, and over the tasks that every run has."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    fewest = min(row["num_tasks"] for row in rows)
    panels = [("accuracy", "mean over all tasks"), ("common", f"mean over the same {fewest} tasks")]
    with figure(out, 1, 2, size=(11, 4.4), sharey=True) as (made, axes):
        for panel, (key, title) in zip(axes[0], panels, strict=True):
            for i, name in enumerate(names):
                shown = sorted((row for row in rows if row["name"] == name), key=lambda row: row["num_tasks"])
                shown = [row for row in shown if row[key]]
                means = [row[key]["mean"] for row in shown]
                below = [max(0.0, row[key]["mean"] - row[key]["interval"][0]) for row in shown]
                above = [max(0.0, row[key]["interval"][1] - row[key]["mean"]) for row in shown]
                # Shift the points, so that they do not cover each other.
                shift = 0.25 * (i - (len(names) - 1) / 2)
                panel.errorbar(
                    [row["num_tasks"] + shift for row in shown], means, yerr=[below, above], marker="o", markersize=4,
                    capsize=2, linewidth=1.5, color=COLOURS[i % len(COLOURS)],
                    label=name if panel is axes[0][0] else None,
                )  # fmt: skip
            panel.set_xticks(sorted({row["num_tasks"] for row in rows}))
            clean(panel, title, "tasks trained together")
        axes[0][0].set_ylabel("accuracy, test split (95 %)")
        made.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
