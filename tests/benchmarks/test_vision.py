"""`make bench-vision`: its ratios."""

import pytest

from benchmarks.vision import BATCHES, make_report

SECONDS = {
    "bare": {batch: [2.0, 4.0, 1.0] for batch in BATCHES},
    "25 tasks": {batch: [2.0, 4.0, 2.0] for batch in BATCHES} | {64: [4.0, 8.0, 2.0]},
    "25 adapters": {batch: [2.5, 5.0, 1.25] for batch in BATCHES},
    "hf": {16: [3.0, 6.0, 1.5]},
}


def test_ratios_are_taken_round_by_round_and_the_lowest_batch_size_counts() -> None:
    ratios = make_report(10, SECONDS)["ratios"]
    assert [ratios["25 tasks/bare"]["by_batch"][batch]["median"] for batch in BATCHES] == [1, 1, 1, 0.5]
    assert ratios["25 tasks/bare"]["lowest"] == 0.5
    assert ratios["25 adapters/bare"]["lowest"] == pytest.approx(0.8)
    assert ratios["bare/hf"]["lowest"] == pytest.approx(1.5)
    assert set(ratios["bare/hf"]["by_batch"]) == {16}
    assert "bare/onnx" not in ratios


def test_rows_are_images_a_second() -> None:
    rows = {(row["system"], row["batch"]): row["images_per_second"] for row in make_report(10, SECONDS)["rows"]}
    assert len(rows) == 3 * len(BATCHES) + 1
    assert rows["bare", 1] == {"median": 5, "min": 2.5, "max": 10}
