"""Processor time of Python between two GPU steps when the mapping changes, from vLLM's runner to the plan.

The runner's LoRA mixin, both managers, the table and the plan are the real ones. The plan is copied within CPU memory,
so the launch of a copy to a device is not included.
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from mtlora.ops.packed_block import PackedBlock
from mtlora.ops.plan import plan_step
from mtlora.ops.table import AdapterRows, Layout
from mtlora.ops.tuning import KernelConfig

# Sizes of the default backbone and its adapters.
_LAYERS, _D, _R, _N, _G = 30, 576, 16, 8, 4

Variant = Callable[[], object]


class _Block(nn.Module):
    """Never called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def runner_over(model: nn.Module, config: KernelConfig, store_of: Any) -> Any:
    """vLLM's LoRA mixin over this project's managers, as far as a runner uses them, for a GPU's kernels.

    store_of: makes the worker's adapter store of its adapter manager.
    """
    from vllm.config.lora import LoRAConfig
    from vllm.lora.model_manager import AdapterLRUCache
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from mtlora.vllm_plugin.model_manager import MtLoRAModelManager
    from mtlora.vllm_plugin.options import Options
    from mtlora.vllm_plugin.worker_manager import MtLoRAWorkerManager

    class Manager(MtLoRAModelManager):
        def _kernel_config(self, num_blocks: int) -> KernelConfig:
            return config

    slots = config.max_adapters
    runner: Any = LoRAModelRunnerMixin()
    runner.lora_config = LoRAConfig(max_loras=slots, max_cpu_loras=slots)
    runner.model = model
    manager: Any = object.__new__(Manager)
    manager.model, manager.device, manager.lora_config = model, torch.device("cpu"), runner.lora_config
    manager._registered_adapters = AdapterLRUCache(manager.capacity, manager.deactivate_adapter)
    manager._active_adapters = AdapterLRUCache(manager.lora_slots, manager._deactivate_adapter)
    manager.lora_index_to_id, manager.modules = [None] * slots, {}
    manager._last_mapping = manager._last_slot_layout = None
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(get_hidden_size=lambda: config.hidden_size, dtype=config.dtype),
        additional_config=Options(blocks="ffn").as_config(),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    manager._init_punica_wrapper(config.max_tokens, vllm_config)
    manager._create_lora_modules()
    worker: Any = object.__new__(MtLoRAWorkerManager)
    worker._adapter_manager, worker.device, worker._cached_dummy_lora = manager, manager.device, False
    worker.store = store_of(manager)
    runner.lora_manager = worker
    return runner


def mapping_variants(tokens: int, adapters: int) -> dict[str, Variant]:
    """A step of `tokens` sequences over `adapters` of 64 slots, again and again, by what changed since the last."""
    from vllm.lora.request import LoRARequest

    from mtlora.vllm_plugin.packed import PackedAdapter, Slot

    block = PackedBlock(torch.zeros(_D, _R + _G * _N), torch.zeros(_G, _N * _R, _D // _G), _R)
    slots = {}
    for slot_id in range(1, 2 * adapters + 1):
        rows = AdapterRows([block] * _LAYERS, layout=Layout.PADDED)
        path = f"a{slot_id}#t"
        slots[slot_id] = Slot(slot_id, f"a{slot_id}/1#t", path, PackedAdapter(Path(path), None, rows), 0)  # type: ignore[arg-type]
    requests = {i: LoRARequest(slot.name, i, slot.path) for i, slot in slots.items()}
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"mlp": _Block()}) for _ in range(_LAYERS))
    config = KernelConfig(_D, torch.float32, num_blocks=_LAYERS, max_adapters=64, max_tokens=512, num_sms=1)
    store = SimpleNamespace(in_step=lambda request: slots[request.lora_int_id])
    runner = runner_over(model, config, lambda manager: store)

    def step(ids: list[int]) -> None:
        row = tuple(ids[t % len(ids)] for t in range(tokens))
        runner._set_active_loras(row, row, {requests[i] for i in ids})

    def alternating(one: list[int], other: list[int]) -> Variant:
        turn = [one, other]
        step(one)

        def run() -> None:
            turn.reverse()
            step(turn[0])

        return run

    first = list(range(1, adapters + 1))
    return {
        **({"order": alternating(first, first[::-1])} if adapters > 1 else {}),
        "one adapter": alternating(first, [*first[:-1], adapters + 1]),
        "all adapters": alternating(first, [i + adapters for i in first]),
    }


def plan_of(tokens: int, adapters: int) -> Variant:
    """`plan_step` for a step of `tokens` sequences."""
    row_T = np.arange(tokens) % adapters
    bias_row_T = np.zeros_like(row_T)
    return lambda: plan_step(row_T, bias_row_T, num_rows=64, tile_size=16)


def processor_seconds(run: Variant, rounds: int) -> list[float]:
    """Processor time of this thread, which other load on the machine inflates least, in every round."""
    seconds = []
    for _ in range(rounds):
        begin = time.thread_time()
        run()
        seconds.append(time.thread_time() - begin)
    return seconds
