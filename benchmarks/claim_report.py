"""The claim's tables and pictures, with intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mtlora.plot.figure import COLOURS, MUTED, clean, figure
from mtlora.sweep.statistics import Counts, bootstrap_mean, bootstrap_recovery

UPPER, LOWER = "one adapter each task", "linear heads alone"
Result = dict[str, Any]


def write_claim(results: Sequence[Result], out: Path) -> None:
    """Write claim.json, claim.md, claim.png (accuracy against tasks) and recovery.png."""
    rows = summarise(results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "claim.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "claim.md").write_text(markdown(rows))
    for key, label in (("accuracy", "accuracy"), ("recovery", "(method - lower) / (upper - lower)")):
        _plot(rows, key, label, out / ("claim.png" if key == "accuracy" else "recovery.png"))


def summarise(results: Sequence[Result]) -> list[Result]:
    """A row for each part, method and number of tasks, over its seeds; `recovery` where both bounds are there."""
    single = {(task, r["seed"]): count for r in results if r["part"] == "upper" for task, count in _by_task(r).items()}
    cells: dict[tuple[str, str, int], list[Result]] = {}
    for result in results:
        if result["part"] != "upper":
            cells.setdefault((result["part"], result["name"], result["num_tasks"]), []).append(result)
    rows = []
    for (part, name, number), cell in cells.items():
        tasks, seeds = list(cell[0]["tasks"]), [r["seed"] for r in cell]
        counts = [list(_by_task(r).values()) for r in cell]
        row: Result = {
            "part": part, "name": name, "num_tasks": number, "seeds": seeds, "parameters": cell[0]["parameters"],
            "rate": cell[0]["config"]["learning_rate"], **_accuracy(counts),
        }  # fmt: skip
        lower = {r["seed"]: r for r in cells.get((part, LOWER, number), [])}
        if all(seed in lower and all((task, seed) in single for task in tasks) for seed in seeds):
            below = [list(_by_task(lower[seed]).values()) for seed in seeds]
            above = [[single[task, seed] for task in tasks] for seed in seeds]
            row["upper"] = _accuracy(above)["accuracy"]
            if row["upper"][0] > _accuracy(below)["accuracy"][0]:
                row["recovery"] = bootstrap_recovery(counts, below, above)
        rows.append(row)
    return rows


def _by_task(result: Result) -> dict[str, tuple[int, int]]:
    return {task: (found["correct"], found["total"]) for task, found in result["tasks"].items()}


def _accuracy(counts: Counts) -> Result:
    return {"accuracy": (fmean(c / t for seed in counts for c, t in seed), *bootstrap_mean(counts))}


def markdown(rows: Sequence[Result]) -> str:
    """A table for each part: a row for each method, a column for each number of tasks."""
    lines: list[str] = []
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        numbers = sorted({row["num_tasks"] for row in own})
        lines += [
            f"### {part}",
            "",
            "| method | parameters | rate | " + " | ".join(f"{n} tasks" for n in numbers) + " |",
        ]
        lines.append("| --- | --: | --: |" + " --- |" * len(numbers))
        for name in dict.fromkeys(row["name"] for row in own):
            by_number = {row["num_tasks"]: row for row in own if row["name"] == name}
            first = next(iter(by_number.values()))
            cells = [_cell(by_number[n]) if n in by_number else "" for n in numbers]
            lines.append(f"| {name} | {first['parameters']:,} | {first['rate']:g} | " + " | ".join(cells) + " |")
        uppers = [
            next((row["upper"] for row in own if row["num_tasks"] == n and "upper" in row), None) for n in numbers
        ]
        if any(uppers):
            told = ["{:.3f} ({:.3f} to {:.3f})".format(*upper) if upper else "" for upper in uppers]
            lines.append(f"| {UPPER} | | | " + " | ".join(told) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: Result) -> str:
    text = "{:.3f} ({:.3f} to {:.3f}), {} seeds".format(*row["accuracy"], len(row["seeds"]))
    return text + ("; R {:.2f} ({:.2f} to {:.2f})".format(*row["recovery"]) if "recovery" in row else "")


def _plot(rows: Sequence[Result], key: str, label: str, out: Path) -> None:
    parts = [part for part in ("told", "shared") if any(row["part"] == part and key in row for row in rows)]
    if not parts:
        return
    with figure(out, 1, len(parts), size=(6.5 * len(parts), 4.6), sharey=True) as (_, axes):
        for panel, part in zip(axes[0], parts, strict=True):
            names = list(dict.fromkeys(row["name"] for row in rows if row["part"] == part))
            for i, name in enumerate(names):
                shown = sorted(
                    (row for row in rows if row["part"] == part and row["name"] == name and key in row),
                    key=lambda row: row["num_tasks"],
                )
                if not shown:
                    continue
                means = [row[key][0] for row in shown]
                spread = [
                    [max(0.0, row[key][0] - row[key][1]) for row in shown],
                    [max(0.0, row[key][2] - row[key][0]) for row in shown],
                ]
                at = [row["num_tasks"] + 0.12 * (i - len(names) / 2) for row in shown]
                colour = MUTED if name == LOWER else COLOURS[i % len(COLOURS)]
                panel.errorbar(at, means, spread, color=colour, marker="o", markersize=4, capsize=2, label=name,
                               linestyle="--" if i >= len(COLOURS) else "-")  # fmt: skip
            clean(panel, f"{label}, {part}", "tasks")
        axes[0][-1].legend(frameon=False, fontsize=7)
