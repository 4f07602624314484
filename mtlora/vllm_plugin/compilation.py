"""Adapts vLLM's config: allows compilation on CPUs, and keeps stale compiled graphs out. CUDA graphs need no change."""

from typing import Any

from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.platforms import current_platform

import mtlora

# Increase it with every change of the operators' schemas or the blocks' names: compiled graphs contain both.
LAYOUT_VERSION = 3


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
    """Let the platform update a config as if it had no LoRA.

    vLLM's CPU platform never compiles with LoRA, because its own LoRA kernels cannot be compiled. These operators can,
    so `enforce_eager` alone decides.
    """
    lora_config = vllm_config.lora_config
    vllm_config.lora_config = None
    try:
        platform_update(vllm_config)
    finally:
        vllm_config.lora_config = lora_config


def check_config(vllm_config: VllmConfig) -> None:
    """Raise ValueError for a config that adapters cannot run under."""
    if vllm_config.parallel_config.use_ubatching:
        raise ValueError(
            "mtLoRA adapters cannot run with use_ubatching (enable_dbo, ubatch_size): "
            "one plan holds the tokens of a step, and micro-batches would need several"
        )
