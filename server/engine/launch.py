"""Starts an engine: vLLM's arguments and the environment of its processes."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from mtlora.vllm_cpu import shared_cores
from mtlora.vllm_cpu.memory import memory_environment
from mtlora.vllm_plugin.seams import available, require
from server.engine import orphans
from server.engine.stats import EngineStats, stat_logger
from server.engine.threads import BIND, UNBOUND, binding_setting, engines_of, ranks_of, thread_environment
from server.job import MAX_SCORED_TOKENS, Lane
from server.settings import Settings
from server.telemetry.logs import get_logger

logger = get_logger("engine")

# Tokens of a block of the KV cache.
CPU_BLOCK_TOKENS = 32
# Image size for which one step has room for `vision_max_num_seqs` images.
_IMAGE_SIZE = 112
# vLLM requires a KV cache, although an encoder does not use it.
VISION_CACHE_BYTES = 64 << 20
# Start engines one after the other, because vLLM's processes inherit the environment.
_launching = threading.Lock()
# Earlier values of the variables that the last launch changed for its engine alone.
_before: dict[str, str | None] = {}
# vLLM's second model runner, its default on GPUs, takes no prompts of embeddings for encoders
# (vllm/v1/worker/gpu/model_states/encoder_only.py).
_MODEL_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
# GiB of KV cache on a CPU, unless a setting says otherwise.
CPU_KV_CACHE_GIB = 1.0

# Disable compilation: even in an eager engine, vLLM compiles two sampling functions at their first use, which takes
# seconds.
_EAGER = {"TORCHDYNAMO_DISABLE": "1"}


def launch(settings: Settings, lane: Lane, backbone: Path, on_stats: Callable[[EngineStats], None]) -> Any:
    """Start vLLM's AsyncLLM for a lane, its processes included. Blocks for long; raises vLLM's errors."""
    with _launching:
        # Set the environment before the import of vLLM, which reads some variables at once.
        _set_environment(settings, lane)
        arguments = _engine_args if lane is Lane.TEXT else _vision_engine_args
        return _launch(partial(arguments, settings, backbone), on_stats)


def _set_environment(settings: Settings, lane: Lane) -> None:
    """Set this process's variables for an engine, after those of another engine alone are set back."""
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    environment = engine_environment(settings, lane)
    _before.clear()
    own = environment.keys() & {BIND, "OMP_NUM_THREADS", shared_cores.ENVIRONMENT, _MODEL_RUNNER}
    _before.update({name: os.environ.get(name) for name in own})
    os.environ.update(environment)
    # Reject vLLM's variable, which would silently override the setting.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


def _launch(make_arguments: Callable[[], dict[str, Any]], on_stats: Callable[[EngineStats], None]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor import Executor

    for seam in ("answers of every engine", "lost engines", "step statistics"):
        require(seam)
    if available("environment read once"):
        from vllm.envs import disable_envs_cache

        # Clear the cache, which may hold the environment of an earlier launch.
        disable_envs_cache()
    arguments = make_arguments()
    if arguments["enforce_eager"]:
        os.environ.update(_EAGER)
    config = AsyncEngineArgs(**arguments).create_engine_config()
    with _no_interrupts_in_children(), _rank_environment(config):
        executor = Executor.get_class(config)
        engine = AsyncLLM(config, executor, log_stats=False, log_requests=False, stat_loggers=[stat_logger(on_stats)])
    if available("environment read once"):
        from vllm.envs import enable_envs_cache

        # Cache environment variables: vLLM would read them again for every request. Engine processes do this
        # themselves.
        enable_envs_cache()
    return engine


def _engine_args(settings: Settings, backbone: Path) -> dict[str, Any]:
    from vllm.platforms import current_platform

    from mtlora.vllm_cpu.precision import engine_dtype

    on_cpu = bool(current_platform.is_cpu())
    kv_cache_gib = settings.kv_cache_gib or (CPU_KV_CACHE_GIB if on_cpu else None)
    dtype = engine_dtype(settings.dtype, backbone, quantised=settings.quantization is not None)
    if dtype != settings.dtype:
        logger.info("this processor has no bfloat16 products", extra={"fields": {"dtype": dtype}})
    return {
        "model": str(backbone),
        "dtype": dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": int(kv_cache_gib * (1 << 30)) if kv_cache_gib else None,
        "enable_prefix_caching": settings.enable_prefix_caching,
        # Use small blocks: only full blocks are shared, and with vLLM's 128 tokens on CPUs each task would recompute a
        # document's last tokens.
        "block_size": CPU_BLOCK_TOKENS if on_cpu else None,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "quantization": settings.quantization,
        "max_logprobs": MAX_SCORED_TOKENS,
        # Text tasks may then take images, as soft tokens in their prompts.
        "enable_prompt_embeds": settings.vision_backbone is not None and available("soft tokens"),
        **_both(settings, Lane.TEXT, settings.max_num_seqs),
    }


def _vision_engine_args(settings: Settings, backbone: Path) -> dict[str, Any]:
    from mtlora.vision.families import read_config
    from mtlora.vllm_vision import vision_dtype, vision_engine_args

    patch = read_config(backbone).patch_size
    return {
        **vision_engine_args(
            backbone,
            max_images=settings.vision_max_num_seqs,
            size=_IMAGE_SIZE // patch * patch,
            largest_size=settings.vision_max_size // patch * patch,
        ),
        "dtype": vision_dtype(settings.vision_dtype, backbone),
        "gpu_memory_utilization": settings.vision_gpu_memory_utilization,
        "kv_cache_memory_bytes": VISION_CACHE_BYTES,
        **_both(settings, Lane.IMAGES, settings.vision_max_num_seqs),
    }


def _both(settings: Settings, lane: Lane, max_num_seqs: int) -> dict[str, Any]:
    """Arguments that both kinds of engine share."""
    from vllm.platforms import current_platform

    from mtlora.vllm_plugin import engine_overrides
    from mtlora.vllm_plugin.options import Options

    return {
        "enforce_eager": current_platform.is_cpu() if settings.enforce_eager is None else settings.enforce_eager,
        "seed": settings.seed,
        "data_parallel_size": engines_of(settings, lane),
        "distributed_executor_backend": _executor(settings, lane),
        "use_tqdm_on_load": False,
        **engine_overrides(
            max_num_seqs,
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


def engine_environment(settings: Settings, lane: Lane) -> dict[str, str]:
    """Environment variables for a lane's engine and its processes, which inherit them."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    wanted = {} if settings.log_level == "debug" else {k: os.environ.get(k, v) for k, v in quiet.items()}
    sharing, images = _engines_share_cores(settings), lane is Lane.IMAGES
    setting, ranks = binding_setting(settings, lane), ranks_of(settings, lane)
    bind = getattr(settings, setting) if setting else None
    return {
        **wanted,
        # Keep logs off stdout, which has only the ready line.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # No network is needed: the backbone is a local folder by now.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # Variables of the plugins in the engine's processes.
        "MTLORA_ADAPTER_BACKBONE_CHECK": settings.adapter_backbone_check,
        "MTLORA_ROUTING_SAMPLE_STEPS": str(settings.routing_sample_steps),
        orphans.ENVIRONMENT_SWITCH: "1",
        # This server sends constraints itself.
        "MTLORA_TYPED_REQUESTS": "0",
        **({_MODEL_RUNNER: "0"} if images else {}),
        **memory_environment(),
        **(shared_cores.sharing_environment(lane.value) if sharing else {}),
        **thread_environment(bind, os.environ, ranks, from_last=sharing and images, bound=not images or ranks == 1),
    }


def _engines_share_cores(settings: Settings) -> bool:
    """Whether two engines would use the same cores, and no setting places their threads."""
    both = settings.language_backbone is not None and settings.vision_backbone is not None
    single = all(ranks_of(settings, lane) == 1 for lane in Lane)
    placed = settings.omp_threads_bind or settings.vision_omp_threads_bind or BIND in os.environ
    return both and single and not placed


def ranks_have_processes(settings: Settings, lane: Lane) -> bool:
    """Whether the ranks of a lane on a CPU run beside their engines in processes of their own.

    Unless the settings name an executor, a single rank runs in its engine's own process. vLLM would start a second
    process to place its threads, and both processes would poll for messages on the cores that the model needs. If there
    are several engines whose threads are bound, vLLM places them.
    """
    engines = engines_of(settings, lane)
    binding = engine_environment(settings, lane).get(BIND, os.environ.get(BIND))
    placed = engines > 1 and binding != UNBOUND
    return settings.distributed_executor_backend is not None or ranks_of(settings, lane) > engines or placed


def _executor(settings: Settings, lane: Lane) -> str | type | None:
    """The executor of a lane's engines; None leaves the choice to vLLM.

    Passing the class keeps a rank in its engine's process; vLLM overrides the name "uni" (vllm/platforms/cpu.py).
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or ranks_have_processes(settings, lane):
        return settings.distributed_executor_backend
    if not available("one process an engine on CPUs"):
        return None
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    if shared_cores.ENVIRONMENT in os.environ and available("cores of two engines"):
        from mtlora.vllm_cpu.sharing_executor import SharingExecutor

        return SharingExecutor
    return UniProcExecutor


@contextlib.contextmanager
def _rank_environment(config: Any) -> Iterator[None]:
    """The environment that places the threads of a rank in the engine's own process, as vLLM sets it for workers."""
    if isinstance(config.parallel_config.distributed_executor_backend, str):
        yield
        return
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    with OMPProcessManager(config).configure_omp_envs(0, 0):
        cores = os.environ[BIND].replace(",", " ")
        if "GOMP_CPU_AFFINITY" in os.environ and cores.replace(" ", "").isdigit():
            # Sort them as vLLM does.
            os.environ["GOMP_CPU_AFFINITY"] = cores
        yield


@contextlib.contextmanager
def _no_interrupts_in_children() -> Iterator[None]:
    """Block Ctrl-C, which reaches every process of a terminal: the engine's must live until running requests finish."""
    # Start multiprocessing's resource tracker first, because its start unblocks the signal.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
