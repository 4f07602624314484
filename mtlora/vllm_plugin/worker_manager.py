"""The worker's side of the plugin: turns requests into slots; a step never waits for a disk."""

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from mtlora.backbone import identify
from mtlora.errors import BackboneError
from mtlora.vllm_cpu.pipeline import skips_warm_up, warm_up_stages
from mtlora.vllm_cpu.seeded import rewind_cpu_generators
from mtlora.vllm_plugin.activation import leave_rows_bare
from mtlora.vllm_plugin.compilation import check_config
from mtlora.vllm_plugin.model_manager import MtLoRAModelManager
from mtlora.vllm_plugin.packed import Slot
from mtlora.vllm_plugin.seams import require
from mtlora.vllm_plugin.store import AdapterStore

logger = init_logger(__name__)

_STAGING_NICENESS = 5

# "strict": an adapter must have been trained beside these weights. "architecture": beside weights of this shape, such
# as those that a quantised backbone was made from.
ENVIRONMENT_CHECK = "MTLORA_ADAPTER_BACKBONE_CHECK"
STRICT = "strict"


class MtLoRAWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's worker manager over an `AdapterStore`.

    Evicting a slot from vLLM's caches leaves it in the store; only `remove_adapter` takes it out.
    """

    _manager_cls = MtLoRAModelManager
    _adapter_manager: MtLoRAModelManager

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Wrap the model's blocks and open the store.

        Raises ValueError for a model or a config that cannot work, RuntimeError for a vLLM that lacks a seam.
        """
        check_config(vllm_config)
        if skips_warm_up(vllm_config):
            require("pipeline stages on CPUs")
            warm_up_stages()
        leave_rows_bare()
        if self.device.type == "cpu":
            require("seeded requests on CPUs")
            rewind_cpu_generators()
        wrapped = super().create_lora_manager(model, vllm_config)
        step = self._adapter_manager.step
        self.store = AdapterStore(
            running_backbone(vllm_config.model_config),
            [block.block_name for block in self._adapter_manager.blocks],
            device=self.device,
            dtype=vllm_config.model_config.dtype,
            host_cache_bytes=self._adapter_manager.options.host_cache_bytes,
            gpu=self._adapter_manager.gpu,
            on_drop=lambda adapter: step.release(adapter.rows),
        )
        self._stager = ThreadPoolExecutor(1, "stage-adapter", initializer=_stand_back)
        # Start its thread now, before any other that may call PyTorch, such as the one that compiles constraints.
        self._stager.submit(int).result()
        self._staging: dict[str, Future[None]] = {}
        return wrapped

    def stage(self, folder: str) -> bool:
        """Read and pack a checkpoint beside the running steps; True once it is done, until `place` or `unstage`.

        Call again until every rank says so. Raises CheckpointError if it cannot be used; the next call tries anew.
        """
        future = self._staging.get(folder)
        if future is None:
            future = self._staging[folder] = self._stager.submit(self.store.stage, folder)
        if not future.done():
            return False
        if future.exception() is not None:
            del self._staging[folder]
        future.result()
        return True

    def unstage(self, folder: str) -> None:
        """Drop a staged checkpoint that was not placed."""
        if future := self._staging.pop(folder, None):
            future.cancel()
        self._stager.submit(self.store.unstage, folder)

    def place(self, folder: str, requests: Sequence[LoRARequest]) -> None:
        """Register the slots of a staged adapter; reads nothing. Raises ValueError as `AdapterStore.place` does."""
        with gpu_sync_allowed():
            self.store.place(folder, requests)
        self._staging.pop(folder, None)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Register a request's adapter, outside any step. Errors reach the caller of `add_lora`."""
        with gpu_sync_allowed():
            self._place(self.store.register(lora_request))
        return True

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        requests = [request for request in lora_requests if request]
        if len(requests) > self._adapter_manager.lora_slots:
            raise RuntimeError(f"{len(requests)} slots in a step of at most {self._adapter_manager.lora_slots}")
        manager = self._adapter_manager
        manager.next_step()
        slots = {(request.lora_int_id, request.lora_path): request for request in requests}
        applied = manager.applied
        if applied == slots.keys():
            return
        # Touch these first, so that none is the least recently used when another slot needs room.
        for slot_id, _ in applied & slots.keys():
            manager.touch(slot_id)
        with gpu_sync_allowed():
            for slot in slots.keys() - applied:
                self._place(self._slot_in_step(slots[slot]))
        manager.applied = slots.keys()

    def _slot_in_step(self, request: LoRARequest) -> Slot:
        placed = self._adapter_manager.get_adapter(request.lora_int_id)
        # Dummy runs use slots that exist only in vLLM's caches.
        if placed is not None and placed.adapter is None and placed.path == request.lora_path:
            return placed
        return self.store.in_step(request)

    def _place(self, slot: Slot) -> None:
        manager = self._adapter_manager
        if manager.get_adapter(slot.id) is not slot:
            manager.remove_adapter(slot.id)
            if len(manager) >= manager.capacity:
                manager.remove_oldest_adapter()
                self.store.counts.slot_evictions += 1
        # This also makes the slot the most recently used.
        manager.add_adapter(slot)
        manager.activate_adapter(slot.id)

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        """Place an empty slot for a warm-up run; its path adds nothing.

        Idle data-parallel workers make such runs between steps, with ids that real slots may have. The next step that
        names such a slot takes it back from the store.
        """
        self._adapter_manager.remove_adapter(lora_request.lora_int_id)
        return self._adapter_manager.add_adapter(
            Slot(lora_request.lora_int_id, lora_request.lora_name, lora_request.lora_path, adapter=None, bias_row=0)
        )

    def remove_adapter(self, adapter_id: int) -> bool:
        """Remove a slot from the caches and the store. False if the store did not have it."""
        self._adapter_manager.remove_adapter(adapter_id)
        return self.store.remove(adapter_id)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Check the id alone: every registered slot stays in memory. Raises ValueError for an id without a slot."""
        if adapter_id not in self.store.slot_ids():
            raise ValueError(f"LoRA id {adapter_id} is not registered")
        return True

    def list_adapters(self) -> set[int]:
        """Ids of all registered slots, in vLLM's caches or not."""
        return self.store.slot_ids()


def _stand_back() -> None:
    """Keep this thread from slowing running steps."""
    # Use one OpenMP thread here, and in every thread that begins later. A second OpenMP team beside that of the steps
    # makes more threads than cores: from then on, libgomp puts the steps' threads to sleep at every barrier.
    # `torch.set_num_threads` would not do: vLLM disables it in CPU workers.
    torch._C.set_num_threads(1)
    # Allow every core: this thread inherits the one core of the engine's first thread.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _STAGING_NICENESS)


def running_backbone(model_config: ModelConfig) -> dict[str, Any]:
    """Facts about the running model, as fields of `BackboneIdentity`; those of its weights if they are local files."""
    text_config = model_config.hf_config.get_text_config()
    architecture = getattr(model_config.hf_config, "backbone_architecture", model_config.hf_config.architectures[0])
    facts: dict[str, Any] = {
        "architecture": architecture,
        "hidden_size": text_config.hidden_size,
        "num_layers": text_config.num_hidden_layers,
    }
    folder = Path(model_config.model)
    if folder.is_dir() and os.environ.get(ENVIRONMENT_CHECK, STRICT) == STRICT:
        try:
            return identify(folder).model_dump()
        except BackboneError as error:
            logger.warning("adapters are not checked against the backbone's weights: %s", error)
    return facts
