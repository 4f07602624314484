"""Random adapters in a table, with the launches that serve them and an oracle in float64.

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups, L layers.
"""

import numpy as np
import torch

from benchmarks.gpu.backbones import AdapterShape
from mtlora.ops import tuning
from mtlora.ops.packed_block import PackedBlock, pack_block, packed_path
from mtlora.ops.plan import DevicePlan, plan_step
from mtlora.ops.table import AdapterRows, AdapterTable, Layout
from mtlora.ops.tuning import KernelConfig

# Scaling of the experts: makes a path's output as large as its input, so that a wrong adapter is noticed.
_SCALING = 1.0


def config_for(device: torch.device, **sizes: object) -> KernelConfig:
    """The config of a device; in the interpreter, which is slow, that of a small card."""
    if device.type == "cuda":
        return tuning.on_this_card(device, **sizes)
    return KernelConfig(**sizes, num_sms=1, max_parts=2)  # type: ignore[arg-type]


class Adapters:
    """A table of adapters of one shape beside every FFN block, a plan on the device, and the launches.

    blocks: the adapters' weights, by row of the table and layer.
    """

    def __init__(self, config: KernelConfig, device: torch.device, shape: AdapterShape) -> None:
        # Import here: the interpreter must be chosen before Triton is imported.
        from mtlora.ops import triton_gpu

        self.config, self.device, self.shape = config, device, shape
        L, A, D = config.num_blocks, config.max_adapters, config.hidden_size
        self.table = AdapterTable(L, A, hidden_size=D, dtype=config.dtype, device=device, config=config)
        self.blocks: dict[int, list[PackedBlock]] = {}
        self.plan = DevicePlan(config, device)
        self.buffers = triton_gpu.Buffers.of(config, self.plan.words_W, self.table.rows_LAF.transpose(0, 1))
        self.path = triton_gpu.Path(config, self.buffers)
        # Start with NaN, so that reading a value before it is written is noticed.
        self.buffers.scratch_QC.fill_(float("nan"))

    def place(self, row: int, seed: int) -> None:
        """Put a random adapter in a row."""
        generator = torch.Generator(self.device).manual_seed(seed)
        D, (r, N, G) = self.config.hidden_size, (self.shape.rank, self.shape.experts, self.shape.groups)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=self.device)

        self.blocks[row] = [
            pack_block(
                randn(r, D) / D**0.5, randn(N, D, r) / r**0.5, randn(G * N, D) / D**0.5,
                num_groups=G, scaling=_SCALING, dtype=self.config.dtype,
            )
            for _ in range(self.config.num_blocks)
        ]  # fmt: skip
        self.table.place(row, AdapterRows(self.blocks[row], layout=Layout.PADDED))

    def plan_tokens(self, row_T: np.ndarray) -> None:
        """Plan a step: the row of each token, -1 for none."""
        size = tuning.tile_size(len(row_T))
        plan = plan_step(row_T, np.full_like(row_T, -1), num_rows=self.table.num_rows, tile_size=size)
        self.plan.set(plan, self.table.counts_AC)

    def oracle(self, x_TD: torch.Tensor, layer: int, row_T: np.ndarray) -> torch.Tensor:
        """The path's output [T, D] in float64."""
        out_TD = torch.zeros_like(x_TD, dtype=torch.float64)
        for row in np.unique(row_T[row_T >= 0]):
            shrink_DS, expand_GKE, rank, _ = self.blocks[int(row)][layer]
            block = PackedBlock(shrink_DS.double(), expand_GKE.double(), rank)
            some = torch.from_numpy(np.flatnonzero(row_T == row)).to(x_TD.device)
            out_TD[some] = packed_path(x_TD[some].double(), block, None)
        return out_TD
