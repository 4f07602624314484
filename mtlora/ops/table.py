"""The table of adapters that kernels read: for every block, each adapter has a row of integers.

A row holds the addresses of an adapter's weights. Placing an adapter writes rows in place: no weight moves and no
memory is allocated. The table's address never changes, because compiled or captured graphs hold it.

Shape suffixes: L blocks, A rows (adapters), F fields of a row.
"""

import copy
import itertools
from collections.abc import Sequence
from enum import Enum, IntEnum

import numpy as np
import torch

from mtlora.ops.cpu_kernel import KERNEL_DTYPES, compiled_kernel, from_units, to_units
from mtlora.ops.packed_block import PackedBlock
from mtlora.ops.plan import counts_of
from mtlora.ops.tuning import PIECES, RUNS, KernelConfig, padded

# Alignment, in bytes, of tensors in one piece of memory.
_APART = 256

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


class Layout(Enum):
    """Memory layout of weights: as in a `PackedBlock`; in units for the CPU kernel; in padded rows for GPUs."""

    GIVEN = "given"
    UNITS = "units"
    PADDED = "padded"


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
    """One adapter's rows, one per block, checked once. Keeps the weights alive that the rows point to.

    blocks: one entry per block of the model, None for a block without a path. layout: by default the CPU's. With padded
    rows, all weights are in one piece of memory, pinned if there is a GPU, so that one copy moves them to a device.
    Raises ValueError as `check_block` does, and if blocks differ in dtype, device or hidden size.

    kind: dtype, device and hidden size, None without any path. sizes: (rank, experts, groups) of the blocks with a
    path. active: the numbers of these blocks.
    """

    def __init__(self, blocks: Sequence[PackedBlock | None], *, layout: Layout | None = None) -> None:
        for block in blocks:
            if block is not None:
                check_block(block)
        kinds = {(b.shrink_DS.dtype, b.shrink_DS.device, len(b.shrink_DS)) for b in blocks if b is not None}
        if len(kinds) > 1:
            raise ValueError(f"blocks of several kinds in one adapter: {sorted(map(str, kinds))}")
        self.kind = kinds.pop() if kinds else None
        self.layout = layout or _layout_of_cpu(self.kind)
        self.sizes = [(b.rank, b.num_experts, b.num_groups) for b in blocks if b is not None]
        self.active = frozenset(i for i, block in enumerate(blocks) if block is not None)
        # The event after which the weights are on their device.
        self._arrived: torch.cuda.Event | None = None
        if self.layout is Layout.PADDED:
            # One tensor of bytes holds all blocks.
            self._bytes, placed = _in_one_piece(blocks)
            self._held: Sequence[PackedBlock | None] = ()
            self.num_bytes = len(self._bytes)
        else:
            placed = self._held = [_laid_out(block, self.layout) for block in blocks]
            tensors = [t for held in placed if held for t in (held.shrink_DS, held.expand_GKE, held.bias_bGN)]
            self.num_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        self.rows_LF = torch.zeros(len(blocks), len(Field), dtype=torch.int64)
        for row, block, held in zip(self.rows_LF, blocks, placed, strict=True):
            if block is None or held is None:
                continue
            row[Field.SHRINK], row[Field.EXPAND] = held.shrink_DS.data_ptr(), held.expand_GKE.data_ptr()
            if held.bias_bGN is not None:
                row[Field.BIAS], row[Field.BIAS_ROWS] = held.bias_bGN.data_ptr(), len(held.bias_bGN)
            row[Field.RANK], row[Field.EXPERTS], row[Field.GROUPS] = block.rank, block.num_experts, block.num_groups
            row[Field.DTYPE], row[Field.HIDDEN] = DTYPES.index(block.shrink_DS.dtype), len(block.shrink_DS)
            row[Field.IN_UNITS] = self.layout is Layout.UNITS

    def block(self, number: int) -> PackedBlock | None:
        """A block's weights in their original layout, for adapters on a CPU; None for a block without a path."""
        held = self._held[number]
        if held is None or self.layout is Layout.GIVEN:
            return held
        row = self.rows_LF[number].tolist()
        D, K = row[Field.HIDDEN], row[Field.RANK] * row[Field.EXPERTS]
        S, E = row[Field.RANK] + row[Field.GROUPS] * row[Field.EXPERTS], D // row[Field.GROUPS]
        return PackedBlock(
            from_units(held.shrink_DS, D, S), from_units(held.expand_GKE, K, E), held.rank, held.bias_bGN
        )

    def to(self, device: torch.device, copies: "torch.cuda.Stream | None" = None) -> "AdapterRows":
        """Copy the adapter, which must have padded rows, to another device: one copy, on a GPU in the stream `copies`.

        Returns at once; `arrive` makes the running stream wait for the weights.
        """
        assert self.layout is Layout.PADDED, self.layout
        moved = copy.copy(self)
        # Allocate on the running stream: freed memory is then reused only after that stream's queued work.
        moved._bytes = torch.empty_like(self._bytes, device=device)
        if copies is None:
            moved._bytes.copy_(self._bytes)
        else:
            copies.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(copies):
                moved._bytes.copy_(self._bytes, non_blocking=True)
                moved._arrived = torch.cuda.Event()
                moved._arrived.record()
            moved._bytes.record_stream(copies)
        addresses = self.rows_LF[:, [Field.SHRINK, Field.EXPAND, Field.BIAS]]
        by = moved._bytes.data_ptr() - self._bytes.data_ptr()
        moved.rows_LF = self.rows_LF.clone()
        moved.rows_LF[:, [Field.SHRINK, Field.EXPAND, Field.BIAS]] = torch.where(addresses != 0, addresses + by, 0)
        if device.type == "cuda":
            moved.rows_LF = moved.rows_LF.pin_memory()
        moved.kind = self.kind and (self.kind[0], moved._bytes.device, self.kind[2])
        return moved

    def arrive(self) -> None:
        """Make later work of the running stream wait until the weights are on their device."""
        if self._arrived is not None:
            self._arrived.wait()


def _layout_of_cpu(kind: tuple[torch.dtype, torch.device, int] | None) -> Layout:
    in_units = kind and kind[1].type == "cpu" and kind[0] in KERNEL_DTYPES and compiled_kernel() is not None
    return Layout.UNITS if in_units else Layout.GIVEN


def _laid_out(block: PackedBlock | None, layout: Layout) -> PackedBlock | None:
    if block is None or layout is Layout.GIVEN:
        return block
    return block._replace(shrink_DS=to_units(block.shrink_DS), expand_GKE=to_units(block.expand_GKE))


def _in_one_piece(blocks: Sequence[PackedBlock | None]) -> tuple[torch.Tensor, list[PackedBlock | None]]:
    """(one memory with all blocks' weights in padded rows, the blocks as views of it); pinned if there is a GPU."""
    tensors: list[tuple[torch.Tensor, int]] = []
    for block in filter(None, blocks):
        tensors += [(t, padded(t.shape[-1])) for t in (block.shrink_DS, block.expand_GKE)]
        if block.bias_bGN is not None:
            tensors.append((block.bias_bGN, block.bias_bGN.shape[-1]))
    sizes = [t.shape[:-1].numel() * length * t.itemsize for t, length in tensors]
    starts = [0, *itertools.accumulate(-(-size // _APART) * _APART for size in sizes)]
    device = tensors[0][0].device if tensors else torch.device("cpu")
    pinned = device.type == "cpu" and torch.cuda.is_available()
    memory = torch.zeros(starts[-1], dtype=torch.uint8, device=device, pin_memory=pinned)
    placed = []
    for (tensor, length), start, size in zip(tensors, starts, sizes, strict=False):
        rows = memory[start : start + size].view(tensor.dtype).view(*tensor.shape[:-1], length)
        rows[..., : tensor.shape[-1]] = tensor
        placed.append(rows)
    each = iter(placed)
    return memory, [
        block and PackedBlock(next(each), next(each), block.rank, None if block.bias_bGN is None else next(each))
        for block in blocks
    ]


class AdapterTable:
    """The rows of all adapters, preallocated, at an address that never changes.

    config: for a GPU's table, limits the adapters' sizes. On a GPU an adapter's rows are contiguous; on a CPU a block's
    rows are, because the kernel reads them together.

    rows_LAF: the rows. counts_AC: `counts_of` the adapter in each row, kept on the host.
    """

    def __init__(
        self,
        num_blocks: int,
        num_rows: int,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        config: KernelConfig | None = None,
    ) -> None:
        sizes = (num_blocks, num_rows) if config is None else (num_rows, num_blocks)
        rows = torch.zeros(*sizes, len(Field), dtype=torch.int64, device=device)
        self.rows_LAF = rows if config is None else rows.transpose(0, 1)
        self.counts_AC = np.zeros((num_rows, 1 + len(PIECES) * len(RUNS)), dtype=np.int32)
        self.kind = (dtype, rows.device, hidden_size)
        self._config = config
        self._held: list[AdapterRows | None] = [None] * num_rows

    @property
    def num_rows(self) -> int:
        """A."""
        return len(self._held)

    def held(self, row: int) -> AdapterRows | None:
        """The adapter in a row; None if the row is empty."""
        return self._held[row]

    def place(self, row: int, adapter: AdapterRows | None) -> None:
        """Put an adapter in a row, or empty the row; in place, after the device's queued work.

        Raises IndexError for a row out of range and ValueError for an adapter that does not fit the table.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        if adapter is None:
            self.rows_LAF[:, row].zero_()
            self.counts_AC[row] = 0
        else:
            if adapter.kind not in (None, self.kind):
                raise ValueError(f"an adapter of {adapter.kind} in a table of {self.kind} (dtype, device, hidden size)")
            if len(adapter.rows_LF) != len(self.rows_LAF):
                raise ValueError(f"an adapter of {len(adapter.rows_LF)} blocks in a table of {len(self.rows_LAF)}")
            if self._config is not None:
                for size in adapter.sizes:
                    self._config.check(*size)
                self.counts_AC[row] = counts_of(adapter.sizes, self.kind[2])
            adapter.arrive()
            self.rows_LAF[:, row].copy_(adapter.rows_LF, non_blocking=True)
        self._held[row] = adapter
