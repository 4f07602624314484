"""Adapters that act from a token on: a request's activation point is the number of tokens before it.

The point travels in `SamplingParams.extra_args`. Tokens before it get no row in a step's plan, so their keys and values
are the bare backbone's. Prefix-cache blocks wholly before it are keyed as such, without the adapter's name and path:
all adapters share them. The first block with a later token is keyed by the adapter, and by the point if that lies
inside the block; so are all after it, as a block's key covers the one before it.

Rows and keys use the same number, limited to the prompt's length. So a wrong number makes only its own request's answer
wrong and never stores blocks under a wrong key.
"""

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mtlora.checkpoint.format import MANIFEST_FILE
from mtlora.vllm_plugin.naming import ACTIVATION_KEY, LEASE_KEY, parse_slot_path

_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"


def point_of(parameters: Any, prompt_tokens: int) -> int:
    """The activation point of a request with these SamplingParams: 0 if the adapter acts on every token."""
    extra = parameters.extra_args if parameters is not None else None
    return min(extra.get(ACTIVATION_KEY) or 0, prompt_tokens) if extra else 0


def masked(
    token_mapping: Sequence[int], num_scheduled: Any, computed: Any, points: Mapping[int, int]
) -> tuple[int, ...]:
    """A step's slot ids by token, with none for tokens before their request's point.

    num_scheduled, computed: each request's tokens of this step, and those of earlier ones. points: by the request's
    place in the step.
    """
    ids, ends = np.array(token_mapping), np.cumsum(num_scheduled)
    for i, point in points.items():
        first = ends[i] - num_scheduled[i]
        ids[first : min(ends[i], first + max(0, point - computed[i]))] = 0
    return tuple(ids.tolist())


def key_blocks() -> None:
    """Key prefix-cache blocks by the adapter that computed them. Runs in the engine's core."""
    from vllm.v1.core import block_pool, kv_cache_utils

    stock = kv_cache_utils.generate_block_hash_extra_keys

    @functools.wraps(stock)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        adapter = request.lora_request
        point = 0 if adapter is None else point_of(request.sampling_params, request.num_prompt_tokens)
        if start_token_idx >= point:
            return stock(request, start_token_idx, end_token_idx, start_mm_idx)
        if end_token_idx > point:
            keys, next_mm_idx = stock(request, start_token_idx, end_token_idx, start_mm_idx)
            return (*(keys or ()), (ACTIVATION_KEY, point)), next_mm_idx
        request.lora_request = None
        try:
            return stock(request, start_token_idx, end_token_idx, start_mm_idx)
        finally:
            request.lora_request = adapter

    kv_cache_utils.generate_block_hash_extra_keys = generate_block_hash_extra_keys
    # The block pool uses it only for its events.
    block_pool.generate_block_hash_extra_keys = generate_block_hash_extra_keys


def check_requests() -> None:
    """Refuse requests with a wrong activation point, or without one that the adapter needs. Runs in the front end."""
    from vllm.v1.engine.input_processor import InputProcessor

    stock = InputProcessor.process_inputs

    @functools.wraps(stock)
    def process_inputs(self: Any, *arguments: Any, **named: Any) -> Any:
        request = stock(self, *arguments, **named)
        if request.sampling_params is not None:
            # Check requests without an adapter too: the engine reads both keys of every request, and an error there
            # ends it.
            _check(request.lora_request, request.sampling_params.extra_args, len(request.prompt_token_ids or ()))
        return request

    InputProcessor.process_inputs = process_inputs


def _check(adapter: Any, extra: dict[str, Any] | None, prompt_tokens: int) -> None:
    point = extra.get(ACTIVATION_KEY) if extra else None
    if extra and LEASE_KEY in extra and not _is_lease(extra[LEASE_KEY]):
        raise _refused(f"{LEASE_KEY}: found {extra[LEASE_KEY]!r}; allowed: [seconds, tokens], 0 or more each")
    if point is None:
        try:
            needed = adapter is not None and _activation(adapter.lora_path) == "task"
        except (OSError, ValueError, LookupError):
            # Ignore the error here: the worker that loads the adapter reports it.
            return
        if needed:
            raise _refused(
                f"{ACTIVATION_KEY}: found none for {adapter.lora_name}, whose activation is 'task'; allowed: in the "
                "request's extra arguments (vllm_xargs over HTTP), the number of tokens of the prompt's document part"
            )
    elif type(point) is not int or not 0 <= point <= prompt_tokens:
        raise _refused(f"{ACTIVATION_KEY}: found {point!r}; allowed: 0 to {prompt_tokens}, the prompt's tokens")


def _refused(reason: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(reason, parameter="extra_args")


def _is_lease(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) in (int, float) and n >= 0 for n in value)


@lru_cache(maxsize=65536)
def _activation(lora_path: str) -> str:
    """An adapter's activation. Raises OSError, ValueError or LookupError for a manifest that cannot be used."""
    folder, _ = parse_slot_path(lora_path)
    return str(json.loads((folder / MANIFEST_FILE).read_text())["config"].get("activation", "all"))


def leave_rows_bare() -> None:
    """Give tokens before their request's point no slot in a step. Runs in a worker, after its model runner's import."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    if hasattr(LoRAModelRunnerMixin, "_mtlora_activation"):
        return
    LoRAModelRunnerMixin._mtlora_activation = True
    stock = LoRAModelRunnerMixin.set_active_loras

    @functools.wraps(stock)
    def set_active_loras(
        self: Any, input_batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any = None, *more: Any, **named: Any
    ) -> None:
        n = input_batch.num_reqs
        computed, prompts = input_batch.num_computed_tokens_cpu[:n], input_batch.num_prompt_tokens[:n]
        # Only prompts have tokens before a point.
        points = {
            i: point
            for i in np.flatnonzero(computed < prompts).tolist()
            if (point := point_of(self.requests[input_batch.req_ids[i]].sampling_params, prompts[i])) > computed[i]
        }
        if not points:
            stock(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *more, **named)
            return
        if num_sampled_tokens is None:
            num_sampled_tokens = np.ones_like(num_scheduled_tokens, dtype=np.int32)
        sampled, tokens, requests = input_batch.make_lora_inputs(num_scheduled_tokens, num_sampled_tokens)
        tokens = masked(tokens, num_scheduled_tokens, computed, points)
        self._set_active_loras(sampled, tokens, requests, *more, **named)

    LoRAModelRunnerMixin.set_active_loras = set_active_loras
    if runner := sys.modules.get(_V2_RUNNER):
        _leave_rows_bare_in_v2(runner.GPUModelRunner)


def _leave_rows_bare_in_v2(runner: Any) -> None:
    """Like `leave_rows_bare`, for vLLM's second model runner, which keeps slots in a `LoraState`."""
    from vllm.v1.worker.gpu.lora_utils import LoraState

    add, make, remove = runner.add_requests, LoraState.make_lora_inputs, LoraState.remove_request

    @functools.wraps(add)
    def add_requests(self: Any, scheduler_output: Any) -> None:
        add(self, scheduler_output)
        state = self.lora_state
        state._mtlora_computed = self.req_states.num_computed_tokens_np
        points: dict[str, int] = state.__dict__.setdefault("_mtlora_points", {})
        for new in scheduler_output.scheduled_new_reqs:
            if point := point_of(new.sampling_params, new.prompt_len):
                points[new.req_id] = point

    @functools.wraps(make)
    def make_lora_inputs(self: Any, req_ids: list[str], idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        sampled, tokens, requests = make(self, req_ids, idx_mapping, num_scheduled_tokens)
        if held := getattr(self, "_mtlora_points", None):
            points = {i: held[req_id] for i, req_id in enumerate(req_ids) if req_id in held}
            tokens = masked(tokens, num_scheduled_tokens, self._mtlora_computed[idx_mapping], points)
        return sampled, tokens, requests

    @functools.wraps(remove)
    def remove_request(self: Any, req_id: str) -> None:
        remove(self, req_id)
        getattr(self, "_mtlora_points", {}).pop(req_id, None)

    runner.add_requests = add_requests
    LoraState.make_lora_inputs = make_lora_inputs
    LoraState.remove_request = remove_request
