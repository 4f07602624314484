"""The worker's side of the plugin: turns requests into slots, from memory wherever a step waits for it."""

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

from mtlora.backbone import BackboneError, identify
from mtlora.vllm_cpu.pipeline import warm_up_stages
from mtlora.vllm_cpu.seeded import rewind_cpu_generators
from mtlora.vllm_plugin.compilation import check_compilation
from mtlora.vllm_plugin.model_manager import MtLoRAModelManager
from mtlora.vllm_plugin.packed import Slot
from mtlora.vllm_plugin.store import AdapterStore

logger = init_logger(__name__)

_STAGING_NICENESS = 5

# Key of vLLM's `additional_config`.
HOST_CACHE_KEY = "mtlora_host_cache_bytes"

# "strict": adapters must have been made beside these weights; "architecture": beside some of this shape, as where the
# backbone is a quantised form of theirs.
ENVIRONMENT_CHECK = "MTLORA_ADAPTER_BACKBONE_CHECK"
STRICT = "strict"


class MtLoRAWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's worker manager over an `AdapterStore`.

    Evicting a slot from vLLM's caches leaves it in the store; only `remove_adapter` takes it out.
    """

    _manager_cls = MtLoRAModelManager
    _adapter_manager: MtLoRAModelManager

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Wrap the model's blocks and open the store. Raises ValueError for a model or a config that cannot work."""
        check_compilation(vllm_config)
        warm_up_stages(vllm_config)
        if self.device.type == "cpu":
            rewind_cpu_generators()
        wrapped = super().create_lora_manager(model, vllm_config)
        self.store = AdapterStore(
            running_backbone(vllm_config.model_config),
            [block.block_name for block in self._adapter_manager.blocks],
            device=self.device,
            dtype=vllm_config.model_config.dtype,
            host_cache_bytes=host_cache_bytes(vllm_config.additional_config),
        )
        self._stager = ThreadPoolExecutor(1, "stage-adapter", initializer=_stand_back)
        self._staging: dict[str, Future[None]] = {}
        return wrapped

    def stage(self, folder: str) -> bool:
        """Read and pack a checkpoint beside the running steps; True once it is done. Ask again until then.

        Raises CheckpointError where it cannot be used; the next call tries anew.
        """
        future = self._staging.get(folder)
        if future is None:
            future = self._staging[folder] = self._stager.submit(self.store.stage, folder)
        if not future.done():
            return False
        del self._staging[folder]
        future.result()
        return True

    def unstage(self, folder: str) -> None:
        """Give up what was staged and not placed."""
        if future := self._staging.pop(folder, None):
            future.cancel()
        self._stager.submit(self.store.unstage, folder)

    def place(self, folder: str, requests: Sequence[LoRARequest]) -> None:
        """Register the slots of a staged adapter; reads nothing. Raises ValueError as `AdapterStore.place` does."""
        with gpu_sync_allowed():
            self.store.place(folder, requests)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Register a request's adapter, outside any step. What is wrong with it reaches the caller of `add_lora`."""
        with gpu_sync_allowed():
            self._place(self.store.register(lora_request))
        return True

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        requests = [request for request in lora_requests if request]
        if len(requests) > self._adapter_manager.lora_slots:
            raise RuntimeError(f"{len(requests)} slots in a step of at most {self._adapter_manager.lora_slots}")
        with gpu_sync_allowed():
            for request in requests:
                self._place(self._slot_in_step(request))

    def _slot_in_step(self, request: LoRARequest) -> Slot:
        placed = self._adapter_manager.get_adapter(request.lora_int_id)
        # Dummy runs name slots of their own, which exist nowhere but in the caches.
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
        # Also touches the slot in the LRU order.
        manager.add_adapter(slot)
        manager.activate_adapter(slot.id)

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        """Place an empty slot for a warm-up run: its path adds nothing, so that the backbone alone is measured.

        Idle data-parallel workers run these between steps, with ids that real slots may have. Those come back from the
        store with the next step that names them.
        """
        self._adapter_manager.remove_adapter(lora_request.lora_int_id)
        return self._adapter_manager.add_adapter(
            Slot(lora_request.lora_int_id, lora_request.lora_name, lora_request.lora_path, adapter=None, bias_row=0)
        )

    def remove_adapter(self, adapter_id: int) -> bool:
        """Take a slot out of the caches and the store. False where it was not in the store."""
        self._adapter_manager.remove_adapter(adapter_id)
        return self.store.remove(adapter_id)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Nothing to do: every registered slot stays in memory. Raises ValueError for an id that is not registered."""
        if adapter_id not in self.store.slot_ids():
            raise ValueError(f"LoRA id {adapter_id} is not registered")
        return True

    def list_adapters(self) -> set[int]:
        """Ids of all registered slots, in vLLM's caches or not."""
        return self.store.slot_ids()


def _stand_back() -> None:
    """Have this thread take what steps leave of the cores: it is not to race them."""
    # A second OpenMP team beside that of the steps makes more threads than cores: from then on libgomp would put the
    # steps' threads to sleep at every barrier. Not `torch.set_num_threads`, which vLLM disables in CPU workers.
    torch._C.set_num_threads(1)
    # Any of the cores there are: it has inherited the one that the first of the engine's threads is bound to.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _STAGING_NICENESS)


def host_cache_bytes(additional_config: Any) -> int:
    """How much of packed adapters without slots to keep in host memory: the engine's `additional_config`, else 0."""
    return int(additional_config.get(HOST_CACHE_KEY, 0)) if isinstance(additional_config, dict) else 0


def running_backbone(model_config: ModelConfig) -> dict[str, Any]:
    """What can be known of the running model, as fields of `BackboneIdentity`: its weights too where they lie here."""
    text_config = model_config.hf_config.get_text_config()
    facts: dict[str, Any] = {
        "architecture": model_config.hf_config.architectures[0],
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
