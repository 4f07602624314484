"""Pipeline stages on a CPU: what vLLM leaves out there when it does not compile."""

from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

from mtlora.vllm_plugin.seams import require


def warm_up_stages(vllm_config: VllmConfig) -> None:
    """Have this worker warm its model up where it is a stage of a pipeline on a CPU and nothing is compiled.

    A stage after the first makes its buffer for the hidden states it is handed in a warm-up run alone. vLLM 0.32 skips
    that run on a CPU that does not compile, and the first step ends the engine. Takes effect for this process; to be
    called while the model loads. Raises RuntimeError where vLLM has no such run.
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
