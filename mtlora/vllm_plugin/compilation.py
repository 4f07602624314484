"""vLLM's compiler and the operator: graphs split around it, no CUDA graph holds it, no stale graph comes from disk."""

from typing import Any

from vllm.config import CompilationConfig, CompilationMode, VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

import mtlora
from mtlora.vllm_plugin.block import OPERATOR

logger = init_logger(__name__)

# Raise it with every change to the operator's schema or the blocks' names: compiled graphs hold both.
LAYOUT_VERSION = 2


def split_graphs_around_operator() -> None:
    """Make the operator a boundary of piecewise graphs, because its Python code runs anew in each step."""
    if OPERATOR not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OPERATOR)


def key_compile_cache() -> None:
    """Put this plugin's layout into the key of vLLM's on-disk cache of compiled graphs."""
    stock = LoRAConfig.compute_hash

    def compute_hash(self: LoRAConfig) -> str:
        return f"{stock(self)}-mtlora-{mtlora.__version__}-{LAYOUT_VERSION}"

    LoRAConfig.compute_hash = compute_hash


def adapt_engine_config() -> None:
    """Run `adapt` where vLLM lets its platform update a new engine's config."""
    platform = type(current_platform)
    stock = platform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: VllmConfig) -> None:
        adapt(vllm_config, stock)

    platform.check_and_update_config = classmethod(check_and_update_config)


def adapt(vllm_config: VllmConfig, platform_update: Any) -> None:
    """Let the platform update a config as if it had no LoRA, then exclude full CUDA graphs.

    vLLM's CPU platform never compiles with LoRA, because its own LoRA kernels cannot be compiled. This operator can, so
    `enforce_eager` alone decides. A full CUDA graph would freeze one step's work, so it becomes a piecewise one.
    """
    lora_config = vllm_config.lora_config
    if lora_config is None:
        platform_update(vllm_config)
        return
    vllm_config.lora_config = None
    try:
        platform_update(vllm_config)
    finally:
        vllm_config.lora_config = lora_config
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        piecewise = compilation.mode == CompilationMode.VLLM_COMPILE
        compilation.cudagraph_mode = type(mode).PIECEWISE if piecewise else type(mode).NONE
        logger.info("mtLoRA adapters: cudagraph_mode %s becomes %s", mode.name, compilation.cudagraph_mode.name)


def check_compilation(vllm_config: VllmConfig) -> None:
    """Raise ValueError for a config under which the operator would be captured in a CUDA graph."""
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or not mode:
        return
    if mode.has_full_cudagraphs():
        raise ValueError(f"mtLoRA adapters cannot run under cudagraph_mode {mode.name}; PIECEWISE and NONE work")
    if OPERATOR not in (compilation.splitting_ops or ()):
        raise ValueError(f"compilation_config.splitting_ops, if set, must name {OPERATOR!r} too")
