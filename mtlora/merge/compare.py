"""Compares old tasks' logits before and after a merge.

Shape suffixes: B sequences or images, L positions, A compared positions, V vocabulary or a task's classes, S pixels of
a side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mtlora.adapter import AdapterSet
from mtlora.checkpoint.format import Checkpoint
from mtlora.evaluation.images import pixels
from mtlora.model.language import AdaptedModel, load_adapted_model
from mtlora.model.vision import AdaptedEncoder, load_adapted_encoder
from mtlora.suite.base import Example
from mtlora.train.data import Encoded, collate, collate_documents

# (task, token ids, how many of them belong to the document)
_Prompt = tuple[str, list[int], int]
_COMPARED_PROMPTS = 128
_COMPARED_AT_ONCE = 8


@dataclass(frozen=True)
class Comparison:
    """Old tasks' float32 logits before and after: their number, how many differ, and the largest difference.

    prompts: the number of inputs, prompts or images.
    """

    tasks: int
    prompts: int
    logits: int
    differing: int
    largest_difference: float
    largest_logit: float

    @property
    def identical(self) -> bool:
        """Whether all bits are equal."""
        return self.differing == 0


@torch.inference_mode()
def compare(folder: Path, before: Checkpoint, after: Checkpoint, texts: Sequence[str]) -> Comparison:
    """Compare two adapters' logits for every old task, on its prompts for `texts`, at every position."""
    old = load_adapted_model(folder, before, torch.float32)
    adapters = _attached(after, old)
    new = AdaptedModel(old.model, old.tokenizer, adapters, old.backbone)
    per_task = max(1, min(len(texts), _COMPARED_PROMPTS // len(before.manifest.tasks)))
    prompts = [
        (task.id, *old.prompts.parts(task.parts(dict.fromkeys(task.fields, text))))
        for task in before.manifest.tasks
        for text in texts[:per_task]
    ]
    prompts.sort(key=lambda prompt: len(prompt[1]))

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(prompts), _COMPARED_AT_ONCE):
            batch = prompts[start : start + _COMPARED_AT_ONCE]
            with adapters.context.backbone_alone():
                expected_AV = _logits(old, before, batch)
            with old.adapters.context.backbone_alone():
                yield expected_AV, _logits(new, after, batch)

    return _compared(len(before.manifest.tasks), len(prompts), pairs())


# Not inference mode: the encoder keeps its interpolated positions by their version, which tensors made there lack.
@torch.no_grad()
def compare_images(folder: Path, before: Checkpoint, after: Checkpoint, examples: Sequence[Example]) -> Comparison:
    """Like `compare`, for the class logits of every old task on these images."""
    old = load_adapted_encoder(folder, before, torch.float32)
    adapters = _attached(after, old)
    new = replace(old, adapters=adapters)

    def logits(
        adapted: AdaptedEncoder, checkpoint: Checkpoint, task_id: str, pixels_BCSS: torch.Tensor
    ) -> torch.Tensor:
        task = checkpoint.manifest.task(task_id)
        assert task.image is not None
        features_BF = adapted.features(
            pixels_BCSS, torch.full((len(pixels_BCSS),), task.bias_index or 0), task.image.pooling
        )
        weight_VF, bias_V = checkpoint.head(task_id)
        return features_BF @ weight_VF.float().T + bias_V.float()

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for task in before.manifest.tasks:
            pixels_BCSS = torch.stack([pixels(old, task, example) for example in examples])
            with adapters.context.backbone_alone():
                expected_BV = logits(old, before, task.id, pixels_BCSS)
            with old.adapters.context.backbone_alone():
                yield expected_BV, logits(new, after, task.id, pixels_BCSS)

    tasks = len(before.manifest.tasks)
    return _compared(tasks, tasks * len(examples), pairs())


def _attached(checkpoint: Checkpoint, old: AdaptedModel | AdaptedEncoder) -> AdapterSet:
    """Attach a checkpoint's adapter to a backbone that already has another one."""
    manifest, backbone = checkpoint.manifest, old.backbone
    adapters = AdapterSet(manifest.config, backbone.hidden_size, backbone.num_layers, len(manifest.tasks))
    adapters.load_state_dict({name: tensor.float() for name, tensor in checkpoint.paths.items()})
    adapters.eval().attach(old.model)
    return adapters


def _compared(tasks: int, prompts: int, pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Comparison:
    """Compare pairs of logits before and after."""
    logits, differing, difference, largest = 0, 0, 0.0, 0.0
    for expected_AV, found_AV in pairs:
        logits += expected_AV.numel()
        differing += int((expected_AV.view(torch.int32) != found_AV.view(torch.int32)).sum())
        difference = max(difference, (expected_AV - found_AV).abs().max().item())
        largest = max(largest, expected_AV.abs().max().item())
    return Comparison(tasks, prompts, logits, differing, difference, largest)


def _logits(adapted: AdaptedModel, checkpoint: Checkpoint, prompts: Sequence[_Prompt]) -> torch.Tensor:
    """Logits at every position; of an activated adapter, only from the task's part on, where it acts."""
    examples = []
    for task_id, ids, document_length in prompts:
        row, own = checkpoint.manifest.task(task_id).bias_index or 0, document_length if adapted.activated else 0
        # Append a token, which no earlier position attends to, so that every earlier position has a next one.
        examples.append(Encoded(row, tuple(ids[: own + 1]), (*ids[own + 1 :], 0), own))
    batch = collate_documents(examples) if adapted.activated else collate(examples)
    return adapted.answer_logits(batch.tokens_BL, batch.bias_index, batch.answer_rows_A, batch.documents)
