"""Two engines of a backbone in one server: both have the adapters, both answer, and their counts add up."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from mtlora.backbone import identify
from mtlora.client import ServerError
from mtlora.client.metrics_page import MetricsPage
from server.cli.process import ServerProcess
from tests.mtlora.vision.models import write_model
from tests.mtlora.vision.pictures import encoded, photograph
from tests.server.adapters import entry, write_adapter
from tests.server.live.conftest import SIGHTS

pytestmark = pytest.mark.scaleout

SETTINGS = {"data_parallel_size": 2, "dtype": "float32", "kv_cache_gib": 0.25, "max_num_seqs": 4}


def test_two_engines_answer_as_one(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a" / "1", [entry("open", stop=(), max_new_tokens=12)], scale=0.2)
    with ServerProcess(adapters=tmp_path, timeout=300, **SETTINGS) as server, server.client() as client:

        def ask(alone: bool) -> str:
            return client.generate("open", "Once upon a time", without_adapter=alone).text

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, [False, True] * 6))
        assert len(set(answers[::2])) == 1, "both engines have the adapter"
        assert len(set(answers[1::2])) == 1
        assert answers[0] != answers[1], "an adapter that changes nothing tests nothing"
        until = time.monotonic() + 20
        while MetricsPage.fetch(server.metrics).value("mtlora_adapter_weight_loads_total") != 2:
            assert time.monotonic() < until, "each engine has read the one adapter version"
            time.sleep(0.5)
        found = MetricsPage.fetch(server.metrics)
        assert found.value("mtlora_adapter_slots") == 4
        assert found.value("mtlora_adapter_slots_registered") == 1
        assert found.value("mtlora_engine_step_adapters_sum") > 0
        assert found.value("mtlora_adapter_load_seconds_count") == 1


def test_two_vision_engines_answer_as_one(tmp_path: Path) -> None:
    backbone = write_model(tmp_path / "backbone", "dinov2")
    # More than one adapter: the engines read each at a speed of their own.
    for name in ("first", "second", "third"):
        task = SIGHTS[0].model_copy(update={"id": name})
        write_adapter(tmp_path / "adapters" / name / "1", [task], backbone=identify(backbone), scale=0.2)
    pictures = [encoded(photograph(60 + i, 40)) for i in range(4)]
    with (
        ServerProcess(
            adapters=tmp_path / "adapters",
            backbone="none",
            vision_backbone=backbone,
            vision_data_parallel_size=2,
            timeout=300,
        ) as server,
        server.client() as client,
    ):

        def ask(number: int) -> dict[str, float]:
            (found,) = client.classify("second", [pictures[number % len(pictures)]])
            assert found.error is None
            return dict(found.probabilities)

        engines = [p for p in psutil.Process(server.process.pid).children(recursive=True) if "EngineCore" in p.name()]
        assert len(engines) == 2
        before = [sum(each.cpu_times()[:2]) for each in engines]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(200)))
        for number, answer in enumerate(answers):
            assert answer == pytest.approx(answers[number % len(pictures)], abs=1e-4)
        assert answers[0] != pytest.approx(answers[1], abs=1e-4), "pictures that are alike test nothing"
        spent = [sum(each.cpu_times()[:2]) - start for each, start in zip(engines, before, strict=True)]
        # An idle engine takes some time too, for its statistics.
        assert min(spent) > sum(spent) / 5, "both engines worked"


def test_notices_one_of_two_engines_that_hangs_while_the_other_answers(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a" / "1", [entry("open", stop=(), max_new_tokens=12)], scale=0.2)
    with (
        ServerProcess(adapters=tmp_path, timeout=300, engine_hang_s=5, **SETTINGS) as server,
        server.client() as client,
    ):
        before = client.generate("open", "Once upon a time").text
        engines = [p for p in psutil.Process(server.process.pid).children(recursive=True) if "EngineCore" in p.name()]
        assert len(engines) == 2
        engines[0].suspend()

        def ask(_: int) -> bool:
            with contextlib.suppress(ServerError):
                return client.generate("open", "Once upon a time", timeout=4).text == before
            return False

        until = time.monotonic() + 60
        answered = 0
        with ThreadPoolExecutor(4) as pool:
            while client.is_serving("mtlora.v1.Inference"):
                assert time.monotonic() < until
                # Some go to either engine, and a slow machine has time for those that are answered.
                answered += sum(pool.map(ask, range(4)))
        assert answered, "the engine that runs goes on answering until then"
        client.wait_ready(300)
        assert client.generate("open", "Once upon a time").text == before
