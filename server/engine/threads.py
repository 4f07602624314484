"""Places the engine's OpenMP threads on cores, on a machine without a GPU.

By default, vLLM keeps a core for its framework and refuses more ranks than NUMA nodes. On two cores, the kept core
costs two fifths of the throughput. So the default here is to divide all cores that this process may use among the
ranks.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from mtlora.control_group import cpu_cores
from server.job import Lane
from server.settings import Settings

BIND = "VLLM_CPU_OMP_THREADS_BIND"
UNBOUND = "nobind"
# vLLM divides the cores by itself.
_AUTO = "auto"
_CORES = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


def engines_of(settings: Settings, lane: Lane) -> int:
    """Engines of a lane."""
    return settings.vision_data_parallel_size if lane is Lane.IMAGES else settings.data_parallel_size


def ranks_of(settings: Settings, lane: Lane) -> int:
    """Workers of all engines of a lane."""
    return engines_of(settings, lane) * (1 if lane is Lane.IMAGES else settings.engine_ranks)


def binding_setting(settings: Settings, lane: Lane) -> str | None:
    """The setting that places the threads of a lane's engines, if one does."""
    names = ("vision_omp_threads_bind", "omp_threads_bind") if lane is Lane.IMAGES else ("omp_threads_bind",)
    return next((name for name in names if getattr(settings, name)), None)


def check_cores(binding: str, ranks: int, usable: Collection[int]) -> None:
    """Check a setting or variable that places threads, like "0-3,8" or, by rank, "0|1".

    usable: cores that this process may use. Raises ValueError.
    """
    if binding in (UNBOUND, _AUTO):
        return
    groups = binding.split("|")
    wanted = set[int]()
    for group in groups:
        for part in group.split(","):
            match = _CORES.fullmatch(part.strip())
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise ValueError(f"found {part!r} in {binding!r}; allowed: cores such as 0-3,8 or, by rank, 0|1")
            wanted.update(range(first, last + 1))
    if len(groups) != ranks:
        allowed = f"{ranks}, one for each rank, with | between"
        raise ValueError(f"groups of cores in {binding!r}: found {len(groups)}; allowed: {allowed}")
    if missing := sorted(wanted.difference(usable)):
        raise ValueError(f"found core {missing[0]}; allowed: those of this process, {_ranges(sorted(usable))}")


def _ranges(cores: Sequence[int]) -> str:
    """Ascending cores as a binding, such as "0-3,8"."""
    starts = [core for core in cores if core - 1 not in cores]
    ends = [core for core in cores if core + 1 not in cores]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


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
