"""How an engine is started: vLLM's arguments and the environment of its processes."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from mtlora.vllm_cpu.memory import memory_environment
from mtlora.vllm_plugin.seams import available, require
from server.engine import orphans
from server.engine.stats import EngineStats, stat_logger
from server.engine.threads import thread_environment
from server.job import MAX_SCORED_TOKENS
from server.settings import Settings
from server.telemetry.logs import get_logger

logger = get_logger("engine")

_CPU_BLOCK_TOKENS = 32
# On a CPU, unless a setting says otherwise.
CPU_KV_CACHE_GIB = 1.0

# Even in an eager engine, vLLM compiles two sampling functions in the first request that needs them, for seconds.
_EAGER = {"TORCHDYNAMO_DISABLE": "1"}


def launch(settings: Settings, backbone: Path, on_stats: Callable[[EngineStats], None]) -> Any:
    """Start vLLM's AsyncLLM, its processes included. Blocks for long; raises vLLM's errors."""
    # Before the import of vLLM, which reads some variables at once.
    os.environ.update(engine_environment(settings))
    # vLLM's variable would override the setting silently.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor import Executor

    for seam in ("answers of every engine", "lost engines", "step statistics"):
        require(seam)
    arguments = _engine_args(settings, backbone)
    if arguments["dtype"] != settings.dtype:
        logger.info("this processor has no bfloat16 products", extra={"fields": {"dtype": arguments["dtype"]}})
    if arguments["enforce_eager"]:
        os.environ.update(_EAGER)
    config = AsyncEngineArgs(**arguments).create_engine_config()
    with _no_interrupts_in_children(), _rank_environment(config):
        executor = Executor.get_class(config)
        engine = AsyncLLM(config, executor, log_stats=False, log_requests=False, stat_loggers=[stat_logger(on_stats)])
    if available("environment read once"):
        from vllm.envs import enable_envs_cache

        # vLLM reads its environment variables anew for every request. In the engine's processes it stops that itself.
        enable_envs_cache()
    return engine


def _engine_args(settings: Settings, backbone: Path) -> dict[str, Any]:
    from vllm.platforms import current_platform

    from mtlora.vllm_cpu.precision import engine_dtype
    from mtlora.vllm_plugin import engine_overrides
    from mtlora.vllm_plugin.options import Options

    on_cpu = bool(current_platform.is_cpu())
    kv_cache_gib = settings.kv_cache_gib or (CPU_KV_CACHE_GIB if on_cpu else None)
    return {
        "model": str(backbone),
        "dtype": engine_dtype(settings.dtype, backbone, quantised=settings.quantization is not None),
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": int(kv_cache_gib * (1 << 30)) if kv_cache_gib else None,
        "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        "enable_prefix_caching": settings.enable_prefix_caching,
        # Only whole blocks are shared; vLLM's 128 tokens on CPUs leave a document's last ones to each of its tasks.
        "block_size": _CPU_BLOCK_TOKENS if on_cpu else None,
        "seed": settings.seed,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
        "distributed_executor_backend": settings.distributed_executor_backend or _default_executor(settings, on_cpu),
        "quantization": settings.quantization,
        "max_logprobs": MAX_SCORED_TOKENS,
        "use_tqdm_on_load": False,
        **engine_overrides(
            settings.max_num_seqs,
            Options(
                host_cache_bytes=int(settings.host_cache_gib * (1 << 30)),
                blocks=settings.adapter_blocks,
                max_rank=settings.adapter_max_rank,
                max_experts=settings.adapter_max_experts,
                max_groups=settings.adapter_max_groups,
                side_stream=settings.adapter_side_stream,
            ),
        ),
    }


def engine_environment(settings: Settings) -> dict[str, str]:
    """Environment variables for vLLM and its processes, which inherit them."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    wanted = {} if settings.log_level == "debug" else {k: os.environ.get(k, v) for k, v in quiet.items()}
    return {
        **wanted,
        # stdout is for the ready line.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The backbone is a local folder by now.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # For the plugins in the engine's processes.
        "MTLORA_ADAPTER_BACKBONE_CHECK": settings.adapter_backbone_check,
        "MTLORA_ROUTING_SAMPLE_STEPS": str(settings.routing_sample_steps),
        orphans.ENVIRONMENT_SWITCH: "1",
        # This server says itself what an answer is held to.
        "MTLORA_TYPED_REQUESTS": "0",
        **memory_environment(),
        **thread_environment(settings.omp_threads_bind, os.environ, settings.ranks),
    }


def _default_executor(settings: Settings, on_cpu: bool) -> type | None:
    """The executor if the settings name none; None leaves the choice to vLLM.

    One rank on a CPU runs in the engine's own process. vLLM would start a second process, to place its threads by
    environment variables, and both would poll for messages on the cores that the model needs. Only the class prevents
    that: vLLM overrides the name "uni" (vllm/platforms/cpu.py).
    """
    if not on_cpu or settings.ranks > 1 or not available("one process an engine on CPUs"):
        return None
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return UniProcExecutor


@contextlib.contextmanager
def _rank_environment(config: Any) -> Iterator[None]:
    """The environment that places the threads of a rank in the engine's own process, as vLLM sets it for workers."""
    if isinstance(config.parallel_config.distributed_executor_backend, str):
        yield
        return
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    with OMPProcessManager(config).configure_omp_envs(0, 0):
        yield


@contextlib.contextmanager
def _no_interrupts_in_children() -> Iterator[None]:
    """Block Ctrl-C, which reaches every process of a terminal: the engine's must live until running requests finish."""
    # Start the tracker first: its start unblocks the signal.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
