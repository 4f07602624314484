"""vLLM serves mtLoRA adapters: entry point `mtlora` of group `vllm.general_plugins`.

`register` runs in every vLLM process. It replaces vLLM's LoRA managers by this package's: `LoRARequest`, slots,
`add_lora` and the prefix cache work as before, with checkpoints of this project's format.

A process serves one kind of adapter. With `MTLORA_PLUGIN=0` in its environment the plugin does nothing, and vLLM's own
multi-LoRA serves PEFT adapters.
"""

import os
from typing import Any

from mtlora.vllm_plugin.options import Options
from mtlora.vllm_plugin.seams import ENVIRONMENT_SWITCH


def register() -> None:
    """Install the plugin in this process; any further call does nothing.

    Raises RuntimeError where vLLM lacks a seam that correctness needs.
    """
    if os.environ.get(ENVIRONMENT_SWITCH, "1") == "0":
        return
    # Imported here: vLLM only logs an error of an entry point's import, and goes on without the plugin.
    from mtlora.vllm_plugin.install import install

    install()


def engine_overrides(max_num_seqs: int, options: Options = Options()) -> dict[str, Any]:  # noqa: B008  it is frozen
    """Arguments of vLLM's `EngineArgs` that suit mtLoRA adapters, for up to `max_num_seqs` sequences at a time.

    A slot takes little memory (a pointer and a row of biases), so there is one for every sequence that can run.
    `max_lora_rank` has no effect. The plugin sets the compilation settings by itself.
    """
    return {
        "enable_lora": True,
        "max_loras": max_num_seqs,
        "max_cpu_loras": max_num_seqs,
        "worker_extension_cls": "mtlora.vllm_plugin.extension.AdapterExtension",
        "additional_config": options.as_config(),
    }
