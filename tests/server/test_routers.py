"""A router's view of a server: the metrics page, read as llm-d and the inference extension read it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.engine import EngineStats
from server.registry.residency import Residency
from server.telemetry.engine_stats import KvCache
from server.telemetry.metrics import Metrics
from server.telemetry.routers import MAX_NAMED, AdapterMemory, EngineLoad, LoadedAdapter, RouterMetrics
from tests.server.slots import serving_version

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}", fullmatch=True)


# What the extension's parser asks of every server by default: without one of them it keeps nothing of the page.
FAMILIES = (
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:lora_requests_info",
    "vllm:cache_config_info",
)


@dataclass(frozen=True)
class Endpoint:
    """What a router keeps of a server. active and waiting: adapters. loaded: (name, level, pinned)."""

    waiting_queue: int
    running: int
    kv_cache: float
    block_tokens: int
    blocks: int
    active: list[str]
    waiting: list[str]
    max_active: int
    loaded: set[tuple[str, str, str]]
    num_loaded: int
    max_loaded: int


def scrape(page: bytes) -> Endpoint:
    """The rules of the extension's model server protocol: of `lora_requests_info` the sample with the highest value."""
    families = {family.name: family for family in text_string_to_metric_families(page.decode())}
    assert [name for name in FAMILIES if not families[name].samples] == []
    assert {family.type for name, family in families.items() if name.startswith("vllm:")} == {"gauge"}

    def value(name: str) -> float:
        (sample,) = families[name].samples
        return sample.value

    info = max(families["vllm:lora_requests_info"].samples, key=lambda sample: sample.value).labels
    (cache,) = families["vllm:cache_config_info"].samples
    loaded = families["vllm:lora_adapter_loaded"].samples
    return Endpoint(
        waiting_queue=int(value("vllm:num_requests_waiting")),
        running=int(value("vllm:num_requests_running")),
        kv_cache=value("vllm:kv_cache_usage_perc"),
        block_tokens=int(cache.labels["block_size"]),
        blocks=int(cache.labels["num_gpu_blocks"]),
        active=[name for name in info["running_lora_adapters"].split(",") if name],
        waiting=[name for name in info["waiting_lora_adapters"].split(",") if name],
        max_active=int(info["max_lora"]),
        loaded={(s.labels["adapter_name"], s.labels["level"], s.labels["pinned"]) for s in loaded if s.value == 1},
        num_loaded=int(value("vllm:num_gpu_loaded_lora_adapters")),
        max_loaded=int(value("vllm:max_gpu_lora_adapters")),
    )


@given(
    st.dictionaries(NAMES, st.booleans(), max_size=8),
    st.lists(NAMES, max_size=4, unique=True),
    st.integers(0, 500),
    st.integers(0, 500),
    st.floats(0, 1),
)
def test_a_router_reads_what_the_server_knows(
    loaded: dict[str, bool], loading: list[str], running: int, waiting: int, kv_cache: float
) -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(lambda: EngineLoad(running, waiting, kv_cache))
    metrics.kv_cache = KvCache(16, 5000)
    metrics.memory = lambda: AdapterMemory(
        300, tuple(LoadedAdapter(name, pinned) for name, pinned in loaded.items()), tuple(loading)
    )
    registry.register(metrics)
    assert scrape(generate_latest(registry)) == Endpoint(
        waiting_queue=waiting, running=running, kv_cache=kv_cache, block_tokens=16, blocks=5000,
        active=list(loaded), waiting=loading, max_active=300,
        loaded={(name, "gpu", str(pinned).lower()) for name, pinned in loaded.items()},
        num_loaded=len(loaded), max_loaded=300,
    )  # fmt: skip


def test_the_page_stays_small_with_many_adapters() -> None:
    metrics = Metrics()
    metrics.follow_memory(
        lambda: AdapterMemory(20_000, tuple(LoadedAdapter(f"{'n' * 58}{i:05}", False) for i in range(10_000)))
    )
    page = generate_latest(metrics.registry)
    seen = scrape(page)
    assert seen.num_loaded == 10_000
    assert len(seen.active) == len(seen.loaded) == MAX_NAMED
    assert seen.active[0] == f"{'n' * 58}00000"
    assert len(page) <= 200_000


class HeldUp:
    """An engine's memory; loads of some adapters wait."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.let = asyncio.Event()

    async def load(self, folder: Path, slots: Sequence[Any]) -> None:
        if slots[0].lora_name in self.names:
            await self.let.wait()

    async def unload(self, slots: Sequence[Any]) -> None:
        pass


async def test_adapters_of_the_engine_not_versions_or_tasks() -> None:
    engine, metrics = HeldUp("cold"), Metrics()
    residency = Residency(engine, 3)
    metrics.follow_memory(residency.memory)
    metrics.record_kv_cache(KvCache(32, 100))
    metrics.record_engine(EngineStats(5, 2, 0.25, prefix_cache_queries=0, prefix_cache_hits=0))
    metrics.follow_turns(dict, lambda: {"a": 3, "b": 1})
    old, new, other, cold = serving_version("a"), serving_version("a"), serving_version("b"), serving_version("cold")
    other.adapter.pinned = True
    for version in (old, new, other):
        async with residency.lease(version):
            pass
    residency.prefetch(cold)
    await asyncio.sleep(0)
    assert scrape(generate_latest(metrics.registry)) == Endpoint(
        waiting_queue=6, running=5, kv_cache=0.25, block_tokens=32, blocks=100, active=["b", "a"], waiting=["cold"],
        max_active=3, loaded={("a", "gpu", "false"), ("b", "gpu", "true")}, num_loaded=2, max_loaded=3,
    )  # fmt: skip
    engine.let.set()
    async with residency.lease(cold):
        assert "cold" in scrape(generate_latest(metrics.registry)).active
