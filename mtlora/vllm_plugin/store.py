"""Every adapter that requests may name, in memory, from its registration to its removal, and a host cache behind it."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.lora.request import LoRARequest

from mtlora.checkpoint.format import CheckpointError
from mtlora.checkpoint.read import read_checkpoint, read_manifest
from mtlora.vllm_plugin.naming import parse_slot_path
from mtlora.vllm_plugin.packed import PackedAdapter, Slot, pack_adapter


@dataclass
class Counts:
    """What has happened in a worker since its start."""

    weight_loads: int = 0
    slot_evictions: int = 0


class AdapterStore:
    """Packed weights, once an adapter version, and the slots that point at them.

    vLLM evicts a slot from its caches when it likes and wants it back in the middle of a step, where an error ends the
    engine. So eviction takes nothing from here: weights stay until the last slot on them is removed by name.

    A server loads in two moves: `stage` reads and packs an adapter, in any thread, while steps run; `place` then only
    registers its slots. What is removed stays packed in host memory, up to `host_cache_bytes`, least recently used
    first to go: staging it again reads nothing.

    backbone: what is known of the running model, as fields of `BackboneIdentity`; adapters made beside another are
    refused.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        blocks: list[str],
        *,
        device: torch.device,
        dtype: torch.dtype,
        host_cache_bytes: int = 0,
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
        self._host_cache_bytes = host_cache_bytes
        # By the folder as it was named. `stage` runs beside the rest; what it touches is under the lock.
        self._lock = threading.Lock()
        self._staged: dict[str, PackedAdapter] = {}
        self._cached: OrderedDict[str, PackedAdapter] = OrderedDict()
        # What was placed, and the host copy and name of each.
        self._placed: dict[str, PackedAdapter] = {}
        self._origin: dict[PackedAdapter, tuple[str, PackedAdapter]] = {}
        self.counts = Counts()

    def slot_ids(self) -> set[int]:
        """Ids of all slots."""
        return set(self._slots)

    def resident_bytes(self) -> int:
        """Of every adapter's packed weights and biases on this worker's device."""
        return sum(adapter.num_bytes for adapter in self._adapters.values())

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

    def stage(self, folder: str) -> None:
        """Have a checkpoint packed in host memory, ready for `place`. Raises CheckpointError where it cannot be."""
        with self._lock:
            if folder in self._staged:
                return
            if placed := self._placed.get(folder):
                self._staged[folder] = self._origin[placed][1]
                return
            if cached := self._cached.pop(folder, None):
                self._staged[folder] = cached
                return
        adapter = self._read(Path(folder))
        with self._lock:
            self._staged[folder] = adapter

    def unstage(self, folder: str) -> None:
        """Give up what was staged and not placed."""
        with self._lock:
            self._staged.pop(folder, None)

    def place(self, folder: str, requests: Sequence[LoRARequest]) -> None:
        """Register the slots of an adapter that was staged, all or none.

        Raises ValueError for an adapter that was not staged, for a task that it does not have, or for an id in use.
        """
        with self._lock:
            host = self._staged.get(folder)
        if host is None:
            raise ValueError(f"{folder}: not staged")
        tasks = [parse_slot_path(request.lora_path)[1] for request in requests]
        for request, task_id in zip(requests, tasks, strict=True):
            host.bias_row(task_id)
            if request.lora_int_id in self._slots:
                raise ValueError(f"LoRA id {request.lora_int_id} is in use")
        adapter = self._placed.get(folder) or host.to(self._device)
        for request, task_id in zip(requests, tasks, strict=True):
            self._keep(request, adapter, task_id)
        with self._lock:
            del self._staged[folder]
            self._placed[folder] = adapter
            self._origin[adapter] = folder, host

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
        slot = Slot(request.lora_int_id, request.lora_name, request.lora_path, adapter, adapter.bias_row(task_id))
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
            if adapter in self._origin:
                self._cache(adapter)

    def _cache(self, adapter: PackedAdapter) -> None:
        with self._lock:
            folder, host = self._origin.pop(adapter)
            del self._placed[folder]
            self._cached[folder] = host
            self._cached.move_to_end(folder)
            held = sum(adapter.num_bytes for adapter in self._cached.values())
            while held > self._host_cache_bytes:
                _, dropped = self._cached.popitem(last=False)
                held -= dropped.num_bytes

    def _load(self, folder: Path) -> PackedAdapter:
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(f"{folder}: a PEFT adapter; vLLM serves those where MTLORA_PLUGIN is 0")
        manifest, real = read_manifest(folder), folder.resolve()
        if held := self._adapters.get((real, manifest.tensors_sha256)):
            return held
        return self._read(folder).to(self._device)

    def _read(self, folder: Path) -> PackedAdapter:
        """A checkpoint from disk, checked whole, packed in host memory."""
        manifest = read_manifest(folder)
        checkpoint = read_checkpoint(folder, manifest.backbone.model_copy(update=dict(self._backbone)))
        if missing := [module for module in manifest.config.modules if module not in self._modules]:
            raise CheckpointError(f"{folder}: config.blocks: the running model has no {missing[0]!r} in its layers")
        with self._lock:
            self.counts.weight_loads += 1
        movable = self._device.type != "cpu"
        return pack_adapter(folder.resolve(), checkpoint, self._blocks, dtype=self._dtype, movable=movable)
