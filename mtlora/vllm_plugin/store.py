"""Every adapter that requests may name, in memory, from its registration to its removal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.lora.request import LoRARequest

from mtlora.checkpoint import CheckpointError, read_checkpoint, read_manifest
from mtlora.vllm_plugin.naming import parse_slot_path
from mtlora.vllm_plugin.packed import PackedAdapter, Slot, pack_adapter


class AdapterStore:
    """Packed weights, once an adapter version, and the slots that point at them.

    vLLM evicts a slot from its caches when it likes and wants it back in the middle of a step, where an error ends the
    engine. So eviction takes nothing from here: weights stay until the last slot on them is removed by name.

    backbone: what is known of the running model, as fields of `BackboneIdentity`; adapters made beside another are
    refused.
    """

    def __init__(
        self, backbone: Mapping[str, Any], blocks: list[str], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._backbone = backbone
        self._blocks = blocks
        self._modules = {name.rpartition(".")[2] for name in blocks}
        self._device = device
        self._dtype = dtype
        # By real folder and sha256 of the tensors.
        self._adapters: dict[tuple[Path, str], PackedAdapter] = {}
        self._slots: dict[int, Slot] = {}
        self._users: dict[PackedAdapter, set[int]] = {}

    def slot_ids(self) -> set[int]:
        """Ids of all slots."""
        return set(self._slots)

    def register(self, request: LoRARequest) -> Slot:
        """The slot of a request, reading its adapter where its weights are not here; with `load_inplace`, read anew.

        Raises CheckpointError for an adapter that cannot be used and ValueError for a task that it does not have, or
        for an id that another path has; nothing has changed then.
        """
        held = self._slots.get(request.lora_int_id)
        if held is not None and not request.load_inplace:
            if held.path != request.lora_path:
                raise ValueError(
                    f"LoRA id {held.id} stands for {held.path!r}; it cannot be given to {request.lora_path!r} too"
                )
            return held
        folder, task_id = parse_slot_path(request.lora_path)
        return self._keep(request, self._load(folder), task_id)

    def in_step(self, request: LoRARequest) -> Slot:
        """The slot of a request that is about to run, from memory where its adapter's folder is known.

        A server registers what it serves. For requests that nobody registered, this reads the disk, and what that
        raises ends the engine.
        """
        held = self._slots.get(request.lora_int_id)
        if held is not None and held.path == request.lora_path:
            return held
        folder, task_id = parse_slot_path(request.lora_path)
        real = folder.resolve()
        known = [adapter for adapter in self._adapters.values() if adapter.folder == real]
        return self._keep(request, known[-1] if known else self._load(folder), task_id)

    def remove(self, slot_id: int) -> bool:
        """Forget a slot, and the weights with their last slot. False where there is no such slot."""
        slot = self._slots.pop(slot_id, None)
        if slot is None:
            return False
        self._unuse(slot)
        return True

    def _keep(self, request: LoRARequest, adapter: PackedAdapter, task_id: str | None) -> Slot:
        if task_id is None and request.lora_name in adapter.task_ids:
            # `vllm serve --lora-modules TASK=FOLDER`: the name says which task.
            task_id = request.lora_name
        slot = Slot(request.lora_int_id, request.lora_path, adapter, adapter.bias_row(task_id))
        self._adapters[adapter.folder, adapter.manifest.tensors_sha256] = adapter
        replaced = self._slots.get(slot.id)
        if replaced is not None and replaced.adapter is not adapter:
            self._unuse(replaced)
        self._slots[slot.id] = slot
        self._users.setdefault(adapter, set()).add(slot.id)
        return slot

    def _unuse(self, slot: Slot) -> None:
        adapter = slot.adapter
        if adapter is None:
            return
        users = self._users[adapter]
        users.discard(slot.id)
        if not users:
            del self._users[adapter]
            del self._adapters[adapter.folder, adapter.manifest.tensors_sha256]

    def _load(self, folder: Path) -> PackedAdapter:
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(f"{folder}: a PEFT adapter; vLLM serves those where MTLORA_PLUGIN is 0")
        manifest, real = read_manifest(folder), folder.resolve()
        if held := self._adapters.get((real, manifest.tensors_sha256)):
            return held
        checkpoint = read_checkpoint(folder, manifest.backbone.model_copy(update=dict(self._backbone)))
        if missing := [module for module in manifest.config.modules if module not in self._modules]:
            raise CheckpointError(f"{folder}: config.blocks: the running model has no {missing[0]!r} in its layers")
        return pack_adapter(real, checkpoint, self._blocks, device=self._device, dtype=self._dtype)
