"""`make bench-vision`: its ratios, and what it asks of servers."""

import asyncio
import io
import os
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from benchmarks.vision import serving
from benchmarks.vision.report import make_report
from benchmarks.vision.serving import (
    IMAGES_IN_FLIGHT,
    TASKS,
    Both,
    Served,
    TextTimes,
    beside_report,
    photographs,
    print_beside,
    tensors,
)
from benchmarks.vision.throughput import BATCHES, IN_FLIGHT, RATIOS, THROUGH_GRPC, last_line

SECONDS = {
    "bare": {batch: [2.0, 4.0, 1.0] for batch in BATCHES},
    "25 tasks": {batch: [2.0, 4.0, 2.0] for batch in BATCHES} | {64: [4.0, 8.0, 2.0]},
    "25 adapters": {batch: [2.5, 5.0, 1.25] for batch in BATCHES},
    "hf": {16: [3.0, 6.0, 1.5]},
}


def test_ratios_are_taken_round_by_round_and_the_lowest_batch_size_counts() -> None:
    ratios = make_report(10, SECONDS, RATIOS)["ratios"]
    assert [ratios["25 tasks/bare"]["by_batch"][batch]["median"] for batch in BATCHES] == [1, 1, 1, 0.5]
    assert ratios["25 tasks/bare"]["lowest"] == 0.5
    assert ratios["25 adapters/bare"]["lowest"] == pytest.approx(0.8)
    assert ratios["bare/hf"]["lowest"] == pytest.approx(1.5)
    assert set(ratios["bare/hf"]["by_batch"]) == {16}
    assert "bare/onnx" not in ratios


def test_rows_are_images_a_second() -> None:
    rows = {(row["system"], row["batch"]): row["images_per_second"] for row in make_report(10, SECONDS, RATIOS)["rows"]}
    assert len(rows) == 3 * len(BATCHES) + 1
    assert rows["bare", 1] == {"median": 5, "min": 2.5, "max": 10}


def test_the_last_line_names_the_lowest_ratios() -> None:
    report = make_report(10, SECONDS, RATIOS)
    assert last_line(report) == "bench-vision: 25 tasks/bare 0.50, 25 adapters/bare 0.80, bare/hf 1.50"


def test_a_server_is_compared_with_the_engine_in_process_at_the_same_number_in_flight() -> None:
    seconds = {
        "25 tasks": {batch: [1.0, 2.0] for batch in IN_FLIGHT},
        "gRPC, JPEGs": {batch: [1.25, 2.5] for batch in IN_FLIGHT},
        "gRPC, tensors": {batch: [1.0, 2.0] for batch in IN_FLIGHT},
    }
    ratios = make_report(10, seconds, THROUGH_GRPC)["ratios"]
    assert ratios["JPEGs through gRPC/in process"]["lowest"] == pytest.approx(0.8)
    assert ratios["tensors through gRPC/in process"]["lowest"] == pytest.approx(1.0)


def test_photographs_have_two_megapixels_and_about_200_kb() -> None:
    found = photographs(2)
    assert all(170_000 < len(each) < 230_000 for each in found)
    assert all(Image.open(io.BytesIO(each)).size == (1600, 1200) for each in found)
    assert found[0] != found[1]


def test_tensors_are_as_a_task_takes_them() -> None:
    found = tensors(3, 28)
    assert [each.shape for each in found] == [(3, 28, 28)] * 3
    assert {str(each.dtype) for each in found} == {"float32"}


class Client:
    """A server that counts what is in flight."""

    def __init__(self, error: Exception | None = None) -> None:
        self.tasks: list[str] = []
        self.images = self.texts = self.most_images = 0
        self.beside: list[int] = []
        self._error = error

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def classify(self, task: str, images: list[Any]) -> list[Any]:
        assert len(images) == 1
        self.tasks.append(task)
        self.images += 1
        self.most_images = max(self.most_images, self.images)
        await asyncio.sleep(0.001)
        self.images -= 1
        return [SimpleNamespace(error=self._error)]

    async def generate(self, task: str, text: str, **_: Any) -> None:
        self.beside.append(self.images)
        await asyncio.sleep(0.001)


def served(monkeypatch: pytest.MonkeyPatch, client: Client) -> Served:
    monkeypatch.setattr(serving, "AsyncClient", lambda *_, **__: client)
    server: Any = SimpleNamespace(address="nowhere", process=SimpleNamespace(pid=os.getpid()))
    return Served("gRPC", server, 4, [b"one", b"two"])


def test_a_server_is_asked_every_task_in_turn_with_a_fixed_number_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    case = served(monkeypatch, client)
    assert 0.001 < case.seconds(50, 112) < 5
    assert client.most_images == 4
    assert client.tasks[4:] == [f"task-{i % TASKS}" for i in range(50)]
    assert len(case.front_s) == 1


def test_an_image_that_fails_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no image"):
        served(monkeypatch, Client(ValueError("no image"))).seconds(50, 112)


async def test_images_are_in_flight_from_the_first_text_to_the_last() -> None:
    client: Any = Client()
    both = Both([os.getpid()], client, serving.classifying(client, [b"one"]))
    await both.warm_up()
    client.beside.clear()
    alone, beside = TextTimes(), TextTimes()
    await both.turn(0, alone, with_images=False)
    assert set(client.beside) == {0}
    client.beside.clear()
    await both.turn(0, beside, with_images=True)
    assert min(client.beside) >= IMAGES_IN_FLIGHT - 1
    assert len(alone.seconds) == len(beside.seconds) == len(client.beside)
    assert alone.images == 0
    assert beside.images > 0
    assert client.images == 0


def test_text_beside_images_has_a_ratio_of_99th_percentiles_and_of_processor_times(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = TextTimes([0.1] * 99 + [0.2, 9.0], wall_s=10, text_s=20)
    beside = TextTimes([0.2] * 99 + [0.3, 9.0], wall_s=20, text_s=18, images_s=20, images=400)
    report = beside_report(alone, beside)
    assert report["p99_ratio"] == pytest.approx(1.5)
    assert report["processor_text_by_images"] == pytest.approx(0.9)
    assert report["rows"]["texts beside images"]["images_per_second"] == 20
    print_beside(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("text's p99, images beside it/alone: 1.50 (goal at most 2.20); ")
    assert lines[-1].endswith("processor time, language engine/vision engine: 0.90")
