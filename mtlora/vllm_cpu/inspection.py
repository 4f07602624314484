"""What a model's class can do is read off it in the process that asks, where that is safe: on CPUs.

vLLM starts a process for it, whose imports take as long as a start, wherever its cache of such answers is empty: in
every new container. It does so to keep CUDA out of its own process.
"""

from collections.abc import Callable
from typing import Any

from vllm.model_executor.models import registry


def inspect_models_here() -> None:
    """Have vLLM's model registry do so."""
    registry._run_in_subprocess = _run


def _run(look: Callable[[], Any]) -> Any:
    return look()
