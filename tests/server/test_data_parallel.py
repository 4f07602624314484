"""Two engines behind one server: both have the adapters, both answer, and what they count adds up."""

import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.process import ServerProcess
from tests.server.adapters import entry, write_adapter

pytestmark = pytest.mark.scaleout


def metrics(server: ServerProcess) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=5) as page:
        lines = [line for line in page.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_two_engines_answer_as_one(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a" / "1", [entry("open", stop=(), max_new_tokens=12)], scale=0.2)
    settings = {"data_parallel_size": 2, "dtype": "float32", "kv_cache_gib": 0.25, "max_num_seqs": 4}
    with ServerProcess(adapters=tmp_path, timeout=300, **settings) as server, server.client() as client:

        def ask(alone: bool) -> str:
            return client.generate("open", "Once upon a time", without_adapter=alone).text

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, [False, True] * 6))
        assert len(set(answers[::2])) == 1, "both engines have the adapter"
        assert len(set(answers[1::2])) == 1
        assert answers[0] != answers[1], "an adapter that changes nothing tests nothing"
        until = time.monotonic() + 20
        while metrics(server).get("mtlora_adapter_weight_loads_total") != 2:
            assert time.monotonic() < until, "each engine has read the one adapter version"
            time.sleep(0.5)
        found = metrics(server)
        assert found["mtlora_adapter_slots"] == 4
        assert found["mtlora_adapter_slots_registered"] == 1
        assert found["mtlora_engine_step_adapters_sum"] > 0
        assert found["mtlora_adapter_load_seconds_count"] == 1
