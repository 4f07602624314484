"""Places the engine's OpenMP threads on cores, on a machine without a GPU.

By default, vLLM keeps a core for its framework and refuses more ranks than NUMA nodes. On two cores, the kept core
costs two fifths of the throughput. So the default here is to divide all cores that this process may use among the
ranks.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from mtlora.control_group import cpu_cores

BIND = "VLLM_CPU_OMP_THREADS_BIND"
UNBOUND = "nobind"


def thread_environment(
    setting: str | None, environment: Mapping[str, str], ranks: int, *, from_last: bool = False, bound: bool = True
) -> dict[str, str]:
    """Environment variables that place the threads of `ranks` workers: the setting, else vLLM's own, else all cores.

    from_last: in the default, a rank's first thread has its last core. So two engines that take half of their threads
    take different cores.

    If not `bound`, and under a CPU quota smaller than the number of cores, threads are counted but not bound to cores.
    Under a quota, neighbours with quotas of their own would all be bound to the same first cores.
    """
    if setting is not None:
        return {BIND: setting}
    if BIND in environment:
        return {}
    cores = sorted(os.sched_getaffinity(0))
    usable = min(len(cores), quota_cores() or len(cores))
    if not bound or usable < len(cores):
        return {BIND: UNBOUND, "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(max(1, usable // ranks)))}
    order = -1 if from_last else 1
    return {BIND: "|".join(",".join(map(str, share[::order])) for share in deal(cores, ranks))}


def deal(cores: Sequence[int], ranks: int) -> list[Sequence[int]]:
    """Divide the cores into contiguous shares, one per rank; more ranks than cores share cores."""
    if ranks >= len(cores):
        return [[cores[rank % len(cores)]] for rank in range(ranks)]
    bounds = [rank * len(cores) // ranks for rank in range(ranks + 1)]
    return [cores[start:end] for start, end in pairwise(bounds)]


def quota_cores(*cgroup: Path) -> int | None:
    """CPU time that the control groups allow, in whole cores, rounded down but at least 1; None without a limit."""
    cores = cpu_cores(*cgroup)
    return None if cores is None else max(1, int(cores))
