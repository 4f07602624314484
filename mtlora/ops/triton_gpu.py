"""The GPU backend: two Triton launches per block, which are the same for any mix of adapters.

`_shrink` computes s = x [A; R] for every tile of tokens. It splits x's dimensions into parts, so that a decode step
uses the whole GPU. `_expand` sums the parts, takes the softmax over experts, forms z in registers, and adds z Bcat_j to
y; each piece of y belongs to one program. Only s goes through memory: r + G*N floats per token; z would take G*N*r.

Grids are a few programs for each multiprocessor, which loop over the live work that the plan's header counts. Rank,
experts and groups are read from the table, the plan from a buffer of fixed address. So a launch depends only on the
padded tokens and the engine's config (`launches`): nothing is compiled after the warm-up, and a captured graph works
for any later mix.

Products take the adapters' dtype and accumulate in float32.

With TRITON_INTERPRET=1 it works on CPU tensors, for tests.

Shape suffixes: T tokens, P planned tokens, D hidden size, A rows of the table, L blocks, F fields of a row, W words of
a plan, Q rows and C columns of the scratch space, S = r + G*N, E = D/G.
"""

# Triton's kernels take argument types that Python cannot annotate.
# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mtlora.ops.plan import HEADER_WORDS, TILE_WORDS, Header
from mtlora.ops.table import Field
from mtlora.ops.tuning import PIECES, SHAPES, KernelConfig, cut, num_programs

_SHRINK, _EXPAND, _BIAS = tl.constexpr(Field.SHRINK), tl.constexpr(Field.EXPAND), tl.constexpr(Field.BIAS)
_RANK, _EXPERTS, _GROUPS = tl.constexpr(Field.RANK), tl.constexpr(Field.EXPERTS), tl.constexpr(Field.GROUPS)
_FIELDS = tl.constexpr(len(Field))

_TILES, _TOKENS, _PARTS = tl.constexpr(Header.TILES), tl.constexpr(Header.TOKENS), tl.constexpr(Header.PARTS)
_COLUMNS = tl.constexpr(Header.COLUMNS)
_ITEMS, _RUN = tl.constexpr(Header.ITEMS), tl.constexpr(Header.RUN)
_SAMPLE_BLOCK, _SAMPLE_TILE = tl.constexpr(Header.SAMPLE_BLOCK), tl.constexpr(Header.SAMPLE_TILE)
_HEADER_WORDS, _TILE_WORDS = tl.constexpr(HEADER_WORDS), tl.constexpr(TILE_WORDS)

# Rank columns per product. A product's inner dimension must be at least 16: this number times BLOCK_N experts.
_RANKS = tl.constexpr(16)
# Experts whose logits are loaded together.
_LOGITS = tl.constexpr(8)

# Most tokens of a routing sample.
SAMPLE_TOKENS = 8
_SAMPLE_TOKENS = tl.constexpr(SAMPLE_TOKENS)

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# Do not specialise these arguments: their values change between launches, and each value would need a compilation.
@triton.jit(do_not_specialize=["block", "num_tokens"])
def _shrink(
    x, s, table, plan, block, num_tokens, x_stride,
    HIDDEN: tl.constexpr, ADAPTER: tl.constexpr, S_STRIDE: tl.constexpr, MAX_PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """s[part, place, :] = the part's share of x [A; R] for every live tile; item: (tile, part, piece of S)."""
    tiles, planned = tl.load(plan + _TILES), tl.load(plan + _TOKENS)
    parts = tl.minimum(tl.load(plan + _PARTS), MAX_PARTS)
    pieces = tl.cdiv(tl.load(plan + _COLUMNS), BLOCK_S)
    for item in range(tl.program_id(0), tiles * parts * pieces, tl.num_programs(0)):
        at = plan + _HEADER_WORDS + item % tiles * _TILE_WORDS
        part, col = item // tiles % parts, item // (tiles * parts) * BLOCK_S
        row = table + tl.load(at).to(tl.int64) * ADAPTER + block * _FIELDS
        start, count = tl.load(at + 1), tl.load(at + 2)
        rank = tl.load(row + _RANK).to(tl.int32)
        size = rank + tl.load(row + _GROUPS).to(tl.int32) * tl.load(row + _EXPERTS).to(tl.int32)
        if (rank > 0) & (col < size):
            # Columns up to the row's padded end are computed and written to s too, but never read from there.
            size = tl.cdiv(size, 16) * 16
            cols = col + tl.arange(0, BLOCK_S)
            weights = tl.multiple_of(tl.load(row + _SHRINK).to(tl.pointer_type(x.dtype.element_ty)), 16)
            t = tl.arange(0, BLOCK_T)
            tokens = plan + _HEADER_WORDS + tiles * _TILE_WORDS + start
            token = tl.load(tokens + t, mask=t < count, other=num_tokens)
            live = token < num_tokens
            token = token.to(tl.int64)
            sums = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32)
            for first in range(part * BLOCK_D, HIDDEN, parts * BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                a = tl.load(
                    x + token[:, None] * x_stride + d[None, :], mask=live[:, None] & (d < HIDDEN)[None, :], other=0.0,
                )  # fmt: skip
                w = tl.load(
                    weights + d[:, None] * size + cols[None, :],
                    mask=(d < HIDDEN)[:, None] & (cols < size)[None, :], other=0.0,
                )  # fmt: skip
                sums = tl.dot(a.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
            place = (part * planned + start + t).to(tl.int64)
            tl.store(s + place[:, None] * S_STRIDE + cols[None, :], sums, mask=live[:, None] & (cols < size)[None, :])


@triton.jit
def _sum_parts(s, place, column, mask, parts, planned, S_STRIDE: tl.constexpr, MAX_PARTS: tl.constexpr):
    """Sum over the parts of s[:, place, column], at most MAX_PARTS; 0 where masked."""
    at = s + place.to(tl.int64)[:, None] * S_STRIDE + column[None, :]
    step = planned.to(tl.int64) * S_STRIDE
    total = tl.load(at, mask=mask, other=0.0)
    # Unroll: otherwise each load would wait for the one before.
    for part in tl.static_range(1, MAX_PARTS):
        # Compare as a block: the interpreter does not accept scalar masks.
        there = (tl.zeros_like(column) + part < parts)[None, :]
        total += tl.load(at + part * step, mask=mask & there, other=0.0)
    return total


@triton.jit
def _logits(
    s, bias, place, bias_row, i, live, rank, experts, groups, j, parts, planned, S_STRIDE: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """Router logits of group j for experts i, with the task's bias; minus infinity beyond the last expert."""
    mask = live[:, None] & (i < experts)[None, :]
    column = j * experts + i
    logits = _sum_parts(s, place, rank + column, mask, parts, planned, S_STRIDE, MAX_PARTS)
    logits += tl.load(
        bias + bias_row[:, None] * groups * experts + column[None, :],
        mask=mask & (bias_row >= 0)[:, None], other=0.0,
    )  # fmt: skip
    return tl.where((i < experts)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["block", "num_tokens"])
def _expand(
    y, s, table, plan, samples, block, num_tokens, y_stride,
    HIDDEN: tl.constexpr, ADAPTER: tl.constexpr, S_STRIDE: tl.constexpr, SAMPLE_STRIDE: tl.constexpr,
    MAX_PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    SIZE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """y += softmax(logits) (x) h Bcat_j for every live tile; item: (tile, a run of pieces of a group's columns)."""
    tiles, planned = tl.load(plan + _TILES), tl.load(plan + _TOKENS)
    parts = tl.load(plan + _PARTS)
    run = tl.load(plan + _RUN + SIZE)
    for item in range(tl.program_id(0), tiles * tl.load(plan + _ITEMS + SIZE), tl.num_programs(0)):
        tile, nth = item % tiles, item // tiles
        at = plan + _HEADER_WORDS + tile * _TILE_WORDS
        row = table + tl.load(at).to(tl.int64) * ADAPTER + block * _FIELDS
        start, count = tl.load(at + 1), tl.load(at + 2)
        rank = tl.load(row + _RANK).to(tl.int32)
        experts, groups = tl.load(row + _EXPERTS).to(tl.int32), tl.maximum(tl.load(row + _GROUPS).to(tl.int32), 1)
        width = tl.multiple_of(HIDDEN // groups, ALIGNED)
        pieces = tl.cdiv(width, BLOCK_E)
        runs = tl.cdiv(pieces, run)
        j, first_piece = nth // runs, nth % runs * run
        if (rank > 0) & (j < groups):
            dtype: tl.constexpr = y.dtype.element_ty
            weights = tl.multiple_of(tl.load(row + _EXPAND).to(tl.pointer_type(dtype)), 16)
            bias_at = tl.load(row + _BIAS)
            bias = bias_at.to(tl.pointer_type(tl.float32))
            t, place = tl.arange(0, BLOCK_T), start + tl.arange(0, BLOCK_T)
            tokens = plan + _HEADER_WORDS + tiles * _TILE_WORDS
            token = tl.load(tokens + place, mask=t < count, other=num_tokens)
            live = token < num_tokens
            token = token.to(tl.int64)
            # Without a table of biases, no token has a bias row.
            bias_row = tl.where(bias_at == 0, -1, tl.load(tokens + planned + place, mask=live, other=-1))
            largest = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_T,), dtype=tl.float32)
            for first in range(0, experts, _LOGITS):
                logits = _logits(
                    s, bias, place, bias_row, first + tl.arange(0, _LOGITS), live, rank, experts, groups, j, parts,
                    planned, S_STRIDE, MAX_PARTS,
                )  # fmt: skip
                larger = tl.maximum(largest, tl.max(logits, axis=1))
                total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), axis=1)
                largest = larger
            # Rows of weights are padded: padding columns are read too, and their sums are dropped.
            length = tl.cdiv(width, 16) * 16
            inner = tl.arange(0, BLOCK_N * _RANKS)
            for piece in range(first_piece, tl.minimum(first_piece + run, pieces)):
                e = piece * BLOCK_E + tl.arange(0, BLOCK_E)
                sums = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
                for k_first in range(0, rank, _RANKS):
                    k = k_first + tl.arange(0, _RANKS)
                    h = _sum_parts(
                        s, place, k, live[:, None] & (k < rank)[None, :], parts, planned, S_STRIDE, MAX_PARTS
                    )
                    for first in range(0, experts, BLOCK_N):
                        logits = _logits(
                            s, bias, place, bias_row, first + tl.arange(0, BLOCK_N), live, rank, experts, groups, j,
                            parts, planned, S_STRIDE, MAX_PARTS,
                        )  # fmt: skip
                        routing = tl.exp(logits - largest[:, None]) / total[:, None]
                        z = tl.reshape(routing[:, :, None] * h[:, None, :], (BLOCK_T, BLOCK_N * _RANKS))
                        i_inner, k_inner = first + inner // _RANKS, k_first + inner % _RANKS
                        w = tl.load(
                            weights + ((j * experts + i_inner) * rank + k_inner)[:, None] * length + e[None, :],
                            mask=((i_inner < experts) & (k_inner < rank))[:, None] & (e < length)[None, :], other=0.0,
                        )  # fmt: skip
                        sums = tl.dot(z.to(dtype).to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION)
                out = y + token[:, None] * y_stride + (j * width + e)[None, :]
                mask = live[:, None] & (e < width)[None, :]
                tl.store(out, (tl.load(out, mask=mask, other=0.0).to(tl.float32) + sums).to(dtype), mask=mask)
            sampled = (tl.load(plan + _SAMPLE_BLOCK) == block) & (tl.load(plan + _SAMPLE_TILE) == tile)
            if sampled & (first_piece == 0):
                for first in range(0, experts, _LOGITS):
                    i = first + tl.arange(0, _LOGITS)
                    logits = _logits(
                        s, bias, place, bias_row, i, live, rank, experts, groups, j, parts, planned, S_STRIDE, MAX_PARTS
                    )
                    tl.store(
                        samples + t[:, None] * SAMPLE_STRIDE + (j * experts + i)[None, :],
                        tl.exp(logits - largest[:, None]) / total[:, None],
                        mask=(live & (t < _SAMPLE_TOKENS))[:, None] & (i < experts)[None, :],
                    )


# The interpreter multiplies bfloat16's bits as if they were integers, so use float32 products there.
_COMPILED = isinstance(_shrink, triton.JITFunction)


class Buffers(NamedTuple):
    """The buffers that all launches of an engine share; their addresses never change.

    plan_W: a `DevicePlan`'s words. rows_ALF: an `AdapterTable`'s rows. scratch_QC: float32, of the config's
    `scratch_rows` and `columns`; samples: float32 [SAMPLE_TOKENS, G*N], the routing of the tile that a plan samples.
    """

    plan_W: torch.Tensor
    rows_ALF: torch.Tensor
    scratch_QC: torch.Tensor
    samples: torch.Tensor

    @staticmethod
    def of(config: KernelConfig, plan_W: torch.Tensor, rows_ALF: torch.Tensor) -> "Buffers":
        """The buffers around a plan's and a table's."""
        floats: dict[str, Any] = {"dtype": torch.float32, "device": plan_W.device}
        samples = torch.zeros(SAMPLE_TOKENS, config.max_groups * config.max_experts, **floats)
        return Buffers(plan_W, rows_ALF, torch.empty(config.scratch_rows, config.columns, **floats), samples)


@dataclass(frozen=True)
class Launch:
    """A kernel's launch configuration, without the arguments of a single launch.

    arguments: names and Triton types of the non-constant parameters. constants: values of the others.
    """

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def run(self, values: dict[str, Any]) -> None:
        """Launch it with a value for every argument."""
        assert values.keys() == self.arguments.keys()
        self.kernel[self.grid](
            **values, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self.max_registers
        )


def launches(config: KernelConfig, padded_tokens: int) -> tuple[Launch, Launch]:
    """A block's two launches in a step of so many tokens, padding included: the shrink, the expand."""
    way = cut(config, padded_tokens)
    number = f"*{_NAMES[config.dtype]}"
    shared = {"s": "*fp32", "table": "*i64", "plan": "*i32"}
    numbers = {"block": "i32", "num_tokens": "i32"}
    common = {
        "HIDDEN": config.hidden_size,
        "ADAPTER": config.num_blocks * len(Field),
        "S_STRIDE": config.columns,
        "MAX_PARTS": way.max_parts,
        "BLOCK_T": way.block_t,
        "PRECISION": "ieee" if config.dtype == torch.float32 else "tf32",
        "OPERAND": _OPERANDS[config.dtype] if _COMPILED else tl.float32,
    }
    shrink = Launch(
        _shrink,
        (num_programs(config),),
        {"x": number, **shared, **numbers, "x_stride": "i32"},
        common | {"BLOCK_S": way.block_s, "BLOCK_D": way.block_d},
        way.shrink_warps,
        way.shrink_stages,
    )
    own = {
        "SAMPLE_STRIDE": config.max_groups * config.max_experts,
        "BLOCK_N": way.block_n,
        "BLOCK_E": way.block_e,
        "SIZE": PIECES.index(way.block_e),
        "ALIGNED": config.alignment,
    }
    expand = Launch(
        _expand,
        (num_programs(config),),
        {"y": number, **shared, "samples": "*fp32", **numbers, "y_stride": "i32"},
        common | own,
        way.expand_warps,
        way.expand_stages,
        way.expand_registers,
    )
    return shrink, expand


class Path:
    """Launches a block's path over an engine's buffers. T, the number of rows of x and y, includes padding.

    A launch for tiles of 16 tokens would drop the rest of a tile of 64. This cannot happen, because T is never less
    than the tokens of its plan.
    """

    def __init__(self, config: KernelConfig, buffers: Buffers) -> None:
        self.config, self.buffers = config, buffers
        self._launches: dict[int, tuple[Launch, Launch]] = {}

    def begin(self, x_TD: torch.Tensor, block: int) -> None:
        """Compute s of block number `block` into the scratch space, which `finish_` reads."""
        plan_W, rows_ALF, scratch_QC, _ = self.buffers
        self._of(len(x_TD))[0].run(
            {
                "x": x_TD, "s": scratch_QC, "table": rows_ALF, "plan": plan_W,
                "block": block, "num_tokens": len(x_TD), "x_stride": x_TD.stride(0),
            }
        )  # fmt: skip

    def finish_(self, y_TD: torch.Tensor, block: int) -> None:
        """Add the path to `y_TD`, in place, from the scratch space."""
        plan_W, rows_ALF, scratch_QC, samples = self.buffers
        self._of(len(y_TD))[1].run(
            {
                "y": y_TD, "s": scratch_QC, "table": rows_ALF, "plan": plan_W, "samples": samples,
                "block": block, "num_tokens": len(y_TD), "y_stride": y_TD.stride(0),
            }
        )  # fmt: skip

    def warm_up(self) -> None:
        """Compile every kernel that a step can need, by launching it with an empty plan."""
        for tokens in SHAPES:
            if tokens <= self.config.max_tokens:
                nothing_TD = torch.zeros(
                    tokens, self.config.hidden_size, dtype=self.config.dtype, device=self.buffers.plan_W.device
                )
                self.begin(nothing_TD, 0)
                self.finish_(nothing_TD, 0)

    def _of(self, padded_tokens: int) -> tuple[Launch, Launch]:
        found = self._launches.get(padded_tokens)
        if found is None:
            found = self._launches[padded_tokens] = launches(self.config, padded_tokens)
        return found
