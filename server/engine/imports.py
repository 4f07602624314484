"""What an engine's process on CPUs imports before it reads a weight, in the order in which it would.

For the process that engines are forked from, and nothing else.
"""

import gc
from importlib import import_module

# First: it sets how often garbage is looked for.
import_module("server.cli")
import_module("vllm.v1.engine.core")
# Before the worker's modules, which take names from those that the plugin changes.
import_module("vllm.plugins").load_general_plugins()
for _name in (
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "mtlora.vllm_plugin.extension",
    "mtlora.vllm_plugin.worker_manager",
):
    import_module(_name)
import_module("setproctitle").setproctitle("mtlora-server: imports of engines")

# All of it stays. Collections would write into every object's header, and so copy the pages that forks share.
gc.collect()
gc.freeze()
