"""The CPU backend computes y += path(x) for all adapters of a step together.

The compiled kernel computes a step's whole mix in one call. Without it, torch ops compute one adapter after another,
which is slower.

Shape suffixes: T tokens, P planned tokens, D hidden size, A rows of the table, F fields of a row, M tiles, G groups,
N experts, r rank, K = N*r, E = D/G, S = r + G*N, b rows of a bias table.
"""

import ctypes
from collections.abc import Callable

import torch

from mtlora.ops.cpu_kernel import ISA, KERNEL_DTYPES, Step, compiled_kernel, from_units, units_shape
from mtlora.ops.mix import Mix
from mtlora.ops.packed_block import PackedBlock, packed_path
from mtlora.ops.plan import StepPlan
from mtlora.ops.table import DTYPES, AdapterTable, Field

# Function of (y [T, D], x [T, D], block number): adds the block's path of x to y, in place.
AddPath = Callable[[torch.Tensor, torch.Tensor, int], None]

_ERRORS = {
    2: "a tile names a row that the table lacks",
    3: "a tile is out of the range of the step's tokens",
    4: "an adapter in the table has another dtype or hidden size than x",
    5: "a bias row is out of the range of its adapter's biases",
    6: "an adapter's weights are not in the kernel's layout",
}


def add_mixed_paths_(mix: Mix) -> None:
    """Add the path of every planned token to `mix.y_TD`, in place.

    Raises ValueError, before anything is written, for wrong tensors, or if table and plan do not fit each other or x.
    Weights and rows are not checked here: `AdapterRows` checks weights when they are packed, `plan_step` the rows.
    """
    mix.check()
    kernel = compiled_kernel()
    if kernel is None or mix.x_TD.dtype not in KERNEL_DTYPES:
        in_torch_ops(mix)
    else:
        run_kernel(kernel, ISA, mix)


def bind(table: AdapterTable, plan: StepPlan) -> AddPath:
    """Return `run(y_TD, x_TD, block)` for a step's plan; prepares once what is the same for all blocks.

    `run` raises ValueError, before anything is written, if y or x do not fit. Speed matters here: a small model's layer
    takes only tens of microseconds.
    """
    kernel = compiled_kernel()
    dtype, _, hidden = table.kind
    if kernel is None or dtype not in KERNEL_DTYPES:
        return lambda y_TD, x_TD, block: add_mixed_paths_(Mix.of(y_TD, x_TD, table, block, plan))
    add_routed, rows = kernel.mtlora_add_routed, table.rows_LAF
    first, size = rows.data_ptr(), rows.stride(0) * rows.element_size()
    tensors = plan.tokens_P, plan.bias_rows_P, plan.tiles_M3
    step = _step(ISA, dtype, hidden, table.num_rows, *tensors)
    address = ctypes.addressof(step)

    def run(y_TD: torch.Tensor, x_TD: torch.Tensor, block: int) -> None:
        # The closure keeps `step` and `plan` alive: the kernel reads their memory by address.
        (T, D), (y_stride, y_step), (x_stride, x_step) = x_TD.shape, y_TD.stride(), x_TD.stride()
        if (
            step.hidden != D or y_TD.shape != x_TD.shape or x_TD.dtype is not dtype or y_TD.dtype is not dtype
            or y_step != 1 or x_step != 1 or (T > 1 and (y_stride < D or x_stride < D))
            or not (y_TD.is_cpu and x_TD.is_cpu)
        ):  # fmt: skip
            Mix.of(y_TD, x_TD, table, block, plan).check()
            raise ValueError(f"x is of {(x_TD.dtype, x_TD.device, D)}, the table's adapters of {table.kind}")
        error = add_routed(address, first + block * size, y_TD.data_ptr(), x_TD.data_ptr(), y_stride, x_stride, T)
        if error:
            raise _failure(error)

    return run


def _step(
    instruction_set: int,
    dtype: torch.dtype,
    hidden: int,
    num_rows: int,
    tokens_P: torch.Tensor,
    bias_rows_P: torch.Tensor,
    tiles_M3: torch.Tensor,
) -> Step:
    """The kernel's arguments for all blocks of a step. It holds only addresses, so the tensors must outlive it."""
    return Step(
        tokens=tokens_P.data_ptr(), bias_rows=bias_rows_P.data_ptr(), tiles=tiles_M3.data_ptr(),
        num_planned=len(tokens_P), num_tiles=len(tiles_M3), num_rows=num_rows, hidden=hidden, isa=instruction_set,
        dtype=DTYPES.index(dtype), threads=torch.get_num_threads(),
    )  # fmt: skip


def _failure(error: int) -> Exception:
    """The exception for the kernel's error code."""
    if error == 1:
        return MemoryError("no memory for the scratch space of the routed path")
    return ValueError(_ERRORS[error])


def run_kernel(kernel: ctypes.CDLL, instruction_set: int, mix: Mix) -> None:
    """`add_mixed_paths_` by the compiled kernel. instruction_set: 0 for the best, else one of `INSTRUCTION_SETS`."""
    y_TD, x_TD, rows_AF, tokens_P, bias_rows_P, tiles_M3 = mix
    T, D = x_TD.shape
    step = _step(instruction_set, x_TD.dtype, D, len(rows_AF), tokens_P, bias_rows_P, tiles_M3)
    error = kernel.mtlora_add_routed(
        ctypes.addressof(step), rows_AF.data_ptr(), y_TD.data_ptr(), x_TD.data_ptr(), y_TD.stride(0), x_TD.stride(0), T
    )
    if error:
        raise _failure(error)


def in_torch_ops(mix: Mix) -> None:
    """`add_mixed_paths_` in torch ops, one adapter after another."""
    y_TD, x_TD, rows_AF, tokens_P, bias_rows_P, tiles_M3 = mix
    work = []
    for number, first, count in _spans(tiles_M3):
        if not 0 <= number < len(rows_AF):
            raise ValueError(_ERRORS[2])
        row = rows_AF[number].tolist()
        if row[Field.RANK] == 0:
            continue
        if row[Field.DTYPE] != DTYPES.index(x_TD.dtype) or row[Field.HIDDEN] != x_TD.shape[1]:
            raise ValueError(_ERRORS[4])
        tokens, bias_rows = tokens_P[first : first + count], bias_rows_P[first : first + count]
        if first < 0 or len(tokens) != count or tokens.min() < 0 or tokens.max() >= len(x_TD):
            raise ValueError(_ERRORS[3])
        if row[Field.BIAS] and bias_rows.max() >= row[Field.BIAS_ROWS]:
            raise ValueError(_ERRORS[5])
        work.append((_block(row, x_TD.dtype), tokens, bias_rows))
    for block, tokens, bias_rows in work:
        bias_TGN = None
        if block.bias_bGN is not None:
            bias_TGN = block.bias_bGN[bias_rows.clamp_min(0)] * (bias_rows >= 0).view(-1, 1, 1)
        y_TD.index_add_(0, tokens, packed_path(x_TD[tokens], block, bias_TGN))


def _spans(tiles_M3: torch.Tensor) -> list[list[int]]:
    """[row, first, count] of every used row of the table: merges a row's neighbouring tiles."""
    spans: list[list[int]] = []
    for row, first, count in tiles_M3.tolist():
        if count == 0:
            continue
        if spans and spans[-1][0] == row and sum(spans[-1][1:]) == first:
            spans[-1][2] += count
        else:
            spans.append([row, first, count])
    return spans


def _block(row: list[int], dtype: torch.dtype) -> PackedBlock:
    """The tensors that a row of the table points at."""
    D, r, N, G = row[Field.HIDDEN], row[Field.RANK], row[Field.EXPERTS], row[Field.GROUPS]
    bias_bGN = None
    if row[Field.BIAS]:
        bias_bGN = _at(row[Field.BIAS], (row[Field.BIAS_ROWS], G, N), torch.float32)
    shrink, expand = (D, r + G * N), (G, N * r, D // G)
    if row[Field.IN_UNITS]:
        shrink_DS = from_units(_at(row[Field.SHRINK], units_shape(*shrink, dtype), dtype), *shrink)
        expand_GKE = from_units(_at(row[Field.EXPAND], (G, *units_shape(*expand[1:], dtype)), dtype), *expand[1:])
    else:
        shrink_DS, expand_GKE = _at(row[Field.SHRINK], shrink, dtype), _at(row[Field.EXPAND], expand, dtype)
    return PackedBlock(shrink_DS, expand_GKE, r, bias_bGN)


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)
