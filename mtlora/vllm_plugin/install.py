"""The seams of vLLM that the plugin takes: all of them, and nothing else, in one place."""

import gc

from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.worker import lora_model_runner_mixin

from mtlora.vllm_cpu.eager_cpu import use_single_calls
from mtlora.vllm_cpu.inspection import inspect_models_here
from mtlora.vllm_plugin.compilation import adapt_engine_config, key_compile_cache, split_graphs_around_operator
from mtlora.vllm_plugin.model_manager import MtLoRAModelManager
from mtlora.vllm_plugin.orphans import end_with_parent
from mtlora.vllm_plugin.worker_manager import MtLoRAWorkerManager

# What the subclasses override, and what vLLM's own code calls of it.
_OVERRIDDEN = {
    LRUCacheLoRAModelManager: MtLoRAModelManager,
    LRUCacheWorkerLoRAManager: MtLoRAWorkerManager,
}
_OWN = {"_slot_in_step", "_place", "stage", "unstage", "place"}


def install() -> None:
    """Take every seam, once. Raises AttributeError or ImportError where one is missing."""
    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is MtLoRAWorkerManager:
        return
    for stock, ours in _OVERRIDDEN.items():
        methods = {name for name, value in vars(ours).items() if callable(value)} - _OWN
        if missing := sorted(name for name in methods if not hasattr(stock, name)):
            raise AttributeError(f"{stock.__module__}.{stock.__qualname__} has no {missing[0]}")
    split_graphs_around_operator()
    key_compile_cache()
    adapt_engine_config()
    use_single_calls()
    end_with_parent()
    inspect_models_here()
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = MtLoRAWorkerManager
    # What is imported by now stays: vLLM would look through all of it for garbage half a dozen times as it starts.
    gc.freeze()
