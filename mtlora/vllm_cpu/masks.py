"""On CPUs, mask logits in place, in one pass over the masks' words.

vLLM converts all logits to float32 and back, and xgrammar visits every forbidden token. A task's type mostly forbids
all of 49,000 tokens except a few.
"""

from typing import Any

import torch
from vllm.v1.worker import gpu_model_runner

from mtlora.ops import cpu_elementwise

_stock = gpu_model_runner.apply_grammar_bitmask


def mask_in_place() -> None:
    """Make the model runners of this process mask in place."""
    gpu_model_runner.apply_grammar_bitmask = _apply


def _apply(scheduler_output: Any, grammar_output: Any, input_batch: Any, logits: torch.Tensor) -> None:
    drafts = scheduler_output.scheduled_spec_decode_tokens
    if drafts or not logits.is_contiguous() or not cpu_elementwise.runs(logits):
        _stock(scheduler_output, grammar_output, input_batch, logits)
        return
    rows = {request_id: row for row, request_id in enumerate(input_batch.req_ids)}
    # A request may have left the batch since its mask was made.
    held = [i for i, each in enumerate(grammar_output.structured_output_request_ids) if each in rows]
    places = [rows[grammar_output.structured_output_request_ids[i]] for i in held]
    cpu_elementwise.mask_(logits, grammar_output.grammar_bitmask[held], places)
