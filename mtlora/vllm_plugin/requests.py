"""Makes inputs of vLLM's engines: `LoRARequest`s of an adapter version's tasks, and prompts with soft tokens.

Shape suffixes: L positions of a prompt, S soft tokens, D hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.inputs.engine import embeds_input
from vllm.lora.request import LoRARequest

from mtlora.checkpoint.format import AdapterManifest
from mtlora.vllm_plugin.naming import slot_name, slot_path


def slot_requests(
    name: str, version: str, folder: Path, manifest: AdapterManifest, first_id: int
) -> dict[str, LoRARequest]:
    """The request of every task: one each if the adapter has task biases, else one for all.

    The distinct requests get the ids `first_id` (at least 1), `first_id` + 1, ...
    """
    tasks = [task.id for task in manifest.tasks]
    if not manifest.config.task_bias:
        return dict.fromkeys(tasks, LoRARequest(slot_name(name, version, None), first_id, slot_path(folder, None)))
    return {
        task: LoRARequest(slot_name(name, version, task), first_id + i, slot_path(folder, task))
        for i, task in enumerate(tasks)
    }


def soft_prompt(prompt_ids: Sequence[int], at: int, soft_SD: torch.Tensor, cache_salt: str | None = None) -> Any:
    """A prompt whose positions from `at` on are soft tokens, as an input of an engine with `enable_prompt_embeds`.

    prompt_ids: of all positions; those of the soft tokens hold any token, which counts as the prompt's for a repetition
    penalty. A block of the prefix cache is keyed by its ids, these taken as 0, and by a hash of its rows of embeddings.
    """
    S = len(soft_SD)
    embeds_LD = soft_SD.new_zeros(len(prompt_ids), soft_SD.shape[1])
    embeds_LD[at : at + S] = soft_SD
    is_token_ids = [True] * len(prompt_ids)
    is_token_ids[at : at + S] = [False] * S
    return embeds_input(embeds_LD, cache_salt=cache_salt, prompt_token_ids=list(prompt_ids), is_token_ids=is_token_ids)
