"""What the engine keeps of an adapter: its packed weights, once a version, and its slots, one a task.

Shape suffixes: G groups, N experts, T tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mtlora.checkpoint import AdapterManifest, Checkpoint
from mtlora.ops.routed_lora import PackedBlock, pack_block


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """One adapter version on the engine's device. Blocks are named as in a checkpoint, `layers.{l}.{module}`.

    blocks: this worker's blocks, in the engine's dtype.
    bias: where the adapter has task biases, float32 [T + 1, G, N] a block; the last row is zeros, for no task.
    """

    folder: Path
    manifest: AdapterManifest
    blocks: Mapping[str, PackedBlock]
    bias: Mapping[str, torch.Tensor]

    def bias_row(self, task_id: str | None) -> int:
        """Row of the tables in `bias` for a task, or for none. Raises ValueError for a task it does not have."""
        if task_id is None:
            return len(self.manifest.tasks)
        try:
            row = self.manifest.task(task_id).bias_index
        except KeyError:
            known = ", ".join(task.id for task in self.manifest.tasks[:8])
            more = f" and {len(self.manifest.tasks) - 8} more" if len(self.manifest.tasks) > 8 else ""
            raise ValueError(f"{self.folder}: no task {task_id!r}; this adapter has {known}{more}") from None
        return len(self.manifest.tasks) if row is None else row


@dataclass(frozen=True, eq=False)
class Slot:
    """What a `LoRARequest` stands for. `adapter` is None for the empty slots of vLLM's warm-up runs."""

    id: int
    path: str
    adapter: PackedAdapter | None
    bias_row: int


def pack_adapter(
    folder: Path, checkpoint: Checkpoint, blocks: list[str], *, device: torch.device, dtype: torch.dtype
) -> PackedAdapter:
    """Pack the blocks that this worker runs. `blocks` are all of its wrapped blocks; the adapter may have fewer."""
    config, tensors = checkpoint.manifest.config, checkpoint.tensors
    packed, bias = {}, {}
    for name in blocks:
        if name.rpartition(".")[2] not in config.modules:
            continue
        block = pack_block(
            tensors[f"{name}.lora_A"],
            tensors[f"{name}.lora_B"],
            tensors[f"{name}.lora_route"],
            num_groups=config.num_groups,
            scaling=config.scaling,
            dtype=dtype,
        )
        packed[name] = PackedBlock(block.shrink_SD.to(device), block.expand_GKE.to(device), block.rank)
        if config.task_bias:
            bias_TGN = tensors[f"{name}.task_bias"].float()
            bias[name] = torch.cat([bias_TGN, torch.zeros_like(bias_TGN[:1])]).to(device)
    return PackedAdapter(folder, checkpoint.manifest, packed, bias)
