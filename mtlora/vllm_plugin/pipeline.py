"""Pipeline stages on a CPU: what vLLM leaves out there when it does not compile."""

from vllm.config import VllmConfig
from vllm.platforms import current_platform


def warm_up_stages(vllm_config: VllmConfig) -> None:
    """Have this worker warm its model up where it is a stage of a pipeline on a CPU.

    A stage after the first makes its buffer for the hidden states it is handed in a warm-up run alone. vLLM 0.32 skips
    that run on a CPU without compiling and with a KV cache of given size, and the first step ends the engine. Takes
    effect for this process; to be called while the model loads.
    """
    if not current_platform.is_cpu() or vllm_config.parallel_config.pipeline_parallel_size == 1:
        return
    from vllm.v1.worker.cpu_worker import CPUWorker

    if not hasattr(CPUWorker, "_should_warm_up_model"):
        raise AttributeError(f"{CPUWorker.__module__}.{CPUWorker.__qualname__} has no _should_warm_up_model")
    CPUWorker._should_warm_up_model = lambda self: True
