"""An engine's process ends with the server that started it: entry point `mtlora-server` of `vllm.general_plugins`.

An engine process of vLLM outlives a killed server and keeps its memory.
"""

import multiprocessing
import os
import threading

# The server sets it for its engines' processes only; other programs that run vLLM are not affected.
ENVIRONMENT_SWITCH = "MTLORA_ENGINES_END_WITH_SERVER"


def register() -> None:
    """In a server's engine process, watch the parent. Workers need no watch: vLLM ends them with their engine."""
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(ENVIRONMENT_SWITCH) != "1":
        return
    if all(thread.name != _WATCH for thread in threading.enumerate()):
        threading.Thread(target=_end_after, args=(parent,), name=_WATCH, daemon=True).start()


_WATCH = "server"


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    # The parent is gone: skip cleanup.
    os._exit(1)
