"""`make bench`: ratios, and the work of the PEFT worker."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.engine.peft_worker import MixedBatches
from benchmarks.engine.prompts import LOADS, REFERENCE, RandomPrompts
from benchmarks.engine.throughput import RATIOS, Case, make_report
from benchmarks.harness.adapters import Slot, write_random_peft
from benchmarks.harness.worker import WorkerProcess
from tests.engine._models import VOCABULARY, make_model

ROWS = {
    "backbone": [10.0, 20.0], "one-adapter-25-tasks": [10.0, 25.0], "25-adapters": [12.5, 20.0],
    "1000-tasks": [10.0, 25.0], "32-adapters": [10.0, 10.0], "256-adapters-zipf": [20.0, 20.0],
    "vllm-backbone": [12.5], "vllm-multi-lora": [100.0], "peft-mixed-batches": [50.0],
}  # fmt: skip


def report(rows: dict[str, list[float]] = ROWS, dtype: str = "bfloat16"):
    return make_report(REFERENCE, {name: 50 if name.startswith("peft") else 100 for name in rows}, rows, dtype)


def test_goals_follow_the_dtype() -> None:
    goals = {
        dtype: [each["goal"] for each in report(dtype=dtype)["ratios"].values() if each["contract"]][:2]
        for dtype in ("bfloat16", "float32")
    }
    assert goals == {"bfloat16": [0.97, 0.90], "float32": [0.97, 0.95]}


def test_ratios_are_taken_round_by_round() -> None:
    made = report()
    ratios = made["ratios"]
    assert ratios["one-adapter-25-tasks/backbone"]["median"] == pytest.approx((1 + 0.8) / 2)
    assert ratios["25-adapters/backbone"]["min"] == pytest.approx(0.8)
    assert ratios["1000-tasks/25-tasks"]["median"] == pytest.approx(1)
    assert ratios["256-adapters-zipf/32-adapters"]["median"] == pytest.approx(0.5)
    # A case with one round is compared with the first of two rounds; a case with half of the requests, by its rate.
    assert ratios["25-adapters/vllm-multi-lora"]["median"] == pytest.approx(8)
    assert ratios["backbone/vllm-backbone"]["median"] == pytest.approx(1.25)
    assert ratios["25-adapters/peft-mixed-batches"]["median"] == pytest.approx(8)
    assert made["rows"]["peft-mixed-batches"]["requests_per_second"]["median"] == pytest.approx(1)
    assert [name for name, ratio in ratios.items() if ratio["contract"]] == [
        "one-adapter-25-tasks/backbone", "25-adapters/backbone", "1000-tasks/25-tasks", "25-adapters/vllm-multi-lora",
    ]  # fmt: skip
    assert len(ratios) == len(RATIOS)


def test_report_leaves_out_rows_that_did_not_run() -> None:
    made = report({name: ROWS[name] if name in ("backbone", "25-adapters") else [] for name in ROWS})
    assert set(made["rows"]) == {"backbone", "25-adapters"}
    assert set(made["ratios"]) == {"25-adapters/backbone"}


def test_sample_is_at_most_the_whole_load() -> None:
    worker = WorkerProcess("benchmarks.engine.worker", {})
    for load in LOADS.values():
        part = Case("x", worker, [None], sample=64).part_of(load)
        assert part.requests == min(64, load.requests)
        assert part.draw(100, 0) == load.draw(100, 0)[: part.requests]
        assert Case("x", worker, [None]).part_of(load) is load


def slots(number: int) -> list[Slot]:
    return [(f"slot-{i}", i, "") for i in range(number)]


def test_every_round_asks_other_slots_where_they_outnumber_requests() -> None:
    many = Case("x", WorkerProcess("benchmarks.engine.worker", {}), slots(1000))
    rounds = [set(many.slots_of(100, seed)) for seed in range(4)]
    assert [len(each) for each in rounds] == [100] * 4
    assert len(set().union(*rounds)) > 300
    assert many.slots_of(100, 3) == many.slots_of(100, 3)


@pytest.mark.parametrize(("number", "requests"), [(25, 100), (32, 100), (1, 8), (25, 8)])
def test_slots_are_asked_equally_often(number: int, requests: int) -> None:
    asked = Counter(Case("x", WorkerProcess("benchmarks.engine.worker", {}), slots(number)).slots_of(requests, 0))
    assert asked.total() == requests
    assert set(asked.values()) <= {requests // number, requests // number + 1}


def test_weighted_slots_are_drawn() -> None:
    weights = [1 / (1 + i) for i in range(256)]
    case = Case("x", WorkerProcess("benchmarks.engine.worker", {}), slots(256), weights)
    rounds = [Counter(case.slots_of(1000, seed)) for seed in range(2)]
    assert rounds[0] != rounds[1]
    assert all(each.most_common(1)[0][0] == ("slot-0", 0, "") for each in rounds)


class Told:
    """A worker that keeps its messages."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def ask(self, message: dict[str, Any]) -> dict[str, float]:
        self.messages.append(message)
        return {"seconds": 1.0, "tokens": len(message["prompts"]) * message["new_tokens"]}


def test_the_engine_knows_every_slot_before_the_first_round() -> None:
    worker = Told()
    Case("x", worker, slots(1000)).warm_up(REFERENCE, VOCABULARY)  # type: ignore[arg-type]
    assert [slot for message in worker.messages[1:] for slot in message["slots"]] == slots(1000)
    assert all(len(message["prompts"]) == len(message["slots"]) for message in worker.messages)


@pytest.fixture
def peft_adapters(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A tiny backbone and three PEFT adapters, scaled so that they change its answers."""
    model = make_model(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    for i in range(3):
        write_random_peft(tmp_path / f"peft-{i}", config, seed=i)
        file = tmp_path / f"peft-{i}" / "adapter_model.safetensors"
        save_file({name: 20 * tensor for name, tensor in load_file(file).items()}, file)
    return model, {f"peft-{i}": str(tmp_path / f"peft-{i}") for i in range(3)}


def test_mixed_peft_batch_uses_the_adapter_of_each_row(peft_adapters: tuple[Path, dict[str, str]]) -> None:
    backbone, adapters = peft_adapters
    model = MixedBatches(backbone, torch.float32)
    model.load(adapters)
    prompts = RandomPrompts("test", 7, (4, 12), 3).draw(VOCABULARY, 0)
    names = [f"peft-{i % 3}" for i in range(len(prompts))]
    together = model.generate(prompts, names, 6)
    assert together == [model.generate([p], [n], 6)[0] for p, n in zip(prompts, names, strict=True)]
    assert together != model.generate(prompts, names[1:] + names[:1], 6), "adapters that change nothing test nothing"


def test_peft_worker_runs_a_load(peft_adapters: tuple[Path, dict[str, str]]) -> None:
    backbone, adapters = peft_adapters
    slots = [(name, i, path) for i, (name, path) in enumerate(adapters.items(), start=1)]
    settings = {"model": str(backbone), "dtype": "float32", "batch": 4}
    with WorkerProcess("benchmarks.engine.peft_worker", settings) as worker:
        case = Case("peft", worker, slots)
        assert case.seconds(RandomPrompts("test", 6, (4, 12), 3), VOCABULARY, seed=0) > 0
