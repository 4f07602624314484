"""The claim's tables from results of runs, and its cells."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.claim import METHODS, SMOKE, Claim, Size
from benchmarks.claim_report import LOWER, UPPER, markdown, summarise, write_claim
from mtlora.sweep.statistics import bootstrap_recovery


def _result(part: str, name: str, accuracy: float, tasks: tuple[str, ...], seed: int) -> dict[str, Any]:
    return {
        "part": part, "name": name, "num_tasks": len(tasks), "seed": seed, "parameters": 1000,
        "config": {"learning_rate": 7e-4},
        "tasks": {task: {"correct": round(40 * accuracy), "total": 40} for task in tasks},
    }  # fmt: skip


def test_recovery_lies_between_the_bounds_of_the_same_tasks(tmp_path: Path) -> None:
    tasks = ("a", "b")
    results = [_result("upper", UPPER, 0.9, (task,), seed) for seed in (0, 1) for task in tasks]
    for seed in (0, 1):
        results.append(_result("told", LOWER, 0.5, tasks, seed))
        results.append(_result("told", "LoRA q,v", 0.7, tasks, seed))
    results.append(_result("shared", "LoRA q,v", 0.6, tasks, 0))
    rows = {(row["part"], row["name"]): row for row in summarise(results)}
    mean, low, high = rows["told", "LoRA q,v"]["recovery"]
    assert mean == pytest.approx(0.5)
    assert low < 0.5 < high
    assert rows["told", LOWER]["recovery"][0] == 0
    # Without its lower bound, a part has accuracies alone.
    assert "recovery" not in rows["shared", "LoRA q,v"]
    assert rows["shared", "LoRA q,v"]["accuracy"][0] == pytest.approx(0.6)
    text = markdown(list(rows.values()))
    assert "| LoRA q,v | 1,000 | 0.0007 | 0.700" in text
    assert f"| {UPPER} | | | 0.900" in text
    write_claim(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"claim.json", "claim.md", "claim.png", "recovery.png"}


def test_recovery_needs_the_same_seeds() -> None:
    with pytest.raises(ValueError, match="expected the same seeds"):
        bootstrap_recovery([[(1, 2)]], [[(1, 2)], [(1, 2)]], [[(1, 2)]])
    with pytest.raises(ValueError, match="leave nothing to recover"):
        bootstrap_recovery([[(1, 2)]], [[(1, 2)]], [[(1, 2)]])


def test_every_cell_is_a_configuration_that_training_takes(tmp_path: Path) -> None:
    for size in (SMOKE, Size()):
        claim = Claim(tmp_path, tmp_path, size, 1)
        cells = list(claim._cells(dict.fromkeys(size.methods, 0.0007)))
        assert len({(part, name, config.tasks, config.seed) for part, name, config in cells}) == len(cells)
    parts = {part for part, _, _ in cells}
    assert {"upper", "told", "shared", "maps-4-own", "maps-64-words"} <= parts
    told = [
        name for part, name, config in cells if part == "told" and config.seed == 0 and len(config.tasks or ()) == 25
    ]
    assert set(told) == {LOWER, *METHODS}
    assert not any("task bias" in name for part, name, _ in cells if part == "shared")
