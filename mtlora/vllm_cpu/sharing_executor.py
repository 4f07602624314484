"""The executor of an engine that shares a CPU's cores with another (`shared_cores.py`)."""

from typing import Any

# Import these first: vLLM's workers replace torch's by a function that does nothing.
from torch import get_num_threads, set_num_threads
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from mtlora.vllm_cpu.shared_cores import SharedCores


class SharingExecutor(UniProcExecutor):
    """Runs an engine's only rank in the engine's process, and shares cores with another engine."""

    def _init_executor(self) -> None:
        super()._init_executor()
        self._cores = SharedCores.of_environment(get_num_threads())

    def execute_model(self, *arguments: Any, **named: Any) -> Any:
        """See UniProcExecutor."""
        set_num_threads(self._cores.threads)
        with self._cores:
            return super().execute_model(*arguments, **named)

    def sample_tokens(self, *arguments: Any, **named: Any) -> Any:
        """See UniProcExecutor."""
        with self._cores:
            return super().sample_tokens(*arguments, **named)
