"""In which dtype an engine on a CPU runs a backbone where nobody has said.

vLLM takes that of the weights. An x86 processor without instructions for bfloat16 products makes them out of float32
ones, and takes several times as long as for float32 itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def engine_dtype(asked: str, folder: Path, *, quantised: bool = False) -> str:
    """vLLM's `dtype` for the backbone in `folder`: "float32" for "auto" on such a processor, else what is asked for.

    quantised: by the engine, as it loads. A backbone that is quantised, there or in its folder, keeps "auto": its
    kernels want activations in the dtypes that they were made for.
    """
    from vllm.platforms import current_platform

    quantised = quantised or "quantization_config" in json.loads((folder / "config.json").read_text())
    if asked != "auto" or quantised or not current_platform.is_cpu():
        return asked
    return "auto" if multiplies_bfloat16(torch.cpu.get_capabilities()) else "float32"


def multiplies_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor of these capabilities, `torch.cpu`'s, has such instructions.

    Taken to be so off x86, where torch does not say: vLLM's own choice stands there.
    """
    if capabilities["architecture"] != "x86_64":
        return True
    return bool(capabilities["avx512_bf16"] or capabilities["amx_bf16"])
