"""Old tasks' logits before and after a merge.

Shape suffixes: B sequences, L positions, A compared positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mtlora.adapter import AdapterSet
from mtlora.checkpoint.format import Checkpoint
from mtlora.model import AdaptedModel, load_adapted_model
from mtlora.train.data import Encoded, collate, collate_documents

# Task, token ids, how many of them are the document's.
_Prompt = tuple[str, list[int], int]
_COMPARED_PROMPTS = 128
_COMPARED_AT_ONCE = 8


@dataclass(frozen=True)
class Comparison:
    """Old tasks' logits before and after, in float32: how many there are, how many differ, and by how much at most."""

    tasks: int
    prompts: int
    logits: int
    differing: int
    largest_difference: float
    largest_logit: float

    @property
    def identical(self) -> bool:
        """Whether every bit is the same."""
        return self.differing == 0


@torch.inference_mode()
def compare(folder: Path, before: Checkpoint, after: Checkpoint, texts: Sequence[str]) -> Comparison:
    """Compare two adapters' logits for every old task, on its prompts for `texts`, at every position."""
    old = load_adapted_model(folder, before, torch.float32)
    adapters = AdapterSet(
        after.manifest.config, old.backbone.hidden_size, old.backbone.num_layers, len(after.manifest.tasks)
    )
    adapters.load_state_dict({name: tensor.float() for name, tensor in after.tensors.items()})
    adapters.eval().attach(old.model)
    new = AdaptedModel(old.model, old.tokenizer, adapters, old.backbone)
    per_task = max(1, min(len(texts), _COMPARED_PROMPTS // len(before.manifest.tasks)))
    prompts = [
        (task.id, *old.prompts.parts(task.parts(dict.fromkeys(task.fields, text))))
        for task in before.manifest.tasks
        for text in texts[:per_task]
    ]
    prompts.sort(key=lambda prompt: len(prompt[1]))
    logits, differing, difference, largest = 0, 0, 0.0, 0.0
    for start in range(0, len(prompts), _COMPARED_AT_ONCE):
        batch = prompts[start : start + _COMPARED_AT_ONCE]
        with adapters.context.backbone_alone():
            expected_AV = _logits(old, before, batch)
        with old.adapters.context.backbone_alone():
            found_AV = _logits(new, after, batch)
        logits += expected_AV.numel()
        differing += int((expected_AV.view(torch.int32) != found_AV.view(torch.int32)).sum())
        difference = max(difference, (expected_AV - found_AV).abs().max().item())
        largest = max(largest, expected_AV.abs().max().item())
    return Comparison(len(before.manifest.tasks), len(prompts), logits, differing, difference, largest)


def _logits(adapted: AdaptedModel, checkpoint: Checkpoint, prompts: Sequence[_Prompt]) -> torch.Tensor:
    """Logits at every position; of an activated adapter, from the task's part on: those before are the backbone's."""
    examples = []
    for task_id, ids, document_length in prompts:
        row, own = checkpoint.manifest.task(task_id).bias_index or 0, document_length if adapted.activated else 0
        # A last token that nothing sees, so that every position before has a next one.
        examples.append(Encoded(row, tuple(ids[: own + 1]), (*ids[own + 1 :], 0), own))
    batch = collate_documents(examples) if adapted.activated else collate(examples)
    return adapted.answer_logits(batch.tokens_BL, batch.bias_index, batch.answer_rows_A, batch.documents)
