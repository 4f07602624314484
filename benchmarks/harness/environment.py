"""Environment variables and cores of a process that runs an engine."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from mtlora.vllm_cpu.memory import memory_environment


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Run on some cores: a process that is started meanwhile inherits them."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


def engine_environment(kv_cache_gib: float = 1.0) -> dict[str, str]:
    """Environment variables for an engine inside its process: all cores, no network, `kv_cache_gib` of KV cache."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": f"{kv_cache_gib:g}",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, usable_cores())),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        **memory_environment(),
    }
