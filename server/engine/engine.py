"""Thin asynchronous wrappers around vLLM's AsyncLLM, for any engine and for one with a language backbone."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mtlora.errors import describe
from mtlora.prompt import PromptEncoder
from mtlora.vllm_plugin.naming import ACTIVATION_KEY
from server.engine import translation
from server.engine.launch import launch
from server.engine.processes import EngineProcesses
from server.engine.stats import EngineStats, WorkerStats, worker_stats
from server.errors import AdapterError, EngineDeadError
from server.job import Delta, GenerationJob, Lane, Sampling, SoftTokens
from server.settings import Settings
from server.telemetry.engine_stats import KvCache
from server.telemetry.logs import get_logger

logger = get_logger("engine")

# Seconds between polls of an adapter that is being staged.
_STAGING_POLL_S = 0.02


class EngineStartError(RuntimeError):
    """The engine did not start."""


class _Wait:
    """A wait of the current task for the engine: for a sequence's next tokens, or for an answer from between two steps.

    It registers itself in `waits`. `lose` ends it with EngineDeadError; vLLM's own error becomes this one.
    """

    __slots__ = ("_lost", "_task", "_waits", "since")

    def __init__(self, waits: "dict[_Wait, None]") -> None:
        self._waits = waits
        self._lost = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self.since = time.monotonic()
        self._waits[self] = None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        del self._waits[self]
        if self._lost and isinstance(error, asyncio.CancelledError):
            self._task.uncancel()
            raise EngineDeadError from None
        if isinstance(error, Exception):
            from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

            if isinstance(error, VllmEngineDeadError):
                raise EngineDeadError from None

    def lose(self) -> None:
        self._lost = True
        self._task.cancel()


class BaseEngine:
    """One engine, of any backbone. `start` it, then `load` slots; all but `start` and `shutdown` on the event loop.

    After `lose`, every wait and every later call ends in EngineDeadError.
    """

    def __init__(self, settings: Settings, backbone: Path, on_stats: Callable[[EngineStats], None]) -> None:
        self._settings = settings
        self._backbone = backbone
        self._on_stats = on_stats
        self._llm: Any = None
        self._count = 0
        self._processes = EngineProcesses()
        # A file descriptor for each engine core, readable once its process has ended.
        self._sentinels: list[int] = []
        self._ended = asyncio.Event()
        # Ordered by age: the longest wait is first.
        self._sequences: dict[_Wait, None] = {}
        self._calls: dict[_Wait, None] = {}
        # Compilations, which may take long while steps continue; not watched for a hang.
        self._compilations: dict[_Wait, None] = {}
        self._lost = False
        self._last_step = time.monotonic()

    def start(self) -> None:
        """Start the engine's processes and load the backbone. Blocks for long; raises EngineStartError."""
        try:
            self._llm = self._launch()
            cores = self._llm.engine_core.resources.engine_manager.processes
            self._sentinels = [core.sentinel for core in cores]
            self._processes = EngineProcesses.below(core.pid for core in cores)
        except ValidationError as error:
            # vLLM refuses a setting.
            raise EngineStartError(f"the engine did not start: {describe(error)}") from error
        except Exception as error:
            logger.error("the engine did not start", exc_info=True)
            raise EngineStartError(f"the engine did not start: {error}") from error

    def _launch(self) -> Any:
        """vLLM's AsyncLLM. Raises vLLM's errors."""
        raise NotImplementedError

    async def warm_up(self, slot: Any | None, *, short: bool = False) -> None:
        """Run a short sequence, so that no user's request pays for first calls.

        `short`: for a new slot in a warm engine.
        """
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        """False once the engine has died: a request would end in EngineDeadError."""
        return self._llm is not None and not self._lost and not self._ended.is_set() and not self._llm.errored

    async def ended(self, timeout: float) -> None:
        """Wait until a process of the engine has ended, `timeout` seconds at most."""
        loop = asyncio.get_running_loop()
        for sentinel in self._sentinels:
            loop.add_reader(sentinel, self._ended.set)
        try:
            async with asyncio.timeout(timeout):
                await self._ended.wait()
        except TimeoutError:
            pass
        finally:
            for sentinel in self._sentinels:
                loop.remove_reader(sentinel)

    @property
    def stalled_s(self) -> float:
        """Seconds of the longest wait without progress. Waiting for a slow reader does not count.

        A sequence may wait while the engine makes steps. A worker call needs one step of every engine, so it reveals a
        hang of one engine while the others continue.
        """
        now = time.monotonic()
        call, sequence = next(iter(self._calls), None), next(iter(self._sequences), None)
        return max(
            now - call.since if call else 0.0,
            now - max(sequence.since, self._last_step) if sequence else 0.0,
        )

    def lose(self) -> None:
        """Give up this engine: end every wait for it, and kill its processes."""
        self._lost = True
        for wait in (*self._calls, *self._compilations, *self._sequences):
            wait.lose()
        self._processes.kill()
        if self._llm is not None:
            # vLLM then sends nothing more to its processes.
            self._llm.engine_core.resources.engine_dead = True

    async def load(self, folder: Path, slots: Sequence[Any]) -> None:
        """Put an adapter and its slots into the engine's memory, reading it beside the running steps.

        Raises AdapterError if the engine refuses it; nothing has changed then.
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
        except AdapterError:
            # Other ranks may have loaded it.
            await self._call("mtlora_remove", [slot.lora_int_id for slot in slots])
            await self._call("mtlora_unstage", str(folder))
            raise

    async def unload(self, slots: Sequence[Any]) -> None:
        """Remove slots from the engine's memory, and an adapter with its last slot."""
        await self._call("mtlora_remove", [slot.lora_int_id for slot in slots])

    async def worker_stats(self) -> list[WorkerStats]:
        """The counts of every rank of every engine, collected between two steps."""
        return [worker_stats(rank) for rank in await self._call("mtlora_statistics")]

    async def _call(self, method: str, *arguments: Any) -> list[Any]:
        """A worker method's result from each rank of each engine."""
        # vLLM's own `collective_rpc` returns only the first engine's results.
        call = self._running.engine_core.call_utility_all_async
        with self._waiting(self._calls):
            engines = await call("collective_rpc", method, None, arguments, {})
        return [result for ranks in engines for result in ranks]

    def _waiting(self, waits: dict[_Wait, None]) -> _Wait:
        if self._lost:
            raise EngineDeadError
        return _Wait(waits)

    @property
    def _running(self) -> Any:
        """vLLM's AsyncLLM. Raises EngineDeadError while the engine starts, and once it is lost."""
        if self._lost or self._llm is None:
            raise EngineDeadError
        return self._llm

    def _record_step(self, stats: EngineStats) -> None:
        self._last_step = time.monotonic()
        self._on_stats(stats)

    def shutdown(self) -> None:
        """Stop the engine's processes. Blocks for a few seconds at most."""
        if self._llm is not None:
            if self._lost:
                # Clean up first: vLLM looks for the children of living processes, and fails if one of these ends
                # meanwhile.
                self._processes.clean_up()
            self._llm.shutdown(timeout=0 if self._lost else 5)
            # Collect it now: at the interpreter's exit its finalizer would fail and log an error.
            self._llm = None


class Engine(BaseEngine):
    """An engine with a language backbone: it generates."""

    # `start` sets these.
    prompts: PromptEncoder

    def _launch(self) -> Any:
        llm = launch(self._settings, Lane.TEXT, self._backbone, self._record_step)
        self.prompts = PromptEncoder(llm.get_tokenizer())
        return llm

    @property
    def vocab_size(self) -> int:
        """Upper bound of token ids (exclusive). The model's vocabulary may be padded beyond it."""
        known = max(self.prompts.tokenizer.get_vocab().values()) + 1
        return min(known, int(self._llm.model_config.get_vocab_size()))

    @property
    def kv_cache(self) -> KvCache:
        """What it has once it has started."""
        config = self._llm.vllm_config.cache_config
        return KvCache(config.block_size, config.num_gpu_blocks)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer, whatever a request sets."""
        found = self._llm.model_config.try_get_generation_config().get("eos_token_id")
        more = found if isinstance(found, list) else [found]
        return frozenset(each for each in (self.prompts.tokenizer.eos_token_id, *more) if each is not None)

    async def compile(self, constraints: Sequence[str], *, of_tasks: bool = False) -> list[int]:
        """Compile answer constraints in every engine, beside the running steps.

        `of_tasks`: cache them separately from requests' own constraints. Returns the fewest tokens of an answer for
        each. Raises AdapterError if the engine refuses one.
        """
        call = self._running.engine_core.call_utility_all_async
        try:
            with self._waiting(self._compilations):
                fewest, *_ = await call("mtlora_compile", list(constraints), of_tasks)
        except EngineDeadError:
            raise
        except Exception as error:
            raise AdapterError(f"the engine refused a type of answer: {error}") from error
        return list(fewest)

    async def warm_up(self, slot: Any | None, *, short: bool = False) -> None:
        """Run short sequences through prefill, decode and sampling, so that no user's request pays for first calls.

        `short`: only one prefill step, for a new slot in a warm engine, whose decoding code has already run.
        """
        sampled = Sampling(max_new_tokens=2, temperature=1.0, top_p=0.9, top_k=10, seed=0, logprobs=1)
        for sampling in (Sampling(max_new_tokens=1),) if short else (Sampling(max_new_tokens=2), sampled):
            # An activated adapter needs an activation point.
            async for _ in self._generate([1] * 8, sampling, slot, extra={ACTIVATION_KEY: 0}):
                pass

    def generate(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        """A sequence's deltas. Closing the iterator, or cancelling its reader, aborts the sequence in the engine."""
        slot = None if job.without_adapter else job.task.slot
        extra = translation.extra_args(job)
        return self._generate(
            list(job.prompt_ids), job.sampling, slot, job.cache_salt, job.delta_tokens, extra=extra, soft=job.soft
        )

    def _rank_of(self, document_ids: list[int]) -> dict[str, int]:
        """With several engines, send all tasks of a document to the same one, which has its blocks cached."""
        engines = self._settings.data_parallel_size
        if engines == 1 or not document_ids:
            return {}
        return {"data_parallel_rank": hash(tuple(document_ids)) % engines}

    async def _generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        slot: Any | None,
        cache_salt: str | None = None,
        delta_tokens: int = 1,
        *,
        extra: Mapping[str, Any] | None = None,
        soft: SoftTokens | None = None,
    ) -> AsyncGenerator[Delta, None]:
        from vllm.inputs import tokens_input

        if soft is None:
            prompt: Any = tokens_input(prompt_ids, cache_salt=cache_salt)
        else:
            prompt = translation.soft_prompt(prompt_ids, soft, cache_salt)

        self._count += 1
        parameters = translation.sampling_params(sampling, delta_tokens, extra)
        text_of = None if parameters.detokenize else self.prompts.decoded
        outputs = self._running.generate(
            prompt,
            parameters,
            f"sequence-{self._count}",
            lora_request=slot,
            **(self._rank_of(prompt_ids[: extra[ACTIVATION_KEY]]) if extra else {}),
        )
        async with aclosing(outputs):
            while True:
                with self._waiting(self._sequences):
                    output = await anext(outputs, None)
                if output is None:
                    return
                yield translation.delta(output, sampling, text_of)


def _check_loaded(states: Sequence[Sequence[str]]) -> None:
    for state, reason in states:
        if state == "failed":
            raise AdapterError(f"the engine refused the adapter: {reason}")
