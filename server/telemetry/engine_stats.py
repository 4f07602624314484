"""Data classes of engine statistics: the engine's process fills them, metrics export them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """The scheduler's state after a step, and counts since the step before."""

    running: int
    waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int = 0
    # Sequences that ended in the step; they are not in `running`.
    finished: int = 0
    # Distinct slots and adapter versions of the running sequences.
    tasks: int = 0
    adapters: int = 0
    # Index among the data-parallel engines.
    engine: int = 0


@dataclass(frozen=True)
class KvCache:
    """The KV cache of an engine, all data-parallel ranks together.

    It has no blocks while the engine starts, and without a language engine.
    """

    block_tokens: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class RoutingSums:
    """Sums over sampled routing; fields as in `mtlora.vllm_plugin.sampling.RoutingSums`."""

    rows: int
    entropy: float
    expert_weights: Sequence[float]


@dataclass(frozen=True)
class WorkerStats:
    """Adapters of one rank of one engine, and its sampled routing by adapter version."""

    slots: int
    slots_in_use: int
    slots_registered: int
    resident_bytes: int
    weight_loads: int
    slot_evictions: int
    routing: Mapping[str, RoutingSums]
