"""The training losses: of the answer's tokens, the routers' balance, and the experts' spectra.

Shape suffixes: M matrices (blocks), N experts, D hidden size, r rank, G groups, A answer tokens, R of them at
a time, V vocabulary, K = N*r.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mtlora.model.language import AdaptedModel
from mtlora.train.data import Batch

_EPSILON = 1e-12
# Elements of the logits computed at a time: 8 MiB in float32, which stay in a core's caches.
_LOSS_ELEMENTS = 2**21


def answer_loss(states_AD: torch.Tensor, head: nn.Linear, targets_A: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over answer tokens, in float32; differentiable in the hidden states (the head is frozen).

    head: D to the vocabulary. targets_A: int64. The logits, in the states' dtype, are the only tensor [A, V]: their
    gradient overwrites them a few rows at a time, as in Liger Kernel's fused linear cross-entropy (arXiv 2410.10989,
    section 3.2).
    """
    loss: torch.Tensor = _AnswerLoss.apply(states_AD, head.weight, head.bias, targets_A)
    return loss


def batch_loss(adapted: AdaptedModel, batch: Batch) -> torch.Tensor:
    """`answer_loss` of a batch, on the model's device."""
    states_AD = adapted.answer_states(
        batch.tokens_BL, batch.bias_index, batch.answer_rows_A, batch.documents, batch.images
    )
    return answer_loss(states_AD, adapted.model.lm_head, batch.answer_targets_A.to(states_AD.device))


class _AnswerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_AD: torch.Tensor, head_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_A: torch.Tensor
    ) -> torch.Tensor:
        logits_AV = nn.functional.linear(states_AD, head_VD, bias_V)
        (A, V), wanted = logits_AV.shape, ctx.needs_input_grad[0]
        loss = torch.zeros((), dtype=torch.float32, device=logits_AV.device)
        rows = max(1, _LOSS_ELEMENTS // V)
        for logits_RV, targets_R in zip(logits_AV.split(rows), targets_A.split(rows), strict=True):
            logs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
            loss -= logs_RV.gather(1, targets_R[:, None]).sum()
            if wanted:
                grad_RV = logs_RV.exp_()
                grad_RV.scatter_add_(1, targets_R[:, None], grad_RV.new_full((len(targets_R), 1), -1.0))
                logits_RV.copy_(grad_RV.mul_(1 / A))
        if wanted:
            ctx.save_for_backward(logits_AV @ head_VD)
        return loss / A

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad_states_AD,) = ctx.saved_tensors
        return grad_states_AD * grads[0].to(grad_states_AD.dtype), None, None, None


def balance_loss(mean_routing: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared coefficient of variation of the mean routing weights [G, N], over experts; mean over groups and blocks.

    Zero if every expert gets the same share. From the authors' code, which weights it 0.01.
    """
    routing_MGN = torch.stack(list(mean_routing))
    variation = routing_MGN.var(dim=-1, correction=0) / (routing_MGN.mean(dim=-1) ** 2 + _EPSILON)
    return variation.mean()


@torch.no_grad()
def _spectra(gram_MNrr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values [M, N, r] and right singular vectors [M, N, r, r] of experts, from their Gram matrices B^T B.

    Returned without gradient. From the Gram matrix, a rank-16 expert needs only a 16 x 16 factorisation.
    """
    squares, vectors = torch.linalg.eigh(gram_MNrr)
    return squares.clamp_min(0).sqrt(), vectors


class _Gram(torch.autograd.Function):
    """X^T X of a batch. Its gradient needs one product; autograd's needs two, because it ignores the symmetry."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.transpose(-1, -2) @ x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return x @ (grads[0] + grads[0].transpose(-1, -2))


def spectral_weights(sigma_MNr: torch.Tensor) -> torch.Tensor:
    """w(sigma) = exp(-sigma / mean sigma of the matrix): near 1 for weak components, near 0 for strong, shared ones."""
    return torch.exp(-sigma_MNr / (sigma_MNr.mean(dim=-1, keepdim=True) + _EPSILON))


def spectral_pairwise(B_MNDr: torch.Tensor) -> torch.Tensor:
    """Between experts, as the paper writes it: sum_{i<j} ||(B_i V_i W_i)^T (B_j V_j W_j)||_F^2, mean over matrices.

    Computed from the products B_i^T B_j; V and W are constants, so no weighted expert is needed.
    """
    M, N, D, r = B_MNDr.shape
    gram_MKK = _Gram.apply(B_MNDr.transpose(1, 2).reshape(M, D, N * r))
    own_MNrr = gram_MKK.view(M, N, r, N, r).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    sigma_MNr, vectors_MNrr = _spectra(own_MNrr)
    turn_MNrr = (vectors_MNrr * spectral_weights(sigma_MNr).unsqueeze(-2)).transpose(-1, -2)
    for _ in range(2):  # the rows, then, transposed, the columns
        gram_MKK = (turn_MNrr @ gram_MKK.transpose(1, 2).reshape(M, N, r, N * r)).view(M, N * r, N * r)
    between_KK = torch.block_diag(*[torch.ones(r, r, device=gram_MKK.device)] * N) == 0
    return 0.5 * (gram_MKK**2 * between_KK).sum() / M


def spectral_gram(B_MNDr: torch.Tensor) -> torch.Tensor:
    """Within an expert, as in the authors' code: ||(B_i^T B_i - s^2 I) o w w^T||_F^2, s^2 = ||B_i||_F^2 / r.

    The weights follow the singular values in falling order. Mean over matrices and experts.
    """
    r = B_MNDr.shape[-1]
    gram_MNrr = _Gram.apply(B_MNDr)
    sigma_MNr, _ = _spectra(gram_MNrr)
    w_MNr = spectral_weights(sigma_MNr.flip(-1))
    scale_MN = B_MNDr.square().sum(dim=(-1, -2)) / r
    target_MNrr = scale_MN[..., None, None] * torch.eye(r, device=B_MNDr.device)
    return (((gram_MNrr - target_MNrr) * (w_MNr.unsqueeze(-1) * w_MNr.unsqueeze(-2))) ** 2).sum(dim=(-1, -2)).mean()


SPECTRAL_LOSSES = {"pairwise": spectral_pairwise, "gram": spectral_gram}
