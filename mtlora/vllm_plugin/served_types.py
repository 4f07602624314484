"""Types of answers in vLLM's own server: a request for a task's model is held to the task's type.

`mtlora-server` asks for the type by itself and leaves this out. A request is free of it with `mtlora_free` in the
extra arguments of its sampling parameters (`vllm_xargs` of the OpenAI API).
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.input_processor import InputProcessor

from mtlora.checkpoint.format import MANIFEST_FILE, CheckpointError
from mtlora.checkpoint.read import read_manifest
from mtlora.task import TaskSpec
from mtlora.vllm_plugin.naming import parse_slot_path
from mtlora.vllm_plugin.typed import constraint_of

ENVIRONMENT_SWITCH = "MTLORA_TYPED_REQUESTS"
FREE = "mtlora_free"
# Parameters that may end an answer, or keep it from ending, against its type.
_AGAINST_TYPES = ("structured_outputs", "stop_token_ids", "min_tokens", "allowed_token_ids", "bad_words", "ignore_eos")

# Adapters whose tasks are remembered.
_KEPT = 1024
# Tasks by folder, as last read.
_last: dict[str, dict[str, TaskSpec]] = {}

_processed = InputProcessor.process_inputs


def hold_requests_to_types() -> None:
    """Take the seam "types in vLLM's server", unless the environment switches it off."""
    if os.environ.get(ENVIRONMENT_SWITCH) != "0":
        InputProcessor.process_inputs = _process_inputs


def _process_inputs(
    self: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    supported_tasks: Any,
    arrival_time: float | None = None,
    lora_request: Any = None,
    *more: Any,
    **named: Any,
) -> Any:
    if lora_request is not None and isinstance(params, SamplingParams):
        params = typed(params, lora_request)
    return _processed(self, request_id, prompt, params, supported_tasks, arrival_time, lora_request, *more, **named)


def typed(params: SamplingParams, lora_request: LoRARequest) -> SamplingParams:
    """The parameters held to the type of the module's task, if it has one. Raises VLLMValidationError."""
    task = _task(lora_request)
    constraint = task.constraint() if task else None
    if task is None or constraint is None or constraint_of(params) or (params.extra_args or {}).get(FREE):
        return params
    for name in _AGAINST_TYPES:
        if getattr(params, name):
            raise VLLMValidationError(
                f"{name}: task {task.id} has a type, {constraint.type.name}; allowed: none, or {FREE}", parameter=name
            )
    if other := set(params.stop or ()) - set(task.stop):
        raise VLLMValidationError(
            f"stop: found {min(other)!r}; task {task.id} has a type; allowed: {list(task.stop)}, or {FREE}",
            parameter="stop",
        )
    held = params.clone()
    held.structured_outputs = StructuredOutputsParams(grammar=constraint.text)
    return held


def _task(lora_request: LoRARequest) -> TaskSpec | None:
    """The task that the path names, or else the module's name."""
    folder, task_id = parse_slot_path(lora_request.lora_path)
    try:
        tasks = _tasks(str(folder), (folder / MANIFEST_FILE).stat().st_mtime_ns)
        _last[str(folder)] = tasks
    except (OSError, CheckpointError):
        # An adapter in the engine outlives its files. An adapter of another format has no types.
        tasks = _last.get(str(folder), {})
    if len(_last) > _KEPT:
        del _last[next(iter(_last))]
    return tasks.get(task_id or lora_request.lora_name)


@lru_cache(maxsize=_KEPT)
def _tasks(folder: str, changed: int) -> dict[str, TaskSpec]:
    return {task.id: task for task in read_manifest(Path(folder)).tasks}
