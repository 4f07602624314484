"""Installs the seams that every vLLM process needs; worker_manager.py installs the model's seams."""

import atexit
import gc

from mtlora.vllm_plugin.seams import available, require


def install() -> None:
    """Install the seams, once. Raises RuntimeError where one that correctness needs is missing."""
    for name in ("adapters", "operators", "compile cache key", "engine config", "typed answers", "activation"):
        require(name)
    # Import after the check: these modules import names that the seams check.
    from vllm.platforms import current_platform
    from vllm.v1.worker import lora_model_runner_mixin

    from mtlora.vllm_plugin.activation import check_requests, key_blocks
    from mtlora.vllm_plugin.compilation import adapt_engine_config, key_compile_cache
    from mtlora.vllm_plugin.leases import keep_leases
    from mtlora.vllm_plugin.typed import hold_answers_to_types
    from mtlora.vllm_plugin.worker_manager import MtLoRAWorkerManager
    from mtlora.vllm_vision import register

    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is MtLoRAWorkerManager:
        return
    if available("vision backbones"):
        register()
    key_compile_cache()
    adapt_engine_config()
    hold_answers_to_types()
    if available("types in vLLM's server"):
        from mtlora.vllm_plugin.served_types import hold_requests_to_types

        hold_requests_to_types()
    key_blocks()
    check_requests()
    if available("leases of documents"):
        keep_leases()
    if current_platform.is_cpu():
        _install_on_cpu()
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = MtLoRAWorkerManager
    # Freeze imported objects: else garbage collections during vLLM's start search all of them about six times.
    gc.freeze()
    # Unfreeze at exit: Triton's bindings report objects that are never freed.
    atexit.register(gc.unfreeze)


def _install_on_cpu() -> None:
    if available("single calls on CPUs"):
        from mtlora.vllm_cpu.eager_cpu import use_single_calls

        use_single_calls()
    if available("model inspection on CPUs"):
        from mtlora.vllm_cpu.inspection import inspect_models_here

        inspect_models_here()
    if available("masks on CPUs"):
        from mtlora.vllm_cpu.masks import mask_in_place

        mask_in_place()
