"""Engines for tests. They run inside the test's process, one at a time."""

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@contextlib.contextmanager
def running_engine(model: Any, **arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` with the plugin's arguments; it and vLLM's process-wide state are gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from mtlora.vllm_plugin import engine_overrides

    defaults = {
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    engine = LLM(str(model), **(defaults | engine_overrides(16) | arguments))
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)
