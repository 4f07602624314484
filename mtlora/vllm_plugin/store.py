"""A worker's adapters: in memory from registration to removal, and then in a host cache."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.lora.request import LoRARequest

from mtlora.checkpoint.format import CheckpointError
from mtlora.checkpoint.read import read_checkpoint, read_manifest
from mtlora.ops.table import Layout
from mtlora.ops.tuning import KernelConfig
from mtlora.vllm_plugin.naming import parse_slot_path
from mtlora.vllm_plugin.packed import PackedAdapter, Slot, pack_adapter


@dataclass
class Counts:
    """Counts since a worker's start."""

    weight_loads: int = 0
    slot_evictions: int = 0


class AdapterStore:
    """Packed weights, once an adapter version, and the slots that point at them.

    vLLM may evict slots from its caches and need them again in the middle of a step, where an error ends the engine. So
    eviction does not free weights: they stay until their last slot is removed by id.

    A server loads an adapter in two calls: `stage` reads and packs it, in any thread, while steps run; `place` then
    only registers its slots. Removed adapters stay packed in host memory, up to `host_cache_bytes`; the least recently
    used goes first. Staging such an adapter again reads nothing.

    backbone: facts about the running model, as fields of `BackboneIdentity`. Adapters for another backbone are refused.
    gpu: what a GPU's kernels were started for; larger adapters are refused. on_drop: called when an adapter's weights
    are about to leave the device.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        blocks: list[str],
        *,
        device: torch.device,
        dtype: torch.dtype,
        host_cache_bytes: int = 0,
        gpu: KernelConfig | None = None,
        on_drop: Callable[[PackedAdapter], None] = lambda _: None,
    ) -> None:
        self._backbone = backbone
        self._blocks = blocks
        self._modules = {name.rpartition(".")[2] for name in blocks}
        self._device = device
        self._dtype = dtype
        self._gpu = gpu
        self._on_drop = on_drop
        # Weights go to a GPU beside the running steps.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Keys: the real folder and the sha256 of the tensors.
        self._adapters: dict[tuple[Path, str], PackedAdapter] = {}
        self._slots: dict[int, Slot] = {}
        self._users: dict[PackedAdapter, set[int]] = {}
        self._host_cache_bytes = host_cache_bytes
        # Keys: the folder as callers name it. The lock guards what `stage`, in its own thread, shares with the rest.
        self._lock = threading.Lock()
        self._staged: dict[str, PackedAdapter] = {}
        self._cached: OrderedDict[str, PackedAdapter] = OrderedDict()
        # Placed adapters, and the name and the host copy of each.
        self._placed: dict[str, PackedAdapter] = {}
        self._origin: dict[PackedAdapter, tuple[str, PackedAdapter]] = {}
        self.counts = Counts()

    def slot_ids(self) -> set[int]:
        """Ids of all slots."""
        return set(self._slots)

    def resident_bytes(self) -> int:
        """Bytes of all packed weights and biases on this worker's device."""
        return sum(adapter.num_bytes for adapter in self._adapters.values())

    def register(self, request: LoRARequest) -> Slot:
        """The slot of a request. Reads its adapter if its weights are not here, or if `load_inplace` is set.

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

        A server registers its adapters first. A request for an unregistered one reads the disk, and an error then ends
        the engine.
        """
        held = self._slots.get(request.lora_int_id)
        if held is not None and held.path == request.lora_path:
            return held
        folder, task_id = parse_slot_path(request.lora_path)
        real = folder.resolve()
        known = [adapter for adapter in self._adapters.values() if adapter.folder == real]
        return self._keep(request, known[-1] if known else self._load(folder), task_id)

    def stage(self, folder: str) -> None:
        """Read and pack a checkpoint in host memory, ready for `place`. Raises CheckpointError if that fails."""
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
        """Drop a staged checkpoint that was not placed."""
        with self._lock:
            self._staged.pop(folder, None)

    def place(self, folder: str, requests: Sequence[LoRARequest]) -> None:
        """Register the slots of a staged adapter, all or none.

        Raises ValueError for an adapter that was not staged, for an unknown task, or for an id in use.
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
        adapter = self._placed.get(folder) or host.to(self._device, self._copies)
        for request, task_id in zip(requests, tasks, strict=True):
            self._keep(request, adapter, task_id)
        with self._lock:
            del self._staged[folder]
            self._placed[folder] = adapter
            self._origin[adapter] = folder, host

    def remove(self, slot_id: int) -> bool:
        """Forget a slot, and weights with their last slot. False for an unknown id."""
        slot = self._slots.pop(slot_id, None)
        if slot is None:
            return False
        self._unuse(slot)
        return True

    def _keep(self, request: LoRARequest, adapter: PackedAdapter, task_id: str | None) -> Slot:
        if task_id is None and request.lora_name in adapter.task_ids:
            # `--lora-modules TASK=FOLDER` of vLLM's server: the name is the task.
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
            self._on_drop(adapter)
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
        return self._read(folder).to(self._device, self._copies)

    def _read(self, folder: Path) -> PackedAdapter:
        """A checkpoint from disk, checked completely, and packed in host memory."""
        manifest = read_manifest(folder)
        checkpoint = read_checkpoint(folder, manifest.backbone.model_copy(update=dict(self._backbone)))
        if missing := [module for module in manifest.config.modules if module not in self._modules]:
            raise CheckpointError(
                f"{folder}: config.blocks: found {manifest.config.blocks!r}; this engine runs adapters beside "
                f"{' and '.join(sorted(self._modules))} alone, and {missing[0]!r} is not among them"
            )
        if self._gpu is not None:
            try:
                self._gpu.check(manifest.config.r, manifest.config.num_experts, manifest.config.num_groups)
            except ValueError as error:
                raise CheckpointError(f"{folder}: config: {error}") from None
        with self._lock:
            self.counts.weight_loads += 1
        layout = None if self._gpu is None else Layout.PADDED
        return pack_adapter(folder.resolve(), checkpoint, self._blocks, dtype=self._dtype, layout=layout)
