"""The CPU backend of `mtlora::add_routed_lora_`.

`_cpu_kernel.cpp` does a step's whole mix in one call, and is built when the package is installed. Where it was not, for
want of a compiler, or cannot run on this processor, torch ops do the same adapter by adapter, which is slower.

Shape suffixes: T tokens, D hidden size, A slots, F fields of a row, M tiles, G groups, N experts.
"""

import ctypes
import importlib.machinery
import logging
from functools import cache
from pathlib import Path

import torch

from mtlora.ops.routed_lora import PackedBlock, routed_lora
from mtlora.ops.table import DTYPES, Field

logger = logging.getLogger(__name__)

# Tokens of a tile: as many as the kernel's innermost loop keeps in registers.
TILE_SIZE = 8

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_ERRORS = {
    2: "a slot is out of the table's range",
    3: "a tile is out of the range of the step's tokens",
    4: "an adapter in the table has another dtype or hidden size than x",
    5: "a bias row is out of the range of its adapter's biases",
}
_ADDRESS, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS: list[type[ctypes._SimpleCData]] = [
    _INT, _INT, _ADDRESS, _ADDRESS, _LONG, _LONG, _LONG, _LONG, _ADDRESS, _LONG, _ADDRESS, _ADDRESS, _LONG, _ADDRESS,
    _LONG, _INT,
]  # fmt: skip


@cache
def compiled_kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it was not built or this processor cannot run it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu_kernel{suffix}")
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("adapters run in torch ops, slower in mixed batches: %s", error)
            return None
        library.mtlora_add_routed.argtypes = _ARGUMENTS
        if library.mtlora_supported(0) and library.mtlora_max_tile() == TILE_SIZE:
            return library
        logger.warning("adapters run in torch ops, slower in mixed batches: %s does not suit this processor", path)
        return None
    logger.warning("adapters run in torch ops, slower in mixed batches: the kernel was not built at install")
    return None


def add_routed_lora_(
    y_TD: torch.Tensor,
    x_TD: torch.Tensor,
    rows_AF: torch.Tensor,
    tokens_T: torch.Tensor,
    bias_rows_T: torch.Tensor,
    tiles_M3: torch.Tensor,
) -> None:
    """Add the path of every planned token to `y_TD`, in place. The operator has checked the tensors' kinds.

    Raises ValueError, before anything is written, where table and plan do not fit each other or x.
    """
    kernel = compiled_kernel()
    if kernel is None or x_TD.dtype not in _KERNEL_DTYPES:
        in_torch_ops(y_TD, x_TD, rows_AF, tokens_T, bias_rows_T, tiles_M3)
    else:
        run_kernel(kernel, 0, y_TD, x_TD, rows_AF, tokens_T, bias_rows_T, tiles_M3)


def run_kernel(
    kernel: ctypes.CDLL,
    instruction_set: int,
    y_TD: torch.Tensor,
    x_TD: torch.Tensor,
    rows_AF: torch.Tensor,
    tokens_T: torch.Tensor,
    bias_rows_T: torch.Tensor,
    tiles_M3: torch.Tensor,
) -> None:
    """`add_routed_lora_` by the compiled kernel. instruction_set: 0 for the best there is, 2 or 512 for one of AVX."""
    error = kernel.mtlora_add_routed(
        instruction_set,
        DTYPES.index(x_TD.dtype),
        y_TD.data_ptr(),
        x_TD.data_ptr(),
        y_TD.stride(0),
        x_TD.stride(0),
        x_TD.shape[0],
        x_TD.shape[1],
        rows_AF.data_ptr(),
        rows_AF.shape[0],
        tokens_T.data_ptr(),
        bias_rows_T.data_ptr(),
        tokens_T.shape[0],
        tiles_M3.data_ptr(),
        tiles_M3.shape[0],
        torch.get_num_threads(),
    )
    if error == 1:
        raise MemoryError("no memory for the scratch space of the routed path")
    if error:
        raise ValueError(_ERRORS[error])


def in_torch_ops(
    y_TD: torch.Tensor,
    x_TD: torch.Tensor,
    rows_AF: torch.Tensor,
    tokens_T: torch.Tensor,
    bias_rows_T: torch.Tensor,
    tiles_M3: torch.Tensor,
) -> None:
    """`add_routed_lora_` in torch ops, one adapter after another."""
    work = []
    for slot, first, count in _spans(tiles_M3):
        if not 0 <= slot < len(rows_AF):
            raise ValueError(_ERRORS[2])
        row = rows_AF[slot].tolist()
        if row[Field.RANK] == 0:
            continue
        if row[Field.DTYPE] != DTYPES.index(x_TD.dtype) or row[Field.HIDDEN] != x_TD.shape[1]:
            raise ValueError(_ERRORS[4])
        tokens, bias_rows = tokens_T[first : first + count], bias_rows_T[first : first + count]
        if first < 0 or len(tokens) != count or tokens.min() < 0 or tokens.max() >= len(x_TD):
            raise ValueError(_ERRORS[3])
        if row[Field.BIAS] and bias_rows.max() >= row[Field.BIAS_ROWS]:
            raise ValueError(_ERRORS[5])
        work.append((_block(row, x_TD.dtype), tokens, bias_rows))
    for block, tokens, bias_rows in work:
        bias_TGN = None
        if block.bias_bGN is not None:
            bias_TGN = block.bias_bGN[bias_rows.clamp_min(0)] * (bias_rows >= 0).view(-1, 1, 1)
        y_TD.index_add_(0, tokens, routed_lora(x_TD[tokens], block, bias_TGN))


def _spans(tiles_M3: torch.Tensor) -> list[list[int]]:
    """[slot, first, count] of every slot: neighbouring tiles of a slot in one."""
    spans: list[list[int]] = []
    for slot, first, count in tiles_M3.tolist():
        if count == 0:
            continue
        if spans and spans[-1][0] == slot and sum(spans[-1][1:]) == first:
            spans[-1][2] += count
        else:
            spans.append([slot, first, count])
    return spans


def _block(row: list[int], dtype: torch.dtype) -> PackedBlock:
    """The tensors that a row of the table points at."""
    D, r, N, G = row[Field.HIDDEN], row[Field.RANK], row[Field.EXPERTS], row[Field.GROUPS]
    bias_bGN = None
    if row[Field.BIAS]:
        bias_bGN = _at(row[Field.BIAS], (row[Field.BIAS_ROWS], G, N), torch.float32)
    return PackedBlock(
        _at(row[Field.SHRINK], (D, r + G * N), dtype), _at(row[Field.EXPAND], (G, N * r, D // G), dtype), r, bias_bGN
    )


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)
