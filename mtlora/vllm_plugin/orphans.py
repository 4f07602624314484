"""An engine core's process ends with the process that started it.

vLLM's own lives on after a server that was killed, with all its memory, though nobody can ask it anything any more.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc


def end_with_parent() -> None:
    """Have vLLM's engine cores end in this way. Their workers end with them, as vLLM has it."""
    for core in (EngineCoreProc, DPEngineCoreProc):
        core.run_busy_loop = _watching(core.run_busy_loop)


def _watching(run: Callable[[Any], None]) -> Callable[[Any], None]:
    def run_busy_loop(self: Any) -> None:
        threading.Thread(target=_end_after_parent, name="parent", daemon=True).start()
        run(self)

    return run_busy_loop


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # Nothing is worth an orderly end: whoever could want it has gone.
        os._exit(1)
