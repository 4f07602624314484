"""Methods that a server calls in every worker through vLLM's `collective_rpc`: load adapters beside steps, count.

Arguments and results are types of msgpack. A failure is returned as a value, because vLLM would log an exception with
its traceback as an engine error.
"""

from typing import Any

from vllm.lora.request import LoRARequest

from mtlora.errors import MtLoRAError
from mtlora.vllm_plugin.statistics import WorkerStatistics

PENDING, READY, FAILED = "pending", "ready", "failed"


class AdapterLoading:
    """Loads and removes adapters in a worker."""

    model_runner: Any

    def mtlora_stage(self, folder: str) -> tuple[str, str]:
        """Read and pack a checkpoint in a thread: (pending | ready | failed, why). Call until no rank is pending."""
        try:
            return (READY, "") if self.model_runner.lora_manager.stage(folder) else (PENDING, "")
        except (MtLoRAError, ValueError, OSError, MemoryError) as error:
            return FAILED, str(error) or type(error).__name__

    def mtlora_unstage(self, folder: str) -> None:
        """Drop a staged checkpoint that was not placed."""
        self.model_runner.lora_manager.unstage(folder)

    def mtlora_place(self, folder: str, slots: list[Any]) -> tuple[str, str]:
        """Register the slots, each (id, name, path), of a staged checkpoint, all or none: (ready | failed, why)."""
        try:
            requests = [LoRARequest(name, slot_id, path) for slot_id, name, path in slots]
            self.model_runner.lora_manager.place(folder, requests)
        except (MtLoRAError, ValueError, RuntimeError) as error:
            return FAILED, str(error)
        return READY, ""

    def mtlora_remove(self, slot_ids: list[int]) -> int:
        """Remove slots; returns how many existed."""
        return sum(self.model_runner.lora_manager.remove_adapter(slot_id) for slot_id in slot_ids)


class AdapterExtension(AdapterLoading, WorkerStatistics):
    """The one class that vLLM mixes into its worker, by `worker_extension_cls`."""
