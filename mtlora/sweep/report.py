"""A sweep's results in one table: over seeds, with confidence intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mtlora.sweep.grid import run_folder
from mtlora.sweep.statistics import Estimate, accuracy, wilson

Result = dict[str, Any]


def summarise(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per configuration and task count, in the order of the results.

    `accuracy`: the mean over tasks and seeds with its bootstrap interval. `tasks`: each task's accuracy over the
    examples of all seeds, with its Wilson interval. `loss`: the answers' loss in the second half of the training steps;
    in the first epoch, these examples are new. `behind`: the distance to the most accurate row of the same tasks and
    seeds, None for that row. `common`: the mean over the tasks that every row has.
    """
    cells: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        cells.setdefault((result["name"], result["num_tasks"]), []).append(result)
    shared = set.intersection(*(set(result["tasks"]) for result in results))
    common = [task for task in results[0]["tasks"] if task in shared]
    rows = [_row(name, count, cell, common) for (name, count), cell in cells.items()]
    for row, cell in zip(rows, cells.values(), strict=True):
        rivals = [r for r in rows if r["seeds"] == row["seeds"] and r["tasks"].keys() == row["tasks"].keys()]
        best = max(rivals, key=lambda rival: rival["accuracy"]["mean"])
        row["behind"] = None if best is row else _behind(best, cells[best["name"], best["num_tasks"]], row, cell)
    return rows


def _behind(best: dict[str, Any], ahead: list[Result], row: dict[str, Any], cell: list[Result]) -> dict[str, Any]:
    tasks = list(row["tasks"])
    difference = _accuracy(ahead, tasks) - _accuracy(cell, tasks)
    return {"best": best["name"], "mean": difference.value, "interval": difference.interval}


def _row(name: str, count: int, cell: list[Result], common: list[str]) -> dict[str, Any]:
    tasks = {}
    for task in cell[0]["tasks"]:
        correct = sum(result["tasks"][task]["correct"] for result in cell)
        total = sum(result["tasks"][task]["total"] for result in cell)
        tasks[task] = {"accuracy": correct / total, "interval": wilson(correct, total), "total": total}
    return {
        "name": name,
        "num_tasks": count,
        "seeds": [result["seed"] for result in cell],
        "parameters": cell[0]["parameters"],
        "steps": cell[0]["steps"],
        "seconds": fmean(result["seconds"] for result in cell),
        "tokens_per_second": fmean(result["tokens_per_second"] for result in cell),
        "loss": fmean(result["loss"] for result in cell),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in cell),
        "accuracy": _mean(cell, list(tasks)),
        "common": _mean(cell, common) if common else None,
        "tasks": tasks,
    }


def marks_of(result: Result, tasks: Sequence[str]) -> list[tuple[str, str]]:
    """A result's part of `Marks`."""
    return [(result["tasks"][task]["examples"], result["tasks"][task]["right"]) for task in tasks]


def _accuracy(cell: list[Result], tasks: list[str]) -> Estimate:
    return accuracy([marks_of(result, tasks) for result in cell])


def _mean(cell: list[Result], tasks: list[str]) -> dict[str, Any]:
    found = _accuracy(cell, tasks)
    return {"mean": found.value, "interval": found.interval, "tasks": len(tasks)}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The summary, then a table of every task's accuracy for each number of tasks."""
    lines = [
        "| configuration | tasks | seeds | parameters | steps | seconds | tokens/s | peak memory | loss "
        "| accuracy (95 %) | behind the best (95 %) |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --- | --- |",
    ]
    lines += [
        f"| {row['name']} | {row['num_tasks']} | {len(row['seeds'])} | {row['parameters']:,} | {row['steps']} "
        f"| {row['seconds']:.0f} | {row['tokens_per_second']:.0f} | {row['peak_memory_bytes'] / 2**30:.2f} GiB "
        f"| {row['loss']:.3f} | {_interval(row['accuracy']['mean'], row['accuracy']['interval'])} "
        f"| {_difference(row['behind'])} |"
        for row in rows
    ]
    for count in sorted({row["num_tasks"] for row in rows}):
        columns = [row for row in rows if row["num_tasks"] == count]
        tasks = list(dict.fromkeys(task for row in columns for task in row["tasks"]))
        lines += ["", f"| {count} tasks | " + " | ".join(row["name"] for row in columns) + " |"]
        lines.append("| --- |" + " --- |" * len(columns))
        for task in tasks:
            found = [row["tasks"].get(task) for row in columns]
            cells = [_interval(cell["accuracy"], cell["interval"]) if cell else "" for cell in found]
            lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _difference(behind: dict[str, Any] | None) -> str:
    return "{:.3f} ({:+.3f} to {:+.3f})".format(behind["mean"], *behind["interval"]) if behind else ""


def _interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f}–{interval[1]:.2f})"


def write_report(results: Sequence[Result], out: Path) -> list[Path]:
    """Write results.json, .md and .png, losses.png and, with several task counts, scaling.png; returns their paths.

    out: the sweep's folder, where the runs' logs are.
    """
    from mtlora.plot.curves import read_log
    from mtlora.plot.sweep import plot_losses, plot_methods, plot_scaling
    from mtlora.train.state import LOG

    rows = summarise(results)
    files = [out / name for name in ("results.json", "results.md", "results.png", "losses.png")]
    files[0].write_text(json.dumps({"rows": rows, "runs": list(results)}, indent=1) + "\n")
    files[1].write_text(markdown(rows))
    plot_methods(rows, files[2])
    most = max(row["num_tasks"] for row in rows)
    logs: dict[str, list[list[Result]]] = {}
    for result in results:
        if result["num_tasks"] == most and result["steps"]:
            folder = run_folder(out, result["name"], most, result["seed"])
            logs.setdefault(result["name"], []).append(read_log(folder / LOG))
    plot_losses(logs, files[3])
    if len({row["num_tasks"] for row in rows}) > 1:
        files.append(out / "scaling.png")
        plot_scaling(rows, files[-1])
    return files
