"""Which adapter is in which row of a table, as the kernels read it: for every block a row of integers per adapter.

A row points at an adapter's own weights. Placing an adapter writes rows in place: no weight moves, nothing is
allocated, and the table keeps its address, which compiled or captured graphs hold.

Shape suffixes: L blocks, A rows (adapters), F fields of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from mtlora.ops.cpu_kernel import KERNEL_DTYPES, compiled_kernel, from_units, to_units
from mtlora.ops.packed_block import PackedBlock

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Field(IntEnum):
    """Columns of a row. The kernels read rows by these numbers; `csrc/serving.cpp` and `triton_gpu.py` mirror them."""

    SHRINK = 0  # address of [D, S], or of its units
    EXPAND = 1  # address of [G, K, E], or of its units
    BIAS = 2  # address of float32 [rows, G, N], or 0
    RANK = 3  # 0: no path in this block
    EXPERTS = 4
    GROUPS = 5
    BIAS_ROWS = 6
    DTYPE = 7  # index into DTYPES
    HIDDEN = 8
    IN_UNITS = 9  # 1: weights are in the layout of `cpu_kernel.to_units`


@dataclass(frozen=True)
class TableLimits:
    """The largest adapter that a table may hold, which bounds the GPU kernels' scratch space and grids.

    alignment: a power of two, up to 16, that divides every adapter's S and E.
    """

    rank: int = 0
    experts: int = 0
    groups: int = 0
    alignment: int = 16

    def __or__(self, other: "TableLimits") -> "TableLimits":
        return TableLimits(
            max(self.rank, other.rank),
            max(self.experts, other.experts),
            max(self.groups, other.groups),
            min(self.alignment, other.alignment),
        )

    @staticmethod
    def of(block: PackedBlock) -> "TableLimits":
        """The limits that just hold `block`."""
        alignment = math.gcd(block.shrink_DS.shape[1], block.expand_GKE.shape[2], 16)
        return TableLimits(block.rank, block.num_experts, block.num_groups, alignment)


def check_block(block: PackedBlock) -> None:
    """Raise ValueError unless the kernels can read `block`: matching shapes, one dtype and device, contiguous."""
    shrink, expand, rank, bias = block
    if shrink.dim() != 2 or expand.dim() != 3:
        raise ValueError(f"shrink must be [D, S] and expand [G, K, E], got {list(shrink.shape)}, {list(expand.shape)}")
    (D, S), (G, K, E) = shrink.shape, expand.shape
    if G < 1 or G * E != D:
        raise ValueError(f"num_groups {G} does not divide the hidden size {D} into groups of {E}")
    if rank < 1 or rank > K or K % rank:
        raise ValueError(f"rank {rank} does not divide the {K} rows of expand into experts")
    if rank + G * (K // rank) != S:
        raise ValueError(f"shrink has {S} columns, rank {rank} + {G} groups x {K // rank} experts need others")
    if shrink.dtype not in DTYPES or expand.dtype != shrink.dtype:
        raise ValueError(f"shrink and expand must share one of {DTYPES}, got {shrink.dtype} and {expand.dtype}")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape[1:] != (G, K // rank)):
        raise ValueError(f"bias must be float32 [rows, {G}, {K // rank}], got {bias.dtype} {list(bias.shape)}")
    for name, tensor in (("shrink", shrink), ("expand", expand), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} of {list(tensor.shape)}")
        if tensor.device != shrink.device:
            raise ValueError(f"{name} is on {tensor.device}, shrink on {shrink.device}")


class AdapterRows:
    """One adapter's row for every block, checked once. Keeps the weights alive that the rows point at.

    On a CPU with the compiled kernel, the weights are a copy in its layout, unless `as_given` is set. Only weights as
    given can move to another device, from `blocks`.
    blocks: one entry per block of the model, None for a block without a path. Raises ValueError as `check_block` does,
    and for blocks of several dtypes, devices or hidden sizes.
    """

    def __init__(self, blocks: Sequence[PackedBlock | None], *, as_given: bool = False) -> None:
        first = next((block.shrink_DS for block in blocks if block is not None), None)
        in_units = (
            not as_given and first is not None and first.device.type == "cpu" and first.dtype in KERNEL_DTYPES
            and compiled_kernel() is not None
        )  # fmt: skip
        self.limits = TableLimits()
        # The weights that the rows point at: in units, or as given.
        self._held: list[PackedBlock | None] = []
        self.blocks: tuple[PackedBlock | None, ...] = () if in_units else tuple(blocks)
        rows, kinds = torch.zeros(len(blocks), len(Field), dtype=torch.int64), set()
        for row, block in zip(rows, blocks, strict=True):
            if block is None:
                self._held.append(None)
                continue
            check_block(block)
            shrink, expand, rank, bias = block
            kinds.add((shrink.dtype, shrink.device, shrink.shape[0]))
            if in_units:
                shrink, expand, row[Field.IN_UNITS] = to_units(shrink), to_units(expand), 1
            self._held.append(PackedBlock(shrink, expand, rank, bias))
            row[Field.SHRINK], row[Field.EXPAND] = shrink.data_ptr(), expand.data_ptr()
            if bias is not None:
                row[Field.BIAS], row[Field.BIAS_ROWS] = bias.data_ptr(), len(bias)
            row[Field.RANK], row[Field.EXPERTS], row[Field.GROUPS] = rank, block.num_experts, block.num_groups
            row[Field.DTYPE], row[Field.HIDDEN] = DTYPES.index(block.shrink_DS.dtype), len(block.shrink_DS)
            self.limits |= TableLimits.of(block)
        if len(kinds) > 1:
            raise ValueError(f"blocks of several kinds in one adapter: {sorted(map(str, kinds))}")
        self.kind = kinds.pop() if kinds else None
        self.rows_LF = rows
        tensors = [tensor for held in self._held if held for tensor in (held.shrink_DS, held.expand_GKE, held.bias_bGN)]
        self.num_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        # The numbers of the blocks with a path.
        self.active = frozenset(i for i, block in enumerate(blocks) if block is not None)

    def block(self, number: int) -> PackedBlock | None:
        """A block's weights in the packed layout, whatever the kernel's is; None for a block without a path."""
        held = self._held[number]
        row = self.rows_LF[number].tolist()
        if held is None or not row[Field.IN_UNITS]:
            return held
        D, K = row[Field.HIDDEN], row[Field.RANK] * row[Field.EXPERTS]
        S, E = row[Field.RANK] + row[Field.GROUPS] * row[Field.EXPERTS], D // row[Field.GROUPS]
        return PackedBlock(
            from_units(held.shrink_DS, D, S), from_units(held.expand_GKE, K, E), held.rank, held.bias_bGN
        )


class AdapterTable:
    """The rows of all adapters, preallocated: `rows_LAF[l]` is what the operator takes for block l.

    limits: the limits that graphs were captured for; a larger adapter is refused. By default they grow with the
    adapters.
    """

    def __init__(
        self,
        num_blocks: int,
        num_rows: int,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        limits: TableLimits | None = None,
    ) -> None:
        self.rows_LAF = torch.zeros(num_blocks, num_rows, len(Field), dtype=torch.int64, device=device)
        self.kind = (dtype, self.rows_LAF.device, hidden_size)
        self.limits = limits or TableLimits()
        self._fixed = limits is not None
        self._held: list[AdapterRows | None] = [None] * num_rows

    @property
    def num_rows(self) -> int:
        """A."""
        return len(self._held)

    def held(self, row: int) -> AdapterRows | None:
        """The adapter in a row; None where the row is empty."""
        return self._held[row]

    def place(self, row: int, adapter: AdapterRows | None) -> None:
        """Put an adapter in a row, or empty it; in place, and in order with the work that the device already has.

        Raises IndexError for a row out of range and ValueError for an adapter that does not fit the table.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        if adapter is None:
            self.rows_LAF[:, row].zero_()
        else:
            if adapter.kind not in (None, self.kind):
                raise ValueError(f"an adapter of {adapter.kind} in a table of {self.kind} (dtype, device, hidden size)")
            if len(adapter.rows_LF) != len(self.rows_LAF):
                raise ValueError(f"an adapter of {len(adapter.rows_LF)} blocks in a table of {len(self.rows_LAF)}")
            limits = self.limits | adapter.limits
            if self._fixed and limits != self.limits:
                raise ValueError(f"an adapter of {adapter.limits} in a table of {self.limits}")
            rows_LF = adapter.rows_LF
            if self.rows_LAF.device.type == "cuda":
                rows_LF = rows_LF.pin_memory()
            self.rows_LAF[:, row].copy_(rows_LF, non_blocking=True)
            self.limits = limits
        self._held[row] = adapter
