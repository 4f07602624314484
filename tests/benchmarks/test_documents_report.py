"""The last line of `make documents`."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.documents import last_line, newest


def row(median: float) -> dict[str, Any]:
    return {"median": median, "min": median, "max": median, "goal": ""}


def test_last_line_has_what_was_measured() -> None:
    rows = {"shared/apart": row(9.13), "shared/vllm-multi-lora": row(41.04)}
    accuracy = {"adapter": 0.876, "backbone_alone": 0.101}
    assert last_line({"rows": rows, "accuracy": accuracy}) == (
        "documents: 25 tasks, shared/apart 9.1, against vllm-multi-lora 41.0, accuracy 0.88, backbone alone 0.10"
    )
    del rows["shared/vllm-multi-lora"]
    assert last_line({"rows": rows, "accuracy": None}) == "documents: 25 tasks, shared/apart 9.1"


def test_the_newest_version_is_scored(tmp_path: Path) -> None:
    for name in ("9", "10", "notes"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path).name == "10"
    with pytest.raises(SystemExit, match="allowed: --adapter DIR, or --skip-accuracy"):
        newest(tmp_path / "notes")
