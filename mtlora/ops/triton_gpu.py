"""The GPU backend of `mtlora::add_mixed_paths_`: two Triton launches for any mix of adapters.

`_shrink` computes s = x [A; R] for every tile of tokens. If tokens are few, it splits x's dimensions and the rows of
[A; R], so that a decode step fills the card. `_expand` sums the parts, takes the softmax over experts, forms z in
registers, and adds z Bcat_j to y; each piece of y belongs to one program. Only s goes through memory: r + G*N floats
per token; z would take G*N*r.

Products take the adapters' dtype and accumulate in float32. The host reads nothing back, allocations do not depend on
tensor values, and the kernel finds a tile's weights through its row: a captured graph serves any later mix.

With TRITON_INTERPRET=1 it works on CPU tensors, for tests.

Shape suffixes: T tokens, P planned tokens, D hidden size, A rows of the table, F fields of a row, M tiles, C parts of a
sum, S = r + G*N.
"""

# Kernels take types that Python does not have.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl

from mtlora.ops.mix import Mix
from mtlora.ops.table import Field, TableLimits
from mtlora.ops.tuning import Launch, choose

_SHRINK, _EXPAND, _BIAS = tl.constexpr(Field.SHRINK), tl.constexpr(Field.EXPAND), tl.constexpr(Field.BIAS)
_RANK, _EXPERTS, _GROUPS = tl.constexpr(Field.RANK), tl.constexpr(Field.EXPERTS), tl.constexpr(Field.GROUPS)
_FIELDS = tl.constexpr(len(Field))

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _shrink(
    x, s, rows, tokens, tiles, hidden, x_stride, s_stride, part_stride,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """s[part, place, :] = the part's share of x [A; R]; grid (tiles, parts, blocks of S)."""
    tile, part = tl.program_id(0), tl.program_id(1)
    row = rows + tl.load(tiles + 3 * tile).to(tl.int64) * _FIELDS
    start, count = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rank = tl.load(row + _RANK).to(tl.int32)
    size = tl.multiple_of(rank + tl.load(row + _GROUPS).to(tl.int32) * tl.load(row + _EXPERTS).to(tl.int32), ALIGNED)
    cols = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    if (count > 0) & (rank > 0) & (tl.program_id(2) * BLOCK_S < size):
        weights = tl.multiple_of(tl.load(row + _SHRINK).to(tl.pointer_type(x.dtype.element_ty)), 16)
        t = tl.arange(0, BLOCK_T)
        token = tl.load(tokens + start + t, mask=t < count, other=0).to(tl.int64)
        sums = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32)
        for first in range(part * BLOCK_D, hidden, PARTS * BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            a = tl.load(
                x + token[:, None] * x_stride + d[None, :],
                mask=(t < count)[:, None] & (d < hidden)[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                weights + d[:, None] * size + cols[None, :],
                mask=(d < hidden)[:, None] & (cols < size)[None, :], other=0.0,
            )  # fmt: skip
            sums = tl.dot(a.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
        tl.store(
            s + part * part_stride + (start + t)[:, None] * s_stride + cols[None, :],
            sums, mask=(t < count)[:, None] & (cols < size)[None, :],
        )  # fmt: skip


@triton.jit
def _sum_parts(s, place, column, mask, s_stride, part_stride, PARTS: tl.constexpr):
    """Sum over the parts of s[:, place, column], 0 where masked."""
    at = s + place[:, None] * s_stride + column[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    for part in range(1, PARTS):
        total += tl.load(at + part * part_stride, mask=mask, other=0.0)
    return total


@triton.jit
def _logits(s, bias, place, bias_row, i, live, rank, experts, groups, j, s_stride, part_stride, PARTS: tl.constexpr):
    """Router logits of group j for experts i, with the task's bias; minus infinity beyond the last expert."""
    mask = live[:, None] & (i < experts)[None, :]
    column = j * experts + i
    logits = _sum_parts(s, place, rank + column, mask, s_stride, part_stride, PARTS)
    logits += tl.load(
        bias + bias_row[:, None] * groups * experts + column[None, :],
        mask=mask & (bias_row >= 0)[:, None], other=0.0,
    )  # fmt: skip
    return tl.where((i < experts)[None, :], logits, float("-inf"))


@triton.jit
def _expand(
    y, s, rows, tokens, bias_rows, tiles, hidden, y_stride, s_stride, part_stride,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """y += softmax(logits) (x) h Bcat_j; grid (tiles, blocks of groups' columns)."""
    tile = tl.program_id(0)
    row = rows + tl.load(tiles + 3 * tile).to(tl.int64) * _FIELDS
    start, count = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rank = tl.load(row + _RANK).to(tl.int32)
    experts, groups = tl.load(row + _EXPERTS).to(tl.int32), tl.maximum(tl.load(row + _GROUPS).to(tl.int32), 1)
    width = tl.multiple_of(hidden // groups, ALIGNED)
    blocks = tl.cdiv(width, BLOCK_E)
    j = tl.program_id(1) // blocks
    e = (tl.program_id(1) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    if (count > 0) & (rank > 0) & (j < groups):
        dtype: tl.constexpr = y.dtype.element_ty
        weights = tl.multiple_of(tl.load(row + _EXPAND).to(tl.pointer_type(dtype)), 16)
        bias_at = tl.load(row + _BIAS)
        bias = bias_at.to(tl.pointer_type(tl.float32))
        t, k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
        live, place = t < count, start + t
        token = tl.load(tokens + place, mask=live, other=0).to(tl.int64)
        # An adapter without biases: no row has one.
        bias_row = tl.where(bias_at == 0, -1, tl.load(bias_rows + place, mask=live, other=-1))
        h = _sum_parts(s, place, k, live[:, None] & (k < rank)[None, :], s_stride, part_stride, PARTS)
        logits = _logits(
            s, bias, place, bias_row, tl.arange(0, BLOCK_N), live, rank, experts, groups, j, s_stride,
            part_stride, PARTS,
        )  # fmt: skip
        largest = tl.max(logits, axis=1)
        total = tl.sum(tl.exp(logits - largest[:, None]), axis=1)
        sums = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
        inner = tl.arange(0, BLOCK_I * BLOCK_R)
        for first in range(0, experts, BLOCK_I):
            some = _logits(
                s, bias, place, bias_row, first + tl.arange(0, BLOCK_I), live, rank, experts, groups, j,
                s_stride, part_stride, PARTS,
            )  # fmt: skip
            routing = tl.exp(some - largest[:, None]) / total[:, None]
            z = tl.reshape(routing[:, :, None] * h[:, None, :], (BLOCK_T, BLOCK_I * BLOCK_R))
            i, k_inner = first + inner // BLOCK_R, inner % BLOCK_R
            w = tl.load(
                weights + ((j * experts + i) * rank + k_inner)[:, None] * width + e[None, :],
                mask=((i < experts) & (k_inner < rank))[:, None] & (e < width)[None, :], other=0.0,
            )  # fmt: skip
            sums = tl.dot(z.to(dtype).to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
        at = y + token[:, None] * y_stride + (j * width + e)[None, :]
        mask = live[:, None] & (e < width)[None, :]
        tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + sums).to(dtype), mask=mask)


# The interpreter multiplies bfloat16's bits as if they were integers, so products take float32 there.
_COMPILED = isinstance(_shrink, triton.JITFunction)


def add_mixed_paths_(mix: Mix, limits: TableLimits, tile_size: int, launch: Launch | None = None) -> None:
    """Add the path of every planned token to `mix.y_TD`, in place; `mix` is checked.

    launch: how to divide the work; by default as tuned for this card and shape.
    """
    y_TD, x_TD, rows_AF, tokens_P, bias_rows_P, tiles_M3 = mix
    num_tiles, num_planned, D = len(tiles_M3), len(tokens_P), x_TD.shape[1]
    if num_tiles == 0 or limits.rank == 0:
        return
    launch = launch or choose(x_TD.device, D, num_planned, num_tiles, limits)
    size = limits.rank + limits.groups * limits.experts
    s_CPS = torch.empty(launch.parts, num_planned, size, dtype=torch.float32, device=x_TD.device)
    block_t, block_s = (
        max(16, triton.next_power_of_2(tile_size)),
        min(launch.block_s, max(16, triton.next_power_of_2(size))),
    )
    block_r, block_n = triton.next_power_of_2(limits.rank), triton.next_power_of_2(limits.experts)
    # A product's inner dimension is at least 16, and z [tile, BLOCK_I * BLOCK_R] lives in registers.
    block_i = max(1, launch.block_k // block_r, 16 // block_r)
    common = {
        "PARTS": launch.parts,
        "BLOCK_T": block_t,
        "ALIGNED": limits.alignment,
        "PRECISION": "ieee" if x_TD.dtype == torch.float32 else "tf32",
        "OPERAND": _OPERANDS[x_TD.dtype] if _COMPILED else tl.float32,
    }
    _shrink[(num_tiles, launch.parts, triton.cdiv(size, block_s))](
        x_TD, s_CPS, rows_AF, tokens_P, tiles_M3, D, x_TD.stride(0), s_CPS.stride(1), s_CPS.stride(0),
        BLOCK_S=block_s, BLOCK_D=launch.block_d, **common,
        num_warps=launch.shrink_warps, num_stages=launch.shrink_stages,
    )  # fmt: skip
    # With any number of groups up to the limit, D has at most this many blocks.
    num_blocks = triton.cdiv(D, launch.block_e) + limits.groups
    _expand[(num_tiles, num_blocks)](
        y_TD, s_CPS, rows_AF, tokens_P, bias_rows_P, tiles_M3, D, y_TD.stride(0), s_CPS.stride(1), s_CPS.stride(0),
        BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_I=block_i, BLOCK_E=launch.block_e, **common,
        num_warps=launch.expand_warps, num_stages=launch.expand_stages,
    )  # fmt: skip
