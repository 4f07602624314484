"""The warm-up run of pipeline stages on a CPU, which vLLM skips if it does not compile."""

from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform


def skips_warm_up(vllm_config: VllmConfig) -> bool:
    """Whether this worker is a stage of an eager pipeline on a CPU, whose warm-up run vLLM skips."""
    return (
        current_platform.is_cpu()
        and vllm_config.parallel_config.pipeline_parallel_size > 1
        and vllm_config.compilation_config.mode == CompilationMode.NONE
    )


def warm_up_stages() -> None:
    """Make this worker run its model's warm-up.

    Stages after the first allocate their buffer for incoming hidden states only in a warm-up run. vLLM 0.32 skips that
    run on a CPU that does not compile, and the first step ends the engine. Takes effect for this process; call it while
    the model loads.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker

    CPUWorker._should_warm_up_model = lambda self: True
    CPUModelRunner.warming_up_model = lambda self: self.profile_run()
