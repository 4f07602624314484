"""A worker's counts of its adapters.

`WorkerStatistics` is a part of the worker extension: `collective_rpc("mtlora_statistics")` returns one plain dictionary
a rank, with the fields of `statistics`.
"""

from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank

from mtlora.vllm_plugin.worker_manager import MtLoRAWorkerManager


class WorkerStatistics:
    """Returns a worker's `statistics`."""

    model_runner: Any

    def mtlora_statistics(self) -> dict[str, Any]:
        """This rank's `statistics`."""
        manager: MtLoRAWorkerManager = self.model_runner.lora_manager
        return statistics(manager, get_tensor_model_parallel_rank())


def statistics(manager: MtLoRAWorkerManager, tensor_parallel_rank: int) -> dict[str, Any]:
    """Slots and weights now, counts since the start, and the sampled routing by adapter version.

    Tensor-parallel ranks sample the same rows, so only the first shows them: all ranks' sums can be added.
    """
    adapter_manager, store = manager._adapter_manager, manager.store
    sampler = adapter_manager.step.sampler
    return {
        "slots": adapter_manager.lora_slots,
        "slots_in_use": len(adapter_manager._active_adapters),
        "slots_registered": len(store.slot_ids()),
        "resident_bytes": store.resident_bytes(),
        "weight_loads": store.counts.weight_loads,
        "slot_evictions": store.counts.slot_evictions,
        "routing": sampler.sums() if sampler and tensor_parallel_rank == 0 else {},
    }
