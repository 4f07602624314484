"""In which dtype an engine on a CPU runs a backbone where nobody has said.

vLLM takes that of the weights. An x86 processor without instructions for bfloat16 products makes them out of float32
ones, and takes several times as long as for float32 itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

# Of the memory that is free, what a backbone in float32 may take: KV cache and adapters come on top.
_SHARE_OF_MEMORY = 0.5
_CGROUP = Path("/sys/fs/cgroup")


def engine_dtype(asked: str, folder: Path, *, quantised: bool = False) -> str:
    """vLLM's `dtype` for the backbone in `folder`: "float32" for "auto" on such a processor, else what is asked for.

    quantised: by the engine, as it loads. A backbone that is quantised, there or in its folder, keeps "auto": its
    kernels want activations in the dtypes that they were made for. So does one too large in float32 for the memory.
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


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that this machine has left, or this control group where that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def multiplies_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor of these capabilities, `torch.cpu`'s, has such instructions.

    Taken to be so off x86, where torch does not say: vLLM's own choice stands there.
    """
    if capabilities["architecture"] != "x86_64":
        return True
    return bool(capabilities["avx512_bf16"] or capabilities["amx_bf16"])
