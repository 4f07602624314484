"""A vLLM engine for a test, inside the test's process and gone after it."""

import atexit
import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@contextlib.contextmanager
def running_engine(model: Any, **arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` with the plugin's arguments; it and what it changed of the process are gone afterwards."""
    from vllm import LLM

    with _running(lambda settings: LLM(str(model), **settings), arguments) as engine:
        yield engine


@contextlib.contextmanager
def running_bare_engine(model: Any, **arguments: Any) -> Iterator[Any]:
    """Like `running_engine`, with a `vllm.LLMEngine` alone as `llm_engine`: a `vllm.LLM` wants a tokenizer."""
    from vllm import EngineArgs, LLMEngine

    def start(settings: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(llm_engine=LLMEngine.from_engine_args(EngineArgs(str(model), **settings)))

    with _running(start, arguments) as engine:
        yield engine


@contextlib.contextmanager
def _running(start: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> Iterator[Any]:
    from vllm.distributed import cleanup_dist_env_and_memory

    from mtlora.vllm_plugin import engine_overrides

    _leave_imports_to_themselves()
    defaults = {
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        # Filling a larger one with zeros takes time at every start.
        "kv_cache_memory_bytes": 128 << 20,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    with pytest.MonkeyPatch.context() as patch:
        # vLLM writes over both.
        patch.setenv("VLLM_DIST_IDENT", "")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        # Disable vLLM's gc calls: it freezes and unfreezes all objects, and collects eight times in an engine's short
        # life.
        patch.setattr("vllm.v1.engine.core.freeze_gc_heap", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        engine = start(defaults | engine_overrides(16) | arguments)
        try:
            yield engine
        finally:
            engine.llm_engine.engine_core.shutdown()
            del engine
            cleanup_dist_env_and_memory()


@functools.cache
def _leave_imports_to_themselves() -> None:
    """Freeze objects that exist now: otherwise each collection takes half a second, most of an engine's time."""
    gc.collect()
    gc.freeze()
    # Unfreeze at exit: some bindings report objects that are left then.
    atexit.register(gc.unfreeze)


def noted_preemptions(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that the engine's scheduler preempts from now on."""
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, list[Any]()

    def noted(request: Any, *more: Any, **named: Any) -> None:
        preempted.append(request)
        preempt(request, *more, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", noted)
    return preempted


def worker_of(engine: Any) -> Any:
    """The model runner of an engine inside this process."""
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def lora_manager_of(engine: Any) -> Any:
    """The plugin's manager of an engine inside this process."""
    return worker_of(engine).lora_manager
