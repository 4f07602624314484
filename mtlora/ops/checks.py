"""What the operator's tensors must be, told without reading a GPU's memory."""

import torch

from mtlora.ops.table import DTYPES, Field


def check(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    bias_rows: torch.Tensor,
    tiles: torch.Tensor,
) -> None:
    """Raise ValueError unless the operator's tensors are of its kinds: shapes, dtypes, strides, one device."""
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
            raise ValueError(f"{name} must be {dtype} of {dims} dimensions, got {tensor.dtype} {list(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if bias_rows.shape != tokens.shape:
        raise ValueError(f"bias_rows must be one a token, got {list(bias_rows.shape)} for {list(tokens.shape)}")
    for name, tensor in (("y", y), ("rows", rows), ("tokens", tokens), ("bias_rows", bias_rows), ("tiles", tiles)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
