"""On CPUs, inspect model classes in this process.

vLLM starts a process to inspect a model's class if its cache has no answer yet, as in every new container. That process
keeps CUDA out of vLLM's own, which CPUs do not need, and its imports take as long as a start.
"""

from collections.abc import Callable
from typing import Any

from vllm.model_executor.models import registry


def inspect_models_here() -> None:
    """Have vLLM's model registry inspect classes here."""
    registry._run_in_subprocess = _run


def _run(fn: Callable[[], Any]) -> Any:
    return fn()
