"""The names of an adapter and a task inside the engine: the two strings of a `LoRARequest`.

vLLM keys slots by integer id and prefix-cache blocks by (lora_name, lora_path). An adapter with task biases has one
request for each task. An adapter without has one for all, so its tasks share the prefix cache.
"""

from pathlib import Path

_SEPARATOR = "#"
# A request's activation point, in `SamplingParams.extra_args`; see activation.py.
ACTIVATION_KEY = "mtlora_activation"
# [seconds, most tokens of the request's tenant]: how long its document's blocks are kept; see leases.py.
LEASE_KEY = "mtlora_lease"


def slot_name(adapter: str, version: str, task_id: str | None) -> str:
    """`LoRARequest.lora_name`: `NAME/VERSION` or `NAME/VERSION#TASK`."""
    return f"{adapter}/{version}" + (f"{_SEPARATOR}{task_id}" if task_id else "")


def adapter_version(name: str) -> str:
    """`NAME/VERSION` of a `lora_name`, without the hash that a server may add to the version after an `@`."""
    return name.partition(_SEPARATOR)[0].partition("@")[0]


def slot_path(folder: Path, task_id: str | None) -> str:
    """`LoRARequest.lora_path`: the checkpoint's folder, or `FOLDER#TASK`."""
    return str(folder) + (f"{_SEPARATOR}{task_id}" if task_id else "")


def parse_slot_path(path: str) -> tuple[Path, str | None]:
    """(checkpoint folder, task id or None) of a `lora_path`. In an existing folder's name, `#` is no separator."""
    folder, separator, task_id = path.rpartition(_SEPARATOR)
    if not separator or Path(path).is_dir():
        return Path(path), None
    return Path(folder), task_id
