"""An engine's process ends with the server that started it: entry point `mtlora-server` of `vllm.general_plugins`.

An engine process of vLLM outlives a killed server and keeps its memory.
"""

import multiprocessing
import os
import threading

# Set by the server for its engines' processes: other programs that run vLLM decide for themselves.
ENVIRONMENT_SWITCH = "MTLORA_ENGINES_END_WITH_SERVER"


def register() -> None:
    """Watch this process's parent, in an engine of a server. Workers end with their engine, as vLLM has it."""
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
