"""Data classes of engine statistics: the engine's process fills them, metrics export them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest


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

    rows: int = 0
    entropy: float = 0.0
    expert_weights: Sequence[float] = ()

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        # Engines may differ in an adapter's number of experts for a moment: a version's content can be replaced.
        pairs = zip_longest(self.expert_weights, other.expert_weights, fillvalue=0.0)
        return RoutingSums(
            self.rows + other.rows, self.entropy + other.entropy, [mine + theirs for mine, theirs in pairs]
        )


@dataclass(frozen=True)
class WorkerStats:
    """Adapters of one rank of one engine, and the sampled routing that no other rank has, by adapter version."""

    slots: int
    slots_in_use: int
    slots_registered: int
    resident_bytes: int
    weight_loads: int
    slot_evictions: int
    routing: Mapping[str, RoutingSums]


def total_routing(ranks: Iterable[Mapping[str, RoutingSums]]) -> dict[str, RoutingSums]:
    """The sums of all ranks, by adapter version."""
    total: dict[str, RoutingSums] = {}
    for each in ranks:
        for adapter, sums in each.items():
            total[adapter] = total.get(adapter, RoutingSums()) + sums
    return total
