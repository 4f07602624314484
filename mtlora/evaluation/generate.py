"""Greedy answers from a Hugging Face model and its adapter: the offline counterpart of the server.

Shape suffixes: B sequences, L positions.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from mtlora.checkpoint.format import TaskEntry
from mtlora.model import AdaptedModel


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(text up to the first stop string, whether there was one)."""
    positions = [position for stop in stops if (position := text.find(stop)) >= 0]
    return (text[: min(positions)], True) if positions else (text, False)


@torch.inference_mode()
def greedy_tokens(
    adapted: AdaptedModel, tasks: Sequence[TaskEntry], prompts: Sequence[Sequence[int]], *, with_adapter: bool = True
) -> list[list[int]]:
    """What follows each prompt, up to a stop string of its task, its max_new_tokens or the end-of-sequence token.

    Includes the stop string, but not the end-of-sequence token.
    """
    tokenizer, model = adapted.tokenizer, adapted.model
    length, eos = max(len(prompt) for prompt in prompts), tokenizer.eos_token_id
    device = model.device
    bias_index_B = torch.tensor([task.bias_index or 0 for task in tasks], device=device)
    tokens_BL = torch.full((len(prompts), length), eos, device=device)
    mask_BL = torch.zeros(len(prompts), length, dtype=torch.int64, device=device)
    for b, prompt in enumerate(prompts):
        tokens_BL[b, length - len(prompt) :] = torch.tensor(prompt, device=device)
        mask_BL[b, length - len(prompt) :] = 1
    generated: list[list[int]] = [[] for _ in prompts]
    # The sequence in each row. Once at most half of a batch is unfinished, only those sequences go on.
    rows = list(range(len(prompts)))
    going = set(rows)
    inputs: dict[str, Any] = {"input_ids": tokens_BL, "position_ids": (mask_BL.cumsum(-1) - 1).clamp_min(0)}
    cache: Any = None
    context = adapted.adapters.context
    with nullcontext() if with_adapter else context.backbone_alone():
        while going:
            with context.use(bias_index_B[rows]):
                out = model(**inputs, attention_mask=mask_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            next_B = out.logits[:, -1].argmax(-1)
            for b, token in zip(rows, next_B.tolist(), strict=True):
                if b not in going:
                    continue
                if token != eos:
                    generated[b].append(token)
                _, stopped = cut_at_stop(tokenizer.decode(generated[b]), tasks[b].stop)
                if token == eos or stopped or len(generated[b]) >= tasks[b].max_new_tokens:
                    going.discard(b)
            if going and 2 * len(going) <= len(rows):
                kept = torch.tensor([i for i, b in enumerate(rows) if b in going])
                cache.batch_select_indices(kept)
                next_B, mask_BL, rows = next_B[kept], mask_BL[kept], [b for b in rows if b in going]
            inputs = {"input_ids": next_B[:, None], "position_ids": mask_BL.sum(-1, keepdim=True)}
            mask_BL = torch.nn.functional.pad(mask_BL, (0, 1), value=1)
    return generated


def greedy_answers(
    adapted: AdaptedModel, tasks: Sequence[TaskEntry], prompts: Sequence[Sequence[int]], *, with_adapter: bool = True
) -> list[str]:
    """One answer per prompt: `greedy_tokens` as text, without the stop string.

    Leaves out working before the task's answer marker. The backbone alone knows no marker, so its whole text counts.
    """
    generated = greedy_tokens(adapted, tasks, prompts, with_adapter=with_adapter)
    texts = [
        cut_at_stop(adapted.tokenizer.decode(ids, skip_special_tokens=True), task.stop)[0]
        for ids, task in zip(generated, tasks, strict=True)
    ]
    if not with_adapter:
        return [text.strip() for text in texts]
    return [task.final_answer(text) for text, task in zip(texts, tasks, strict=True)]
