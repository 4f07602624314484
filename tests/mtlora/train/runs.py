"""What tests of training runs compare."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from mtlora.checkpoint.format import TENSORS_FILE


def same_adapters(one: Path, other: Path) -> bool:
    """Whether two runs' folders hold adapters of the same bits."""
    first, second = (load_file(run / "adapter" / TENSORS_FILE) for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
