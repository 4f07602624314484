"""`make bench`: what is computed from timings, what is drawn, and that PEFT's worker does the work that it is timed on."""

import json
from pathlib import Path

import pytest

from mtlora.bench.adapters import write_random_peft
from mtlora.bench.engine import RATIOS, Case, EngineProcess, make_report
from mtlora.bench.load import LOADS, REFERENCE, Load
from mtlora.bench.picture import draw
from tests.engine._models import VOCABULARY, make_model

ROWS = {
    "backbone": [10.0, 20.0], "one-adapter-25-tasks": [10.0, 25.0], "25-adapters": [12.5, 20.0],
    "1000-tasks": [10.0, 25.0], "32-adapters": [10.0, 10.0], "256-adapters-zipf": [20.0, 20.0],
    "vllm-multi-lora": [100.0], "peft-mixed-batches": [50.0],
}  # fmt: skip


def report(rows: dict[str, list[float]] = ROWS):
    return make_report(REFERENCE, {name: 50 if name.startswith("peft") else 100 for name in rows}, rows)


def test_ratios_are_taken_round_by_round() -> None:
    made = report()
    ratios = made["ratios"]
    assert ratios["one-adapter-25-tasks/backbone"]["median"] == pytest.approx((1 + 0.8) / 2)
    assert ratios["25-adapters/backbone"]["min"] == pytest.approx(0.8)
    assert ratios["1000-tasks/25-tasks"]["median"] == pytest.approx(1)
    assert ratios["256-adapters-zipf/32-adapters"]["median"] == pytest.approx(0.5)
    # A case with one round is compared with the other's first; one with half the requests, by its rate.
    assert ratios["25-adapters/vllm-multi-lora"]["median"] == pytest.approx(8)
    assert ratios["25-adapters/peft-mixed-batches"]["median"] == pytest.approx(8)
    assert made["rows"]["peft-mixed-batches"]["requests_per_second"]["median"] == pytest.approx(1)
    assert [name for name, ratio in ratios.items() if ratio["contract"]] == [
        "one-adapter-25-tasks/backbone", "25-adapters/backbone", "1000-tasks/25-tasks", "25-adapters/vllm-multi-lora",
    ]  # fmt: skip
    assert len(ratios) == len(RATIOS)


def test_rows_that_did_not_run_are_left_out() -> None:
    made = report({name: ROWS[name] if name in ("backbone", "25-adapters") else [] for name in ROWS})
    assert set(made["rows"]) == {"backbone", "25-adapters"}
    assert set(made["ratios"]) == {"25-adapters/backbone"}


def test_a_sample_is_never_more_than_the_load() -> None:
    engine = object.__new__(EngineProcess)
    for load in LOADS.values():
        part = Case("x", engine, [None], sample=64).part_of(load)
        assert part.requests == min(64, load.requests)
        assert part.prompts(100, 0) == load.prompts(100, 0)[: part.requests]
        assert Case("x", engine, [None]).part_of(load) is load


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    made = json.loads(json.dumps(report()))
    draw(made, tmp_path / "bench.svg")
    drawn = (tmp_path / "bench.svg").read_text()
    assert drawn.count("<!-- ") > 20
    for name, row in made["rows"].items():
        assert f"<!-- {name.replace('-', ' ')} -->" in drawn
        assert f"<!-- {row['requests_per_second']['median']:.2f}" in drawn
    assert "0.90 of backbone" in drawn
    del made["ratios"], made["rows"]["backbone"]
    draw({**made, "ratios": {}}, tmp_path / "bare.png")
    assert (tmp_path / "bare.png").stat().st_size > 5000


def test_pefts_worker_answers_every_row_with_its_own_adapter(tmp_path: Path) -> None:
    """The tokens it generates are those of one request at a time: its batches are real ones."""

    model = make_model(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    slots = []
    for i in range(3):
        write_random_peft(tmp_path / f"peft-{i}", config, seed=i)
        slots.append([f"peft-{i}", i + 1, str(tmp_path / f"peft-{i}")])
    load = Load("test", 5, (4, 12), 3)
    settings = {"model": str(model), "dtype": "float32", "batch": 4}
    with EngineProcess("mtlora.bench.peft_worker", settings) as engine:
        assert engine.seconds(load, [tuple(slot) for slot in slots], VOCABULARY, seed=0) > 0
        case = {"prompts": [], "new_tokens": 3, "slots": [None]}
        engine._process.stdin.write(json.dumps(case) + "\n")
        engine._process.stdin.flush()
        with pytest.raises(RuntimeError, match="the engine ended"):
            engine._read()
