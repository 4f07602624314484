"""Greedy answers from a Hugging Face model and its adapter: the offline counterpart of the server.

Shape suffixes: B sequences, L positions, S positions of documents, U documents.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from mtlora.checkpoint.format import TaskEntry
from mtlora.model.language import AdaptedModel, Placed


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(text up to the first stop string, whether there was one)."""
    positions = [position for stop in stops if (position := text.find(stop)) >= 0]
    return (text[: min(positions)], True) if positions else (text, False)


class Prompt(NamedTuple):
    """Token ids, of which the first `document_length` belong to the document; image: see `Encoded`."""

    ids: Sequence[int]
    document_length: int = 0
    image: Placed | None = None


def _left_padded(rows: Sequence[Sequence[int]], padding: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B, L], mask [B, L] that is 0 for padding)."""
    length = max(map(len, rows))
    tokens_BL = torch.full((len(rows), length), padding, device=device)
    mask_BL = torch.zeros(len(rows), length, dtype=torch.int64, device=device)
    for b, row in enumerate(rows):
        if row:
            tokens_BL[b, -len(row) :] = torch.tensor(row, device=device)
            mask_BL[b, -len(row) :] = 1
    return tokens_BL, mask_BL


def read_documents(adapted: AdaptedModel, prompts: Sequence[Prompt]) -> tuple[Any, torch.Tensor, list[Sequence[int]]]:
    """(cache, mask [B, S], what follows): each distinct document, read once by the backbone alone, in a row a prompt.

    Without an activated adapter, or without documents, the cache is None, S is 0, and whole prompts follow.
    """
    device = adapted.model.device
    if not adapted.activated or not all(prompt.document_length for prompt in prompts):
        return None, torch.zeros(len(prompts), 0, dtype=torch.int64, device=device), [prompt.ids for prompt in prompts]
    documents = [tuple(prompt.ids[: prompt.document_length]) for prompt in prompts]
    distinct = {document: u for u, document in enumerate(dict.fromkeys(documents))}
    tokens_US, mask_US = _left_padded(list(distinct), 0, device)
    positions_US = (mask_US.cumsum(-1) - 1).clamp_min(0)
    cache = adapted.read(tokens_US, attention_mask=mask_US, position_ids=positions_US)
    document_B = torch.tensor([distinct[document] for document in documents], device=device)
    cache.batch_select_indices(document_B)
    return cache, mask_US[document_B], [prompt.ids[prompt.document_length :] for prompt in prompts]


@torch.inference_mode()
def greedy_tokens(
    adapted: AdaptedModel, tasks: Sequence[TaskEntry], prompts: Sequence[Prompt], *, with_adapter: bool = True
) -> list[list[int]]:
    """The tokens after each prompt, up to a stop string of its task, its max_new_tokens or the end-of-sequence token.

    Includes the stop string, but not the end-of-sequence token.
    """
    tokenizer, model = adapted.tokenizer, adapted.model
    eos, device = tokenizer.eos_token_id, model.device
    bias_index_B = torch.tensor([task.bias_index or 0 for task in tasks], device=device)
    cache, read_BS, rest = read_documents(adapted, prompts)
    tokens_BL, own_BL = _left_padded(rest, eos, device)
    mask_BL = torch.cat([read_BS, own_BL], dim=1)
    generated: list[list[int]] = [[] for _ in prompts]
    # The sequence in each row. Once at most half of a batch is unfinished, only those sequences go on.
    rows = list(range(len(prompts)))
    going = set(rows)
    positions_BL = (mask_BL.cumsum(-1) - 1).clamp_min(0)[:, read_BS.shape[1] :]
    L = tokens_BL.shape[1]
    images = [
        each.image._replace(at=(b + 1) * L - len(each.ids) + each.image.at)
        for b, each in enumerate(prompts)
        if each.image
    ]
    inputs: dict[str, Any] = {**adapted.inputs(tokens_BL, images), "position_ids": positions_BL}
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
    adapted: AdaptedModel, tasks: Sequence[TaskEntry], prompts: Sequence[Prompt], *, with_adapter: bool = True
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
