"""Types of answers in vLLM's own server: a request for a task's model is held to the task's type.

Loading a LoRA compiles its task's type. `mtlora-server` disables this, because it sends the type with each request. A
request is not constrained if it has `mtlora_free` in the extra arguments of its sampling parameters (`vllm_xargs` of
the OpenAI API).
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.input_processor import InputProcessor

from mtlora.answer import AnswerType, Json
from mtlora.checkpoint.format import MANIFEST_FILE, CheckpointError
from mtlora.checkpoint.read import read_manifest
from mtlora.task import TaskSpec
from mtlora.vllm_plugin.naming import parse_slot_path
from mtlora.vllm_plugin.typed import constraint_of

ENVIRONMENT_SWITCH = "MTLORA_TYPED_REQUESTS"
FREE = "mtlora_free"
# Parameters that may end an answer early, or keep it from ending, against its type.
_AGAINST_TYPES = ("structured_outputs", "stop_token_ids", "min_tokens", "allowed_token_ids", "bad_words", "ignore_eos")

# Adapters whose tasks are remembered.
_KEPT = 1024
# Tasks by folder, as last read.
_last: dict[str, dict[str, TaskSpec]] = {}
# The fewest tokens that an answer takes, by constraint, as the engine said when it compiled it.
_fewest: dict[str, int] = {}

_added = AsyncMPClient.add_lora_async
_processed = InputProcessor.process_inputs


def hold_requests_to_types() -> None:
    """Take the seam "types in vLLM's server", unless the environment switches it off."""
    if os.environ.get(ENVIRONMENT_SWITCH) != "0":
        AsyncMPClient.add_lora_async = _add_lora_async
        InputProcessor.process_inputs = _process_inputs


async def _add_lora_async(self: Any, lora_request: LoRARequest) -> bool:
    """Compile the type of the module's task first: a type that the engine refuses loads nothing."""
    task = _task(lora_request)
    if constraint := task.constraint() if task else None:
        (_fewest[constraint.text],) = await self.call_utility_async("mtlora_compile", [constraint.text], True)
        if len(_fewest) > _KEPT:
            del _fewest[next(iter(_fewest))]
    added: bool = await _added(self, lora_request)
    return added


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
    request = _processed(self, request_id, prompt, params, supported_tasks, arrival_time, lora_request, *more, **named)
    # Check here: before this point the prompt's tokens are not counted and `max_tokens` is not set.
    if fewest := _fewest.get(constraint_of(request.sampling_params) or ""):
        prompt_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        left = min(request.sampling_params.max_tokens, self.model_config.max_model_len - prompt_tokens)
        if left < fewest:
            raise VLLMValidationError(
                f"max_tokens: found {left}, the context included; allowed: {fewest} or more, for the shortest answer",
                parameter="max_tokens",
            )
    return request


def typed(params: SamplingParams, lora_request: LoRARequest) -> SamplingParams:
    """The parameters held to the type of the module's task, if it has one. Raises VLLMValidationError."""
    task = _task(lora_request)
    constraint = task.constraint() if task else None
    if task is None or constraint is None or constraint_of(params) or (params.extra_args or {}).get(FREE):
        return params
    held = params.clone()
    if _is_schema_of(held.structured_outputs, constraint.type):
        held.structured_outputs = None
    for name in _AGAINST_TYPES:
        if getattr(held, name):
            raise VLLMValidationError(
                f"{name}: task {task.id} has a type, {constraint.type.name}; allowed: none, or {FREE}", parameter=name
            )
    if other := set(params.stop or ()) - set(task.stop):
        raise VLLMValidationError(
            f"stop: found {min(other)!r}; task {task.id} has a type; allowed: {list(task.stop)}, or {FREE}",
            parameter="stop",
        )
    held.structured_outputs = StructuredOutputsParams(grammar=constraint.text)
    return held


def _is_schema_of(given: StructuredOutputsParams | None, answer: AnswerType) -> bool:
    """Whether a request's structured outputs are a type's JSON schema, and nothing else."""
    if given is None or given.json is None or not isinstance(answer, Json):
        return False
    try:
        same = _normal(given.json) == _normal(answer.json_schema)
    except (ValueError, RecursionError):
        return False
    return same and given == StructuredOutputsParams(json=given.json)


def _normal(schema: str | dict[str, Any]) -> str:
    """A schema as text, in which true differs from 1, and the order of names does not matter."""
    return json.dumps(json.loads(schema) if isinstance(schema, str) else schema, sort_keys=True)


def _task(lora_request: LoRARequest) -> TaskSpec | None:
    """The task that the path names, or else the module's name."""
    folder, task_id = parse_slot_path(lora_request.lora_path)
    try:
        tasks = _tasks(str(folder), (folder / MANIFEST_FILE).stat().st_mtime_ns)
        _last[str(folder)] = tasks
    except (OSError, CheckpointError):
        # The files may be gone while the engine holds the adapter, or they have another format: no types then.
        tasks = _last.get(str(folder), {})
    if len(_last) > _KEPT:
        del _last[next(iter(_last))]
    return tasks.get(task_id or lora_request.lora_name)


@lru_cache(maxsize=_KEPT)
def _tasks(folder: str, changed: int) -> dict[str, TaskSpec]:
    return {task.id: task for task in read_manifest(Path(folder)).tasks}
