"""A thin asynchronous wrapper around vLLM's AsyncLLM: the only module that touches vLLM, and only when started."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

from mtlora.vllm_plugin import memory_environment
from server.engine_processes import EngineProcesses
from server.errors import EngineAbortedError, EngineDeadError
from server.job import Delta, FinishReason, GenerationJob, Sampling, TokenLogprob, TokenLogprobs
from server.logs import get_logger
from server.registry.version import Stage, StageError
from server.settings import Settings
from server.threads import thread_environment

logger = get_logger("engine")

MAX_LOGPROBS = 5
# How often a load that runs beside the steps is asked whether it is done.
_STAGING_POLL_S = 0.02
_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}


class EngineStartError(RuntimeError):
    """The engine did not start."""


@dataclass(frozen=True)
class EngineStats:
    """The scheduler's state after its last step, and what happened since the one before."""

    running: int
    waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int = 0
    # Distinct slots and adapter versions of the running sequences.
    tasks: int = 0
    adapters: int = 0
    # Which of the data-parallel engines.
    engine: int = 0


@dataclass(frozen=True)
class RoutingSums:
    """Of sampled routing; fields as in `mtlora.vllm_plugin.sampling.RoutingSums`."""

    rows: int
    entropy: float
    expert_weights: Sequence[float]


@dataclass(frozen=True)
class WorkerStats:
    """What one rank of one engine counts of its adapters, and its sampled routing by adapter version."""

    slots: int
    slots_in_use: int
    slots_registered: int
    resident_bytes: int
    weight_loads: int
    slot_evictions: int
    routing: Mapping[str, RoutingSums]


@dataclass(eq=False)
class _Wait:
    """A task that waits for the engine."""

    task: "asyncio.Task[Any]"
    since: float
    lost: bool = False


class Engine:
    """One engine. `start` it, then `load` slots, then `generate`; all but `start` and `shutdown` on the event loop.

    Once it is `lose`d, whoever waits for it, or comes later, gets EngineDeadError.
    """

    def __init__(self, settings: Settings, backbone: Path, on_stats: Callable[[EngineStats], None]) -> None:
        self._settings = settings
        self._backbone = backbone
        self._on_stats = on_stats
        self._llm: Any = None
        self._count = 0
        self._processes = EngineProcesses()
        self._waits: set[_Wait] = set()
        self._lost = False
        self._last_step = time.monotonic()

    def start(self) -> None:
        """Start the engine's processes and load the backbone. Blocks for long; raises EngineStartError."""
        os.environ.update(engine_environment(self._settings))
        # vLLM's own variable would silently outrank the setting.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        try:
            self._llm = self._build()
            cores = self._llm.engine_core.resources.engine_manager.processes
            self._processes = EngineProcesses.below(core.pid for core in cores)
        except Exception as error:
            logger.error("the engine did not start", exc_info=True)
            raise EngineStartError(f"the engine did not start: {error}") from error

    def _build(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor import Executor

        arguments = self._engine_args()
        if arguments["enforce_eager"]:
            # vLLM compiles two sampling functions even then, for seconds, in the first request that needs them.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        config = AsyncEngineArgs(**arguments).create_engine_config()
        with _no_interrupts_in_children(), rank_environment(config):
            return AsyncLLM(
                config,
                Executor.get_class(config),
                log_stats=False,
                log_requests=False,
                stat_loggers=[_stat_logger_factory(self._record_step)],
            )

    def _engine_args(self) -> dict[str, Any]:
        from vllm.platforms import current_platform

        from mtlora.vllm_plugin import engine_overrides

        settings = self._settings
        on_cpu = bool(current_platform.is_cpu())
        kv_cache_gib = settings.kv_cache_gib or (1.0 if on_cpu else None)
        return {
            "model": str(self._backbone),
            "dtype": settings.dtype,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "kv_cache_memory_bytes": int(kv_cache_gib * (1 << 30)) if kv_cache_gib else None,
            "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
            "enable_prefix_caching": settings.enable_prefix_caching,
            "seed": settings.seed,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "pipeline_parallel_size": settings.pipeline_parallel_size,
            "data_parallel_size": settings.data_parallel_size,
            "distributed_executor_backend": settings.distributed_executor_backend or default_executor(settings, on_cpu),
            "quantization": settings.quantization,
            "max_logprobs": MAX_LOGPROBS,
            "use_tqdm_on_load": False,
            **engine_overrides(settings.max_num_seqs, int(settings.host_cache_gib * (1 << 30))),
        }

    @property
    def tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    @property
    def vocab_size(self) -> int:
        return int(self._llm.model_config.get_vocab_size())

    @property
    def alive(self) -> bool:
        """False once the engine has died; a request would end in EngineDeadError."""
        return self._llm is not None and not self._lost and not self._llm.errored

    @property
    def stalled_s(self) -> float:
        """For how long somebody has waited and no step has been made. A reader that takes its time is no waiter."""
        waiting_since = min((wait.since for wait in self._waits), default=None)
        return 0.0 if waiting_since is None else time.monotonic() - max(waiting_since, self._last_step)

    def lose(self) -> None:
        """Give this engine up: end every wait for it, and kill its processes."""
        self._lost = True
        for wait in self._waits:
            wait.lost = True
            wait.task.cancel()
        self._processes.kill()
        if self._llm is not None:
            # Nothing more is sent to what has gone.
            self._llm.engine_core.resources.engine_dead = True

    async def load(self, folder: Path, slots: Sequence[Any]) -> None:
        """Put an adapter and its slots into the engine's memory, reading it beside the running steps.

        Raises StageError where the engine does not take it; nothing has changed then.
        """
        try:
            while True:
                states = await self._call("mtlora_stage", str(folder))
                _check_loaded(states)
                if all(state == "ready" for state, _ in states):
                    break
                await asyncio.sleep(_STAGING_POLL_S)
            named = [[slot.lora_int_id, slot.lora_name, slot.lora_path] for slot in slots]
            _check_loaded(await self._call("mtlora_place", str(folder), named))
        except StageError:
            # Another rank may have it.
            await self._call("mtlora_remove", [slot.lora_int_id for slot in slots])
            await self._call("mtlora_unstage", str(folder))
            raise

    async def unload(self, slots: Sequence[Any]) -> None:
        """Take slots, and with its last slot an adapter, out of the engine's memory."""
        await self._call("mtlora_remove", [slot.lora_int_id for slot in slots])

    async def worker_stats(self) -> list[WorkerStats]:
        """Of every rank of every engine, asked between two steps."""
        return [_worker_stats(rank) for rank in await self._call("mtlora_statistics")]

    async def _call(self, method: str, *arguments: Any) -> list[Any]:
        """The result of a worker's method, of each rank of each engine."""
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        with self._waiting():
            try:
                core = self._llm.engine_core
                # vLLM's own `collective_rpc` gives the results of the first engine alone.
                engines = await core.call_utility_all_async("collective_rpc", method, None, arguments, {})
            except VllmEngineDeadError:
                raise EngineDeadError from None
        return [result for ranks in engines for result in ranks]

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around everything that waits for the engine: `lose` ends it with EngineDeadError."""
        if self._lost:
            raise EngineDeadError
        task = asyncio.current_task()
        assert task is not None
        wait = _Wait(task, time.monotonic())
        self._waits.add(wait)
        try:
            yield
        except asyncio.CancelledError:
            if wait.lost:
                task.uncancel()
                raise EngineDeadError from None
            raise
        finally:
            self._waits.discard(wait)

    def _record_step(self, stats: EngineStats) -> None:
        self._last_step = time.monotonic()
        self._on_stats(stats)

    async def warm_up(self, slot: Any | None, *, short: bool = False) -> None:
        """Run short sequences through prefill, decode and sampling, so that no user's request pays for first calls.

        `short`: one greedy sequence, for a slot that is new to an engine that is not.
        """
        sampled = Sampling(max_new_tokens=2, temperature=1.0, top_p=0.9, top_k=10, seed=0, logprobs=1)
        for sampling in (Sampling(max_new_tokens=2), *(() if short else (sampled,))):
            async for _ in self._generate([1] * 8, sampling, slot):
                pass

    def generate(self, job: GenerationJob) -> AsyncIterator[Delta]:
        """The sequence's deltas. Closing the iterator, or cancelling its reader, aborts the sequence in the engine."""
        slot = None if job.without_adapter else job.task.slot
        return self._generate(list(job.prompt_ids), job.sampling, slot, job.cache_salt, job.delta_tokens)

    async def _generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        slot: Any | None,
        cache_salt: str | None = None,
        delta_tokens: int = 1,
    ) -> AsyncIterator[Delta]:
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        if self._lost:
            raise EngineDeadError
        self._count += 1
        outputs = self._llm.generate(
            tokens_input(prompt_ids, cache_salt=cache_salt),
            self._params(sampling, delta_tokens),
            f"sequence-{self._count}",
            lora_request=slot,
        )
        try:
            async with aclosing(outputs):
                while True:
                    with self._waiting():
                        output = await anext(outputs, None)
                    if output is None:
                        return
                    yield _delta(output)
        except VllmEngineDeadError:
            raise EngineDeadError from None

    def _params(self, sampling: Sampling, delta_tokens: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=list(sampling.stop),
            logprobs=sampling.logprobs or None,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=delta_tokens,
            # Nobody else has these: no deep copy.
            skip_clone=True,
        )

    def shutdown(self) -> None:
        """Stop the engine's processes. Blocks for a few seconds at most."""
        if self._llm is not None:
            self._llm.shutdown(timeout=0 if self._lost else 5)
            if self._lost:
                self._processes.clean_up()
            # Collected now: at the interpreter's exit its finalizer would fail, in writing.
            self._llm = None


def engine_environment(settings: Settings) -> dict[str, str]:
    """Environment variables for vLLM and its processes, which inherit them."""
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    wanted = {} if settings.log_level == "debug" else {k: os.environ.get(k, v) for k, v in quiet.items()}
    return {
        **wanted,
        # stdout belongs to the ready line.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # By now the backbone is a local folder.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # Read by the plugin in the engine's processes.
        "MTLORA_ADAPTER_BACKBONE_CHECK": settings.adapter_backbone_check,
        "MTLORA_ROUTING_SAMPLE_STEPS": str(settings.routing_sample_steps),
        **memory_environment(),
        **thread_environment(settings.omp_threads_bind, os.environ, settings.ranks),
    }


def default_executor(settings: Settings, on_cpu: bool) -> type | None:
    """The executor where none was asked for: None is vLLM's choice.

    One rank on CPU runs in the engine's own process. vLLM would give it another, to place its threads by environment
    variables, and have the two look for each other's messages without a pause, on the cores that the model needs. It
    can be kept from that by the class alone: the name "uni" it overrides (vllm/platforms/cpu.py).
    """
    if not on_cpu or settings.ranks > 1:
        return None
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return UniProcExecutor


@contextlib.contextmanager
def rank_environment(config: Any) -> Iterator[None]:
    """The environment that places the threads of a rank in the engine's own process, as vLLM sets it for others."""
    if isinstance(config.parallel_config.distributed_executor_backend, str):
        yield
        return
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    with OMPProcessManager(config).configure_omp_envs(0, 0):
        yield


def exit_at_once(status: int) -> NoReturn:
    """End this process and every one under it. An engine in the middle of its start cannot be asked to stop."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(status)


@contextlib.contextmanager
def _no_interrupts_in_children() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; the engine's must live on while running requests finish."""
    # Started later, the tracker would unblock the signal again.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _stat_logger_factory(on_stats: Callable[[EngineStats], None]) -> type:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StatLogger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._engine = engine_index

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                running = [name for name, count in scheduler_stats.running_lora_adapters.items() if count]
                on_stats(
                    EngineStats(
                        running=scheduler_stats.num_running_reqs,
                        waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                        kv_cache_usage=scheduler_stats.kv_cache_usage,
                        prefix_cache_queries=scheduler_stats.prefix_cache_stats.queries,
                        prefix_cache_hits=scheduler_stats.prefix_cache_stats.hits,
                        preemptions=iteration_stats.num_preempted_reqs if iteration_stats else 0,
                        tasks=len(running),
                        adapters=len({name.partition("#")[0] for name in running}),
                        engine=self._engine,
                    )
                )

        def log_engine_initialized(self) -> None:
            pass

    return StatLogger


def _worker_stats(rank: dict[str, Any]) -> WorkerStats:
    routing = {adapter: RoutingSums(**sums) for adapter, sums in rank["routing"].items()}
    return WorkerStats(**{**rank, "routing": routing})


def _check_loaded(states: Sequence[Sequence[str]]) -> None:
    for state, reason in states:
        if state == "failed":
            raise StageError(Stage.LOADED, f"the engine did not take it: {reason}")


def _delta(output: Any) -> Delta:
    completion = output.outputs[0]
    reason = completion.finish_reason
    if reason is not None and reason not in _FINISH_REASONS:
        raise EngineAbortedError(reason)
    scheduled_at = output.metrics.scheduled_ts if output.metrics else None
    return Delta(
        text=completion.text,
        tokens=len(completion.token_ids),
        logprobs=_logprobs(completion),
        finish_reason=_FINISH_REASONS[reason] if reason else None,
        scheduled_at=scheduled_at or None,
    )


def _logprobs(completion: Any) -> tuple[TokenLogprobs, ...]:
    if not completion.logprobs:
        return ()
    return tuple(
        _token_logprobs(token_id, position)
        for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True)
    )


def _token_logprobs(token_id: int, position: dict[int, Any]) -> TokenLogprobs:
    tokens = {
        each: TokenLogprob(each, entry.decoded_token or "", float(entry.logprob)) for each, entry in position.items()
    }
    # The chosen token comes first in vLLM's dictionary and counts as one of the top only where its rank says so.
    limit = len(position) - 1 if position[token_id].rank > len(position) - 1 else len(position)
    ranked = sorted((entry.rank, each) for each, entry in position.items())
    return TokenLogprobs(tokens[token_id], tuple(tokens[each] for _, each in ranked[:limit]))
