"""Measures a trained adapter: which experts tasks use, how experts differ, where tasks' gradients disagree.

Shape suffixes: T tasks, M blocks (or matrices), G groups, N experts, D hidden size, r rank, K = N*r, P parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtlora.adapter import AdapterSet, BlockAdapter
from mtlora.model.language import AdaptedModel
from mtlora.suite.base import Example
from mtlora.task import TaskSpec
from mtlora.train.data import Batch, collate, collate_documents, encode
from mtlora.train.losses import batch_loss

_EPSILON = 1e-12


@dataclass(frozen=True)
class Routing:
    """Routing of each task: the mean weights [T, M, G, N] of its tokens, and their mean entropy [T, M] in nats."""

    tasks: tuple[str, ...]
    blocks: tuple[str, ...]
    weights_TMGN: torch.Tensor
    token_entropy_TM: torch.Tensor

    def experts_of_a_token(self) -> torch.Tensor:
        """The effective number of experts, exp(entropy), that one token mixes in a group: [M]."""
        return self.token_entropy_TM.mean(0).exp()

    def experts_of_a_task(self) -> torch.Tensor:
        """The effective number of experts that one task uses in a group, over its tokens: [M]."""
        return entropy(self.weights_TMGN).mean((0, 2)).exp()

    def experts_of_all(self) -> torch.Tensor:
        """The effective number of experts that all tasks together use in a group: [M]."""
        return entropy(self.weights_TMGN.mean(0)).mean(1).exp()

    def between_tasks(self) -> torch.Tensor:
        """How differently tasks route: their Jensen-Shannon divergence as a share of its maximum, 0 to 1: [M]."""
        return _divergence(self.weights_TMGN, 0).mean(1)

    def between_groups(self) -> torch.Tensor:
        """The same measure between the groups of one task; 0 if all groups route alike: [M]."""
        return _divergence(self.weights_TMGN, 2).mean(0)


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension."""
    return -(weights * (weights + _EPSILON).log()).sum(-1)


def _divergence(weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Jensen-Shannon divergence between the distributions along `dim`, as a share of the largest possible."""
    largest = torch.tensor(float(min(weights.shape[dim], weights.shape[-1]))).log()
    found = entropy(weights.mean(dim)) - entropy(weights).mean(dim)
    return found.clamp_min(0) / largest if largest > 0 else torch.zeros_like(found)


def task_batches(
    adapted: AdaptedModel, tasks: Sequence[TaskSpec], examples: Mapping[str, Sequence[Example]]
) -> list[tuple[Batch, torch.Tensor]]:
    """Each task's examples as (batch, mask that is False for padding); task indices follow `tasks`.

    The mask is of all tokens [B*L], or of those with a path.
    """
    found = []
    for task in tasks:
        encoded = [each for _, each in encode(adapted.prompts, tasks, examples[task.id], max_length=1 << 20)]
        if adapted.activated:
            batch = collate_documents(encoded)
            found.append((batch, torch.ones(sum(len(e) - e.document_length for e in encoded), dtype=torch.bool)))
            continue
        batch = collate(encoded)
        lengths = torch.tensor([len(example) for example in encoded])
        mask = torch.arange(batch.tokens_BL.shape[1]) < lengths.unsqueeze(1)
        found.append((batch, mask.flatten()))
    return found


@torch.inference_mode()
def routing_by_task(
    adapted: AdaptedModel, tasks: Sequence[TaskSpec], examples: Mapping[str, Sequence[Example]]
) -> Routing:
    """How every block routes each task's tokens, of prompts and answers, without padding.

    The adapter comes from a checkpoint and is in evaluation mode. `tasks`: its task table in the order of the bias
    rows.
    """
    attached = adapted.adapters
    assert isinstance(attached, AdapterSet)
    blocks = {name: block for name, block in attached.named_modules() if isinstance(block, BlockAdapter)}
    weights: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    mask = torch.empty(0)

    def look(block: BlockAdapter, args: tuple[Any, ...]) -> None:
        weights_TGN = block.routing(args[0])[mask.to(args[0].device)]
        weights.append(weights_TGN.mean(0).cpu())
        entropies.append(entropy(weights_TGN).mean().cpu())

    handles = [block.register_forward_pre_hook(look) for block in blocks.values()]
    try:
        for batch, mask in task_batches(adapted, tasks, examples):  # noqa: B007 (read by `look`)
            adapted.answer_logits(batch.tokens_BL, batch.bias_index, batch.answer_rows_A, batch.documents)
    finally:
        for handle in handles:
            handle.remove()
    shape = len(tasks), len(blocks)
    return Routing(
        tuple(task.id for task in tasks),
        tuple(name.removeprefix("layers.") for name in blocks),
        torch.stack(weights).unflatten(0, shape),
        torch.stack(entropies).unflatten(0, shape),
    )


def task_gradients(
    adapted: AdaptedModel, tasks: Sequence[TaskSpec], examples: Mapping[str, Sequence[Example]]
) -> torch.Tensor:
    """The gradient of each task's answer loss in every parameter that tasks share (all but task biases): [T, P]."""
    attached = adapted.adapters
    shared = [p for name, p in attached.named_parameters() if not name.endswith("task_bias")]
    gradients = []
    for batch, _ in task_batches(adapted, tasks, examples):
        found = torch.autograd.grad(batch_loss(adapted, batch), shared, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, shared, strict=True)]
        gradients.append(torch.cat([g.flatten().cpu() for g in flat]))
    return torch.stack(gradients)


def cosines(vectors: torch.Tensor) -> torch.Tensor:
    """The cosine between every two rows; 0 for a row of zeros: [T, T]."""
    normed = torch.nn.functional.normalize(vectors, dim=1)
    return normed @ normed.T


@dataclass(frozen=True)
class Spectra:
    """The experts of every block: singular values in falling order [M, N, r], and the overlap [M] of their ranges.

    Overlap is the mean RV coefficient over pairs of experts, the cosine between B_i B_i^T and B_j B_j^T: 0 for experts
    that write into orthogonal ranges, 1 for experts that write into the same range with the same strengths.
    """

    sigma_MNr: torch.Tensor
    overlap_M: torch.Tensor

    def effective_rank(self) -> torch.Tensor:
        """Exp of the entropy of the squared singular values' shares; 0 for an expert of zeros: [M, N]."""
        squares = self.sigma_MNr.square()
        total = squares.sum(-1, keepdim=True)
        return torch.where(total.squeeze(-1) > 0, entropy(squares / (total + _EPSILON)).exp(), 0.0)


def spectra(experts_MNDr: torch.Tensor) -> Spectra:
    """Singular values and overlap of the experts [M, N, D, r]."""
    M, N, D, r = experts_MNDr.shape
    sigma_MNr = torch.linalg.svdvals(experts_MNDr.float())
    flat_MDK = experts_MNDr.float().transpose(1, 2).reshape(M, D, N * r)
    gram_MNN = (flat_MDK.transpose(1, 2) @ flat_MDK).square().view(M, N, r, N, r).sum((2, 4))
    own_MN = gram_MNN.diagonal(dim1=1, dim2=2)
    ratio_MNN = gram_MNN / (own_MN.unsqueeze(1) * own_MN.unsqueeze(2)).sqrt().clamp_min(1e-30)
    pairs = max(1, N * (N - 1))
    overlap_M = (ratio_MNN.sum((1, 2)) - ratio_MNN.diagonal(dim1=1, dim2=2).sum(1)) / pairs
    return Spectra(sigma_MNr, overlap_M)
