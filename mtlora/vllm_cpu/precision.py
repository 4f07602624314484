"""The default dtype of a backbone on a CPU.

vLLM uses the weights' dtype. An x86 processor without bfloat16 product instructions emulates bfloat16 products with
float32, several times slower than float32 itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from mtlora.control_group import memory_left

# Share of the free memory that a backbone in float32 may take: KV cache and adapters come on top.
_SHARE_OF_MEMORY = 0.5


def engine_dtype(asked: str, folder: Path, *, quantised: bool = False) -> str:
    """vLLM's `dtype` for the backbone in `folder`: "float32" for "auto" on such a processor, else `asked`.

    quantised: the engine quantises the backbone as it loads it. A quantised backbone keeps "auto", because its kernels
    were made for certain dtypes of activations. So does one that in float32 is too large for the memory.
    """
    from vllm.platforms import current_platform

    quantised = quantised or "quantization_config" in json.loads((folder / "config.json").read_text())
    if asked != "auto" or quantised or not current_platform.is_cpu():
        return asked
    if multiplies_bfloat16(torch.cpu.get_capabilities()):
        return "auto"
    # Weights of two bytes become four.
    size = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return "float32" if size <= _SHARE_OF_MEMORY * free_memory() else "auto"


def free_memory(*cgroup: Path) -> int:
    """Bytes left on this machine, or in this process' control groups if that is less."""
    free = int(psutil.virtual_memory().available)
    left = memory_left(*cgroup)
    return free if left is None else min(free, left)


def multiplies_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor with these capabilities, `torch.cpu`'s, has such instructions.

    True on architectures other than x86, where torch does not report it: vLLM's choice is kept there.
    """
    if capabilities["architecture"] != "x86_64":
        return True
    return bool(capabilities["avx512_bf16"] or capabilities["amx_bf16"])
