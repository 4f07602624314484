"""An adapter inside the engine: packed weights, once a version, and slots, one a task.

Shape suffixes: G groups, N experts, T tasks.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mtlora.checkpoint.format import AdapterManifest, Checkpoint, CheckpointError
from mtlora.checkpoint.read import count_not_finite
from mtlora.ops.packed_block import PackedBlock, pack_block
from mtlora.ops.table import AdapterRows, Layout
from mtlora.vllm_plugin.naming import adapter_version


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """One adapter version on the engine's device.

    rows: its blocks in the order of this worker's blocks, in the engine's dtype, with their task biases [T, G, N] if
    any.
    """

    folder: Path
    manifest: AdapterManifest
    rows: AdapterRows

    @property
    def num_bytes(self) -> int:
        """Bytes of its weights."""
        return self.rows.num_bytes

    def to(self, device: torch.device, copies: torch.cuda.Stream | None) -> "PackedAdapter":
        """The adapter on another device, copied on a stream of its own; itself if it is there already."""
        if self.rows.kind is None or self.rows.kind[1].type == device.type:
            return self
        return PackedAdapter(self.folder, self.manifest, self.rows.to(device, copies))

    @cached_property
    def task_ids(self) -> frozenset[str]:
        """Ids of its tasks."""
        return frozenset(task.id for task in self.manifest.tasks)

    def bias_row(self, task_id: str | None) -> int:
        """Row of the bias tables for a task, -1 for none. Raises ValueError for an unknown task."""
        if task_id is None:
            return -1
        try:
            row = self.manifest.task(task_id).bias_index
        except KeyError:
            known = ", ".join(task.id for task in self.manifest.tasks[:8])
            more = f" and {len(self.manifest.tasks) - 8} more" if len(self.manifest.tasks) > 8 else ""
            raise ValueError(f"{self.folder}: no task {task_id!r}; this adapter has {known}{more}") from None
        return -1 if row is None else row


@dataclass(frozen=True, eq=False)
class Slot:
    """The meaning of a `LoRARequest`. `adapter` is None in the empty slots of vLLM's warm-up runs."""

    id: int
    name: str
    path: str
    adapter: PackedAdapter | None
    bias_row: int

    @property
    def version(self) -> str:
        """NAME/VERSION of its adapter, without the task."""
        return adapter_version(self.name)


def pack_adapter(
    folder: Path, checkpoint: Checkpoint, blocks: list[str], *, dtype: torch.dtype, layout: Layout | None
) -> PackedAdapter:
    """Pack an adapter on the CPU. `blocks` are all wrapped blocks of this worker; an adapter may have fewer.

    A block whose experts are all zero gets no path: training left it frozen, and kernels then skip it.

    layout: that of its weights, by default the CPU's. Raises CheckpointError for weights that overflow in `dtype`.
    """
    config, tensors = checkpoint.manifest.config, checkpoint.tensors

    def pack(name: str) -> PackedBlock | None:
        if name.rpartition(".")[2] not in config.modules or not tensors[f"{name}.lora_B"].any():
            return None
        block = pack_block(
            tensors[f"{name}.lora_A"],
            tensors[f"{name}.lora_B"],
            tensors[f"{name}.lora_route"],
            num_groups=config.num_groups,
            scaling=config.scaling,
            dtype=dtype,
            bias_bGN=tensors[f"{name}.task_bias"] if config.task_bias else None,
        )
        # Values finite in the file may overflow in this dtype, and answers would be computed from NaN.
        for part, tensor in (("lora_A and lora_route", block.shrink_DS), ("lora_B * lora_alpha / r", block.expand_GKE)):
            if bad := count_not_finite(tensor):
                raise CheckpointError(
                    f"{folder}: {name}: {part}: expected finite values in {dtype}, found {bad} NaN or infinite"
                )
        return block

    return PackedAdapter(folder, checkpoint.manifest, AdapterRows([pack(name) for name in blocks], layout=layout))
