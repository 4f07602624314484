"""The compiled kernels for CPUs: loading them, and the weights' layout for serving.

`csrc` is built into one library when the package is installed. If there was no compiler, or this processor cannot run
it, weights keep their layout and torch ops read them.

Shape suffixes: K depth, C columns, U units of columns.
"""

import ctypes
import importlib.machinery
import logging
import os
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Tokens of a tile: the number that the serving kernel's inner loop keeps in registers.
TILE_SIZE = 8

# Columns of a unit.
UNIT = 16

# Version of the memory layout (`mtlora_layout` in the source): a kernel built for another layout would give wrong
# numbers.
LAYOUT = 3

KERNEL_DTYPES = (torch.float32, torch.bfloat16)

# The kernels' instruction set: 0 for the processor's best, or the one that MTLORA_ISA names, for tests and measurements
# of older sets.
INSTRUCTION_SETS = {"portable": 1, "avx2": 2, "avx512": 512, "avx512_bf16": 516, "amx_bf16": 520}
ISA = INSTRUCTION_SETS[os.environ["MTLORA_ISA"]] if os.environ.get("MTLORA_ISA") else 0

_ADDRESS, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Step(ctypes.Structure):
    """The arguments that are the same for every block of a step."""

    _fields_ = (
        ("tokens", _ADDRESS),
        ("bias_rows", _ADDRESS),
        ("tiles", _ADDRESS),
        ("num_planned", _LONG),
        ("num_tiles", _LONG),
        ("num_rows", _LONG),
        ("hidden", _LONG),
        ("isa", _INT),
        ("dtype", _INT),
        ("threads", _INT),
    )


@cache
def compiled_kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None if it was not built or this processor cannot run it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu_kernel{suffix}")
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("adapters run in torch ops, slower in mixed batches: %s", error)
            return None
        if not hasattr(library, "mtlora_layout") or library.mtlora_layout() != LAYOUT:
            logger.warning("adapters run in torch ops, slower in mixed batches: %s is stale; install again", path)
            return None
        library.mtlora_add_routed.argtypes = [_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _LONG, _LONG, _LONG]
        if library.mtlora_supported(ISA) and library.mtlora_max_tile() == TILE_SIZE:
            return library
        logger.warning("adapters run in torch ops, slower in mixed batches: %s does not suit this processor", path)
        return None
    logger.warning("adapters run in torch ops, slower in mixed batches: the kernel was not built at install")
    return None


def kernel_part(part: str, layout: int) -> ctypes.CDLL | None:
    """Return the compiled library if its `part` has version `layout`, otherwise None."""
    library = compiled_kernel()
    version = getattr(library, f"mtlora_{part}_layout", None)
    if version is not None and version() == layout:
        return library
    if library is not None:
        logger.warning("%s runs in torch ops, slower: %s is stale; install again", part, library._name)
    return None


def to_units(weights: torch.Tensor) -> torch.Tensor:
    """Weights [..., K, C] in the kernel's layout: [..., U, K, 16, 1], or [..., U, K/2, 16, 2] in bfloat16.

    Zeros fill incomplete units.
    """
    rows = _rows(weights.dtype)
    *lead, K, C = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -C % UNIT, 0, -K % rows))
    units = padded.unflatten(-1, (-1, UNIT)).unflatten(-3, (-1, rows))  # [..., K/rows, rows, U, 16]
    n = len(lead)
    return units.permute(*range(n), n + 2, n, n + 3, n + 1).contiguous()


def from_units(units: torch.Tensor, K: int, C: int) -> torch.Tensor:
    """The inverse of `to_units`: [..., K, C]."""
    n = units.dim() - 4
    padded = units.permute(*range(n), n + 1, n + 3, n, n + 2).flatten(-2).flatten(-3, -2)
    return padded[..., :K, :C]


def units_shape(K: int, C: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Shape of `to_units` of weights [K, C]."""
    rows = _rows(dtype)
    return -(-C // UNIT), -(-K // rows), UNIT, rows


def _rows(dtype: torch.dtype) -> int:
    """Number of neighbouring rows that are stored interleaved: 2 in bfloat16, else 1."""
    return 2 if dtype == torch.bfloat16 else 1
