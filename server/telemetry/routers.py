"""Metrics for routers (llm-d, the Gateway API's inference extension, KServe), under vLLM's names.

A router knows adapters, not tasks or versions, so an adapter's versions count as one. `lora_requests_info` lists the
adapters that the engine holds, whether requests run on them or not: routers interpret it as the loaded adapters.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.telemetry.engine_stats import KvCache

# Adapters named on a page, most recently used first: this keeps the page small with any `adapter_slots`.
MAX_NAMED = 512
# Gauges by name: the labels besides `model_name`, and the meaning.
GAUGES = {
    "vllm:num_requests_running": ((), "Sequences that the engine runs."),
    "vllm:num_requests_waiting": ((), "Requests that wait for their turn, and sequences that wait in the engine."),
    "vllm:kv_cache_usage_perc": ((), "Share of the KV cache in use, 0 to 1, of the fullest engine."),
    "vllm:cache_config_info": (
        ("block_size", "num_gpu_blocks"),
        "1; tokens of a block of the KV cache, and its blocks.",
    ),
    "vllm:lora_requests_info": (
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        "Time of the scrape; adapters in the engine and adapters being loaded as labels, separated by commas.",
    ),
    "vllm:lora_adapter_loaded": (
        ("adapter_name", "level", "pinned"),
        "1 for each adapter in the engine's memory, which is level gpu on a CPU too.",
    ),
    "vllm:num_gpu_loaded_lora_adapters": ((), "Adapters in the engine's memory."),
    "vllm:max_gpu_lora_adapters": ((), "Adapters that the engine's memory may hold: `adapter_slots`."),
}


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in the engine's memory, by name."""

    name: str
    pinned: bool


@dataclass(frozen=True)
class AdapterMemory:
    """The engine's memory for adapters: those in it and those on their way, most recently used first."""

    capacity: int
    loaded: tuple[LoadedAdapter, ...] = ()
    loading: tuple[str, ...] = ()


def joined_memory(memories: Iterable[AdapterMemory]) -> AdapterMemory:
    """The memory of all engines of a server as one: an adapter belongs to one of them."""
    whole = AdapterMemory(0)
    for each in memories:
        whole = AdapterMemory(whole.capacity + each.capacity, whole.loaded + each.loaded, whole.loading + each.loading)
    return whole


@dataclass(frozen=True)
class EngineLoad:
    """Sequences that the engine runs, requests that wait, and the share of the KV cache in use."""

    running: int
    waiting: int
    kv_cache_usage: float


class RouterMetrics(Collector):
    """The gauges of `GAUGES`, read at each scrape. `load` and `memory` are called from any thread."""

    def __init__(self, load: Callable[[], EngineLoad]) -> None:
        self._load = load
        self.model_name = ""
        self.kv_cache = KvCache()
        self.memory: Callable[[], AdapterMemory] = lambda: AdapterMemory(0)

    def collect(self) -> Iterable[Metric]:
        """One sample per gauge; for `lora_adapter_loaded`, one per adapter."""
        load, memory = self._load(), self.memory()
        named = memory.loaded[:MAX_NAMED]
        loaded, loading = ",".join(each.name for each in named), ",".join(memory.loading[:MAX_NAMED])
        samples: dict[str, list[tuple[tuple[str, ...], float]]] = {
            "vllm:num_requests_running": [((), load.running)],
            "vllm:num_requests_waiting": [((), load.waiting)],
            "vllm:kv_cache_usage_perc": [((), load.kv_cache_usage)],
            "vllm:cache_config_info": [((str(self.kv_cache.block_tokens), str(self.kv_cache.blocks)), 1)],
            "vllm:lora_requests_info": [((str(memory.capacity), loaded, loading), time.time())],
            "vllm:lora_adapter_loaded": [((each.name, "gpu", str(each.pinned).lower()), 1) for each in named],
            "vllm:num_gpu_loaded_lora_adapters": [((), len(memory.loaded))],
            "vllm:max_gpu_lora_adapters": [((), memory.capacity)],
        }
        for name, (labels, documentation) in GAUGES.items():
            family = GaugeMetricFamily(name, documentation, labels=("model_name", *labels))
            for values, value in samples[name]:
                family.add_metric((self.model_name, *values), value)
            yield family
