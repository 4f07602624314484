"""The claim's tables, with its decisions, and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claim.cells import LOWER, UPPER, Cells, Result
from benchmarks.claim.decisions import decide, map_ceiling
from mtlora.plot.figure import COLOURS, MUTED, clean, figure
from mtlora.sweep.statistics import Estimate


def write_claim(results: Sequence[Result], diverged: Sequence[str], out: Path) -> None:
    """Write claim.json, claim.md, claim.png (accuracy against tasks) and recovery.png.

    diverged: the cells that gave no result, in words.
    """
    cells = Cells(results)
    rows, decisions = summarise(cells), decide(cells)
    out.mkdir(parents=True, exist_ok=True)
    report = {"decisions": decisions, "rows": rows, "diverged": list(diverged)}
    (out / "claim.json").write_text(json.dumps(report, indent=1) + "\n")
    left_out = ["### diverged", "", *(f"- {each}" for each in diverged), ""] if diverged else []
    (out / "claim.md").write_text("\n".join([decided(decisions), markdown(rows), *left_out]))
    for key, label in (("accuracy", "accuracy"), ("recovery", "(method - lower) / (upper - lower)")):
        _plot(rows, key, label, out / ("claim.png" if key == "accuracy" else "recovery.png"))


def summarise(cells: Cells) -> list[Result]:
    """A row for each part, method and number of tasks, over its seeds; `recovery` where both bounds are there."""
    rows = []
    for key in cells.keys:
        part, name, number = key
        seeds, first = cells.seeds(key), cells.first(key)
        row: Result = {
            "part": part, "name": name, "num_tasks": number, "seeds": seeds, "parameters": first["parameters"],
            "rate": first["config"]["learning_rate"], "accuracy": _numbers(cells.accuracy(key, seeds)),
        }  # fmt: skip
        if cells.seeds(key, bounded=True) == seeds:
            row["upper"] = _numbers(cells.upper(key, seeds))
            if found := cells.recovery(key, seeds):
                row["recovery"] = _numbers(found)
        if part.startswith("maps-") and part.endswith("-words"):
            row["ceiling"] = map_ceiling(number)
        rows.append(row)
    return rows


def _numbers(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, *estimate.interval


def decided(decisions: Sequence[Result]) -> str:
    """The table of decisions."""
    lines = [
        "### decisions",
        "",
        "| question | verdict | seeds | statistic (95 %) | of |",
        "| --- | --- | --- | --- | --- |",
    ]
    for each in decisions:
        numbers = [f"{name}: {_text(number)}" for name, number in each["numbers"].items() if number is not None]
        value = "" if each["value"] is None else _text((each["value"], *each["interval"]))
        cells = [each["question"], each["verdict"], ", ".join(map(str, each["seeds"]))]
        cells += [f"{each['statistic']}: {value}", "; ".join(numbers)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _text(numbers: float | Sequence[float]) -> str:
    return f"{numbers:.3f}" if isinstance(numbers, float) else "{:.3f} ({:.3f} to {:.3f})".format(*numbers)


def markdown(rows: Sequence[Result]) -> str:
    """A table for each part: a row per method, a column per number of tasks."""
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
            told = [_text(upper) if upper else "" for upper in uppers]
            lines.append(f"| {UPPER} | | | " + " | ".join(told) + " |")
        if "ceiling" in own[0]:
            lines.append(f"| the most frequent word of each figure | | | {own[0]['ceiling']:.3f} |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: Result) -> str:
    text = f"{_text(row['accuracy'])}, {len(row['seeds'])} seeds"
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
            panel.set_xticks(sorted({row["num_tasks"] for row in rows if row["part"] == part}))
        axes[0][-1].legend(frameon=False, fontsize=7)
