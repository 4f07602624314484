"""Before an engine starts: can this machine, or this container, run it at all?"""

import json
from collections.abc import Mapping
from pathlib import Path

from mtlora.control_group import memory_left
from server.engine.engine import EngineStartError
from server.engine.launch import CPU_KV_CACHE_GIB, VISION_CACHE_BYTES
from server.job import Lane
from server.settings import Settings

_GIB = 1 << 30
# The server's and the engine's processes without weights and KV cache: interpreters, libraries, activations.
PROCESSES_GIB = 1.0


def check_machine(settings: Settings, backbones: Mapping[Lane, Path]) -> None:
    """Raise EngineStartError if this is no machine for this build of the engine, or its memory limit is too small."""
    import torch
    from vllm.platforms import current_platform

    capabilities = torch.cpu.get_capabilities()
    if current_platform.is_unspecified():
        raise EngineStartError(
            "the engine's build is for GPUs, and no GPU or no driver is here; allowed: a node with a GPU, or the build "
            "and the image for CPUs"
        )
    if not current_platform.is_cpu():
        return
    if capabilities["architecture"] == "x86_64" and not capabilities["avx2"]:
        raise EngineStartError("this processor has no AVX2; allowed: x86-64 with AVX2 or more, such as AVX-512 or AMX")
    left = memory_left()
    needed = sum(memory_needed(settings, backbone, lane) for lane, backbone in backbones.items())
    if left is not None and left < needed:
        cache, less = "", ""
        if Lane.TEXT in backbones:
            cache, less = f", KV cache ({_kv_cache_gib(settings):g} GiB)", ", or a smaller kv_cache_gib"
        raise EngineStartError(
            f"the memory limit of this container is too small: found {left / _GIB:.2f} GiB left; backbones{cache} and "
            f"processes need {needed / _GIB:.2f}; allowed: a higher limit{less}"
        )


def memory_needed(settings: Settings, backbone: Path, lane: Lane = Lane.TEXT) -> int:
    """Bytes of an engine on a CPU once its KV cache is full, and of its processes."""
    from mtlora.vllm_cpu.precision import engine_dtype

    stored = sum(file.stat().st_size for file in backbone.glob("*.safetensors"))
    if lane is Lane.IMAGES:
        # Its weights keep their dtype. The server's own process counts once.
        processes = 0.5 if settings.language_backbone else PROCESSES_GIB
        return stored + VISION_CACHE_BYTES + int(processes * _GIB)
    dtype = engine_dtype(settings.dtype, backbone, quantised=settings.quantization is not None)
    config = json.loads((backbone / "config.json").read_text())
    # Weights of two bytes become four.
    if dtype == "float32" and config.get("dtype", config.get("torch_dtype")) != "float32":
        stored *= 2
    return stored * settings.data_parallel_size + int((_kv_cache_gib(settings) + PROCESSES_GIB) * _GIB)


def _kv_cache_gib(settings: Settings) -> float:
    return settings.kv_cache_gib or CPU_KV_CACHE_GIB
