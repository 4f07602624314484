"""The tensors of one call of the CPU backend: one block, all adapters of a step.

Shape suffixes: T tokens, D hidden size, A rows of the table, F fields of a row, P planned tokens, M tiles.
"""

from typing import NamedTuple

import torch

from mtlora.ops.plan import StepPlan
from mtlora.ops.table import DTYPES, AdapterTable, Field


class Mix(NamedTuple):
    """y_TD is added to, in place; rows_AF: a block's part of an `AdapterTable`; the other three: a `StepPlan`'s."""

    y_TD: torch.Tensor
    x_TD: torch.Tensor
    rows_AF: torch.Tensor
    tokens_P: torch.Tensor
    bias_rows_P: torch.Tensor
    tiles_M3: torch.Tensor

    @staticmethod
    def of(y_TD: torch.Tensor, x_TD: torch.Tensor, table: AdapterTable, block: int, plan: StepPlan) -> "Mix":
        """The arguments that add the path of block number `block` to `y_TD`."""
        return Mix(y_TD, x_TD, table.rows_LAF[block], plan.tokens_P, plan.bias_rows_P, plan.tiles_M3)

    def check(self) -> None:
        """Raise ValueError for wrong shapes, dtypes, strides or devices."""
        y, x, rows, tokens, bias_rows, tiles = self
        if x.dim() != 2 or y.shape != x.shape:
            raise ValueError(f"x and y must both be [tokens, hidden], got {list(x.shape)} and {list(y.shape)}")
        if x.dtype not in DTYPES or y.dtype != x.dtype:
            raise ValueError(f"x and y must share one of {DTYPES}, got {x.dtype} and {y.dtype}")
        for name, tensor in (("x", x), ("y", y)):
            if tensor.stride(1) != 1 or (len(tensor) > 1 and tensor.stride(0) < tensor.shape[1]):
                raise ValueError(f"{name}'s rows must be contiguous and apart, got strides {tensor.stride()}")
        kinds = (
            ("rows", rows, torch.int64, 2, len(Field)),
            ("tokens", tokens, torch.int32, 1, None),
            ("bias_rows", bias_rows, torch.int32, 1, None),
            ("tiles", tiles, torch.int32, 2, 3),
        )
        for name, tensor, dtype, dims, width in kinds:
            if tensor.dtype != dtype or tensor.dim() != dims or (width and tensor.shape[-1] != width):
                raise ValueError(
                    f"{name} must be {dtype} of {dims} dimensions, got {tensor.dtype} {list(tensor.shape)}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if bias_rows.shape != tokens.shape:
            raise ValueError(f"bias_rows must be one a token, got {list(bias_rows.shape)} for {list(tokens.shape)}")
        for name, tensor in (("y", y), ("rows", rows), ("tokens", tokens), ("bias_rows", bias_rows), ("tiles", tiles)):
            if tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
