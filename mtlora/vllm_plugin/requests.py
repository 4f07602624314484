"""The `LoRARequest`s of an adapter version and its tasks."""

from pathlib import Path

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
