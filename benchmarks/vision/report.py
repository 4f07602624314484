"""Rows and ratios of `make bench-vision`: a ratio is the median of its rounds, the lowest of its batch sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.percentile import spread
from mtlora.cli.output import print_table

# Seconds of every round, by system and batch.
Seconds = Mapping[str, Mapping[int, Sequence[float]]]


@dataclass(frozen=True)
class Ratio:
    """Images a second of one system over those of another, its goal, and the batch sizes that it is taken at."""

    name: str
    over: str
    under: str
    goal: float
    batches: tuple[int, ...]


def make_report(images: int, seconds: Seconds, ratios: Sequence[Ratio]) -> dict[str, Any]:
    """Rows, and those of the ratios whose systems ran. images: of a round."""
    rows = [
        {"system": name, "batch": batch, "images_per_second": spread([images / each for each in values])}
        for name, batches in seconds.items()
        for batch, values in batches.items()
    ]
    found = {}
    for ratio in ratios:
        if ratio.over not in seconds or ratio.under not in seconds:
            continue
        by_batch = {
            batch: spread([b / a for a, b in zip(seconds[ratio.over][batch], seconds[ratio.under][batch], strict=True)])
            for batch in ratio.batches
        }
        lowest = min(each["median"] for each in by_batch.values())
        found[ratio.name] = {"goal": ratio.goal, "lowest": lowest, "by_batch": by_batch}
    return {"images": images, "rows": rows, "ratios": found}


def print_report(report: Mapping[str, Any], title: str, batch: str = "batch") -> None:
    """The table, and a line for each ratio. batch: what a batch is called."""
    rows = []
    for row in report["rows"]:
        rate = row["images_per_second"]
        rows.append((row["system"], row["batch"], *(f"{rate[key]:.1f}" for key in ("median", "min", "max"))))
    print_table(title, ("system", batch, "images/s, median", "min", "max"), rows)
    for name, ratio in report["ratios"].items():
        each = ", ".join(f"{size}: {found['median']:.2f}" for size, found in ratio["by_batch"].items())
        print(f"{name} by {batch}: {each} (goal {ratio['goal']:.2f})", flush=True)
