"""A chart of a training run's log."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mtlora.errors import MtLoRAError
from mtlora.plot.figure import COLOURS, clean, figure, smoothed


def read_log(file: Path) -> list[dict[str, Any]]:
    """The records of a `log.jsonl`. Raises MtLoRAError naming a line that is not a record."""
    records = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise MtLoRAError(f"{file}: line {number}: {error}") from None
        if not isinstance(record, dict) or "step" not in record:
            raise MtLoRAError(f"{file}: line {number}: not a record of a step")
        records.append(record)
    if not any("loss" in record for record in records):
        raise MtLoRAError(f"{file}: no step in it")
    return records


def plot_curves(records: list[dict[str, Any]], out: Path) -> None:
    """Loss, accuracy, regularizers, learning rate and gradient norm over the steps."""
    steps = [record for record in records if "loss" in record]
    checks = [record for record in records if "validation_loss" in record]
    with figure(out, 2, 3, size=(13, 6.4), sharex=True) as (_, axes):
        _line(axes[0][0], steps, "loss", "training", COLOURS[0])
        if checks:
            at = [record["step"] for record in checks]
            axes[0][0].plot(at, [r["validation_loss"] for r in checks], marker="o", markersize=3, color=COLOURS[1],
                            label="validation")  # fmt: skip
            axes[0][1].plot(at, [r["validation_accuracy"] for r in checks], marker="o", markersize=3, color=COLOURS[1])
            tasks = list(checks[-1].get("validation_accuracy_by_task", {}))
            for task in tasks:
                by_step = [r["validation_accuracy_by_task"].get(task, np.nan) for r in checks]
                axes[0][1].plot(at, by_step, color=COLOURS[6], alpha=0.3, linewidth=0.8, zorder=1)
            axes[0][1].set_ylim(0, 1.02)
        axes[0][0].legend(frameon=False, fontsize=9)
        axes[0][0].set_yscale("log")
        _line(axes[0][2], steps, "tokens_per_second", None, COLOURS[2])
        _line(axes[1][0], steps, "balance", "balance", COLOURS[0])
        _line(axes[1][0], steps, "spectral", "spectral", COLOURS[1])
        axes[1][0].legend(frameon=False, fontsize=9)
        _line(axes[1][1], steps, "grad_norm", None, COLOURS[3])
        axes[1][1].set_yscale("log")
        axes[1][2].plot([r["step"] for r in steps], [r["learning_rate"] for r in steps], color=COLOURS[0])
        titles = ("loss", "validation accuracy (grey: single tasks)", "tokens a second", "regularizers, unweighted",
                  "gradient norm, before clipping", "learning rate")  # fmt: skip
        for i, (panel, title) in enumerate(zip(axes.flat, titles, strict=True)):
            clean(panel, title, "step" if i >= 3 else "")


def _line(panel: Any, steps: list[dict[str, Any]], key: str, name: str | None, colour: str) -> None:
    """Draw the values faintly, and their running mean."""
    found = [(record["step"], record[key]) for record in steps if key in record]
    if not found:
        return
    at, values = np.array(found, dtype=float).T
    panel.plot(at, values, color=colour, alpha=0.2, linewidth=0.6)
    mean = smoothed(values)
    panel.plot(at[len(at) - len(mean) :], mean, color=colour, linewidth=1.5, label=name)
