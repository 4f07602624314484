"""Checks, before an engine starts, that this machine or container can run it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from mtlora.control_group import memory_left
from server.engine.engine import EngineStartError
from server.engine.launch import CPU_KV_CACHE_GIB, VISION_CACHE_BYTES, ranks_have_processes
from server.engine.threads import BIND, binding_setting, check_cores, engines_of, ranks_of
from server.job import Lane
from server.settings import Settings

_GIB = 1 << 30
# GiB of processes besides weights and KV cache: interpreters, libraries, activations of the warm-up. Measured after
# start with the default backbones and shipped adapters as proportional set sizes (psutil's memory_full_info), rounded
# up: server and verifier 0.79; text engine 2.09 minus 1.25 of weights and cache; image engine 0.64 minus 0.14.
SERVER_GIB = 0.8
ENGINE_GIB = {Lane.TEXT: 0.9, Lane.IMAGES: 0.6}
# Where ranks have own processes: engine 0.57; rank 1.95 minus 1.27. vLLM's coordinator of several engines 0.37.
APART_GIB, RANK_GIB, COORDINATOR_GIB = 0.6, 0.7, 0.4
# Most bytes per pixel while decoding: a grey PNG with alpha of 25 megapixels took 287 MB.
DECODED_BYTES = 12


def check_machine(settings: Settings, backbones: Mapping[Lane, Path]) -> None:
    """Check the engine's build, pipeline stages, the cores that the settings name, and memory.

    Raises EngineStartError.
    """
    import torch
    from vllm.platforms import current_platform

    capabilities = torch.cpu.get_capabilities()
    if current_platform.is_unspecified():
        raise EngineStartError(
            "the engine's build is for GPUs, and no GPU or no driver is here; allowed: a node with a GPU, or the build "
            "and the image for CPUs"
        )
    if Lane.TEXT in backbones:
        _check_stages(settings, backbones[Lane.TEXT])
    if not current_platform.is_cpu():
        return
    if capabilities["architecture"] == "x86_64" and not capabilities["avx2"]:
        raise EngineStartError("this processor has no AVX2; allowed: x86-64 with AVX2 or more, such as AVX-512 or AMX")
    for lane in backbones:
        _check_threads(settings, lane)
    left = memory_left()
    needed = int(SERVER_GIB * _GIB) + sum(
        memory_needed(settings, backbone, lane) for lane, backbone in backbones.items()
    )
    if Lane.IMAGES in backbones:
        needed += DECODED_BYTES * settings.max_image_pixels
    if left is not None and left < needed:
        cache, less = "", ""
        if Lane.TEXT in backbones:
            size, ranks = f"{_kv_cache_gib(settings):g} GiB", ranks_of(settings, Lane.TEXT)
            cache = f", KV cache ({size})" if ranks == 1 else f", {ranks} KV caches ({size} each)"
            less = ", or a smaller kv_cache_gib"
        raise EngineStartError(
            f"the memory limit of this container is too small: found {left / _GIB:.2f} GiB left; backbones{cache} and "
            f"processes need {needed / _GIB:.2f}; allowed: a higher limit{less}"
        )


def memory_needed(settings: Settings, backbone: Path, lane: Lane) -> int:
    """Bytes of a lane's engines on a CPU once their KV caches are full."""
    from mtlora.vllm_cpu.precision import engine_dtype

    stored = sum(file.stat().st_size for file in backbone.glob("*.safetensors"))
    engines, ranks = engines_of(settings, lane), ranks_of(settings, lane)
    if lane is Lane.IMAGES:
        # A vision backbone's weights keep their dtype.
        cache = VISION_CACHE_BYTES
    else:
        dtype = engine_dtype(settings.dtype, backbone, quantised=settings.quantization is not None)
        config = json.loads((backbone / "config.json").read_text())
        # Two-byte weights are converted to four bytes.
        if dtype == "float32" and config.get("dtype", config.get("torch_dtype")) != "float32":
            stored *= 2
        cache = int(_kv_cache_gib(settings) * _GIB)
    return engines * stored + ranks * cache + int(_processes_gib(settings, lane) * _GIB)


def _processes_gib(settings: Settings, lane: Lane) -> float:
    """GiB of a lane's processes besides weights and KV cache."""
    engines = engines_of(settings, lane)
    coordinator = COORDINATOR_GIB if engines > 1 else 0.0
    if ranks_have_processes(settings, lane):
        return coordinator + engines * APART_GIB + ranks_of(settings, lane) * RANK_GIB
    return coordinator + engines * ENGINE_GIB[lane]


def _check_stages(settings: Settings, backbone: Path) -> None:
    """Each stage needs a layer. vLLM says so after it has started a process for each stage."""
    layers = json.loads((backbone / "config.json").read_text()).get("num_hidden_layers")
    stages = settings.pipeline_parallel_size
    if layers is not None and stages > layers:
        raise EngineStartError(f"pipeline_parallel_size: found {stages}; allowed: 1 to {layers}, the backbone's layers")


def _check_threads(settings: Settings, lane: Lane) -> None:
    setting = binding_setting(settings, lane)
    binding = getattr(settings, setting) if setting else os.environ.get(BIND)
    if not binding:
        return
    try:
        check_cores(binding, ranks_of(settings, lane), os.sched_getaffinity(0))
    except ValueError as error:
        engine = "images" if lane is Lane.IMAGES else "texts"
        raise EngineStartError(f"{setting or BIND}, for the engine of {engine}: {error}") from None


def _kv_cache_gib(settings: Settings) -> float:
    return settings.kv_cache_gib or CPU_KV_CACHE_GIB
