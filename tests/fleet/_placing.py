"""Cold loads of adapters on several servers: calls placed by adapter against calls in turn."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.adapters import write_random_adapter
from mtlora.backbone import identify
from mtlora.checkpoint.format import TaskEntry
from mtlora.client import Placement
from mtlora.config import MtLoRAConfig
from tests.fleet._drills import load
from tests.fleet._fleet import Fleet

# Most cold loads, as a share of those in turn.
MOST_OF_ROUND_ROBIN = 0.2
_CONFIG = MtLoRAConfig(r=2, num_experts=2, num_groups=2)
# Times that every adapter is asked for.
_ROUNDS = 10


def write_adapters(folder: Path, backbone: Path, number: int) -> Path:
    """Adapters with a task each, `task-0` and so on; returns the folder."""
    identity = identify(backbone)
    for index in range(number):
        task = TaskEntry(id=f"task-{index}", description="random", template="{input}", bias_index=0, max_new_tokens=8)
        write_random_adapter(folder / f"adapter-{index}" / "1", identity, [task], seed=index, config=_CONFIG)
    return folder


async def compare(fleet: Fleet, tasks: Sequence[str], rounds: int = _ROUNDS) -> tuple[int, int]:
    """Adapters loaded into the engines for `rounds` calls of every task in random order: (in turn, placed).

    Placed first, from a cold start.
    """
    order = [task for seed in range(rounds) for task in random.Random(seed).sample(tasks, len(tasks))]
    counts = []
    for placement in (Placement(), None):
        before = await _cold_loads(fleet)
        async with load(fleet.address, fleet.access(), order, placement=placement, max_new_tokens=4) as found:
            while found.calls < len(order):
                await asyncio.sleep(0.05)
        if found.failed:
            raise RuntimeError(f"calls failed: {found.failed}")
        counts.append(await _cold_loads(fleet) - before)
    return counts[1], counts[0]


async def _cold_loads(fleet: Fleet) -> int:
    pages = await asyncio.gather(*(asyncio.to_thread(member.page) for member in fleet.members))
    return sum(int(page.value("mtlora_adapter_load_seconds_count")) for page in pages)
