"""Loss and accuracy of held-out examples with their answers given: one forward pass per batch, no generation.

Shape suffixes: B sequences, A answer tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from mtlora.model.language import AdaptedModel
from mtlora.task import TaskSpec
from mtlora.train.data import Encoded, batches

_BATCH = 32


@torch.inference_mode()
def held_out(adapted: AdaptedModel, tasks: Sequence[TaskSpec], examples: Sequence[Encoded]) -> dict[str, Any]:
    """`loss`, the mean over all answer tokens; `accuracy_by_task`; and `accuracy`, their mean, 0 to 1.

    examples: at least one.

    Greedy decoding gives an answer whose every token is the most likely one after the tokens before it, so this is
    exact match. For tasks with working it is a lower bound: another working may lead to the same answer.
    """
    loss_sum, answer_tokens = 0.0, 0
    correct = [0] * len(tasks)
    total = [0] * len(tasks)
    for batch in batches(examples, _BATCH, documents=adapted.activated):
        logits_AV = adapted.answer_logits(
            batch.tokens_BL, batch.bias_index, batch.answer_rows_A, batch.documents, batch.images
        ).cpu()
        loss_sum += cross_entropy(logits_AV.float(), batch.answer_targets_A, reduction="sum").item()
        answer_tokens += len(batch.answer_targets_A)
        wrong_B = torch.zeros(len(batch.task_index_E))
        wrong_B.index_add_(0, batch.answer_owner_A, (logits_AV.argmax(-1) != batch.answer_targets_A).float())
        for task_index, wrong in zip(batch.task_index_E.tolist(), wrong_B.tolist(), strict=True):
            total[task_index] += 1
            correct[task_index] += wrong == 0
    accuracy = {task.id: round(c / t, 4) for task, c, t in zip(tasks, correct, total, strict=True) if t}
    return {
        "loss": round(loss_sum / answer_tokens, 5),
        "accuracy": round(sum(accuracy.values()) / len(accuracy), 4),
        "accuracy_by_task": accuracy,
    }
