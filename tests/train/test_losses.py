"""Losses against their formulas, written out with loops and full factorisations in float64."""

import itertools

import pytest
import torch

from mtlora.train.losses import answer_loss, balance_loss, spectral_gram, spectral_pairwise, spectral_weights


def experts(blocks: int, num_experts: int, d: int, r: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(blocks, num_experts, d, r, generator=generator, dtype=torch.float64)


def pairwise_by_formula(B: torch.Tensor) -> float:
    total = 0.0
    for block in B:
        weighted = []
        for expert in block:
            _, sigma, Vh = torch.linalg.svd(expert, full_matrices=False)
            weighted.append(expert @ Vh.T @ torch.diag(torch.exp(-sigma / sigma.mean())))
        total += sum(float((a.T @ b).square().sum()) for a, b in itertools.combinations(weighted, 2))
    return total / len(B)


def gram_by_formula(B: torch.Tensor) -> float:
    values = []
    for expert in B.flatten(0, 1):
        r = expert.shape[1]
        sigma = torch.linalg.svdvals(expert)
        w = torch.exp(-sigma / sigma.mean())
        s2 = float(expert.square().sum()) / r
        values.append(
            float(((expert.T @ expert - s2 * torch.eye(r, dtype=B.dtype)) * torch.outer(w, w)).square().sum())
        )
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("blocks", "num_experts", "d", "r"), [(1, 2, 6, 2), (3, 4, 12, 3), (2, 1, 5, 1), (2, 8, 16, 4)]
)
def test_spectral_losses_equal_their_formulas(blocks: int, num_experts: int, d: int, r: int) -> None:
    B = experts(blocks, num_experts, d, r)
    assert spectral_pairwise(B).item() == pytest.approx(pairwise_by_formula(B), rel=1e-9)
    assert spectral_gram(B).item() == pytest.approx(gram_by_formula(B), rel=1e-9)


def test_pairwise_is_zero_for_orthogonal_experts_and_pushes_weak_components_hardest() -> None:
    B = torch.zeros(1, 2, 8, 2, dtype=torch.float64)
    B[0, 0, 0, 0], B[0, 0, 1, 1], B[0, 1, 2, 0], B[0, 1, 3, 1] = 3.0, 0.1, 3.0, 0.1
    assert spectral_pairwise(B).item() == pytest.approx(0, abs=1e-15)
    # Let both experts share a direction, once by their strong and once by their weak component, by as much.
    strong, weak = B.clone(), B.clone()
    strong[0, 1, 0, 0], strong[0, 1, 2, 0] = 3.0, 0.0
    weak[0, 1, 1, 1], weak[0, 1, 3, 1] = 0.1, 0.0
    per_overlap = spectral_pairwise(strong) / 9.0**2, spectral_pairwise(weak) / 0.1**4
    assert per_overlap[1] > 5 * per_overlap[0]


def test_spectral_weights_are_constants_to_the_gradient_and_finite_at_zero() -> None:
    for loss in (spectral_pairwise, spectral_gram):
        B = torch.zeros(2, 3, 6, 2, requires_grad=True)
        loss(B).backward()
        assert torch.isfinite(B.grad).all()
    assert torch.equal(spectral_weights(torch.zeros(1, 1, 2)), torch.ones(1, 1, 2))


def test_balance_loss_is_the_squared_coefficient_of_variation() -> None:
    even, skewed = torch.full((2, 4), 0.25), torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert balance_loss([even, even]).item() == 0
    share = skewed[0].double()
    expected = float(share.var(correction=0) / share.mean() ** 2) / 2
    assert balance_loss([skewed]).item() == pytest.approx(expected, rel=1e-6)


def test_answer_loss_is_mean_negative_log_likelihood() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 6, 3, 3, 1])
    expected = -torch.log_softmax(logits.double(), -1)[torch.arange(5), targets].mean()
    assert answer_loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)
