"""The warm-up run of pipeline stages on a CPU, which vLLM skips if it does not compile."""

from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

from mtlora.vllm_plugin.seams import require


def warm_up_stages(vllm_config: VllmConfig) -> None:
    """Have this worker warm its model up if it is a stage of an eager pipeline on a CPU.

    A stage after the first makes its buffer for incoming hidden states in a warm-up run alone. vLLM 0.32 skips that run
    on a CPU that does not compile, and the first step ends the engine. Takes effect for this process; call it while the
    model loads. Raises RuntimeError if vLLM lacks the seam.
    """
    if (
        not current_platform.is_cpu()
        or vllm_config.parallel_config.pipeline_parallel_size == 1
        or vllm_config.compilation_config.mode != CompilationMode.NONE
    ):
        return
    require("pipeline stages on CPUs")
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker

    CPUWorker._should_warm_up_model = lambda self: True
    CPUModelRunner.warming_up_model = lambda self: self.profile_run()
