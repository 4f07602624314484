"""Losses against their formulas, written out with loops and full factorisations in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch

from mtlora.train import losses
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


@pytest.mark.parametrize("loss", [spectral_pairwise, spectral_gram])
def test_spectral_gradients_treat_weights_as_constants(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
    B = experts(2, 3, 6, 2).requires_grad_()
    (found,) = torch.autograd.grad(loss(B), [B])
    grams = B.detach().transpose(-1, -2) @ B.detach()
    sigma, V = (torch.linalg.eigh(grams)[0].sqrt(), torch.linalg.eigh(grams)[1])
    w = torch.exp(-sigma / sigma.mean(-1, keepdim=True))
    if loss is spectral_pairwise:
        weighted = B @ (V * w.unsqueeze(-2))
        pairs = itertools.combinations(range(3), 2)
        expected = sum((weighted[:, i].transpose(1, 2) @ weighted[:, j]).square().sum() for i, j in pairs) / 2
    else:
        gram = B.transpose(-1, -2) @ B
        scale = B.square().sum(dim=(-1, -2), keepdim=True) / 2
        w = w.flip(-1)
        outer = w.unsqueeze(-1) * w.unsqueeze(-2)
        expected = ((gram - scale * torch.eye(2, dtype=B.dtype)) * outer).square().sum(dim=(-1, -2)).mean()
    torch.testing.assert_close(found, torch.autograd.grad(expected, [B])[0], rtol=1e-9, atol=1e-9)


def test_pairwise_is_zero_for_orthogonal_experts_and_pushes_weak_components_hardest() -> None:
    B = torch.zeros(1, 2, 8, 2, dtype=torch.float64)
    B[0, 0, 0, 0], B[0, 0, 1, 1], B[0, 1, 2, 0], B[0, 1, 3, 1] = 3.0, 0.1, 3.0, 0.1
    assert spectral_pairwise(B).item() == pytest.approx(0, abs=1e-15)
    # Both experts share a direction, once in their strong and once in their weak component, equally.
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


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_answer_loss_and_gradient_equal_torch(
    monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int, biased: bool
) -> None:
    monkeypatch.setattr(losses, "_LOSS_ELEMENTS", 7 * rows_at_a_time)
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 7, bias=biased).requires_grad_(False)
    states, targets = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 6, 3, 3, 1])
    wide = states.detach().double().requires_grad_()
    expected = -torch.log_softmax(head.double()(wide), -1)[torch.arange(5), targets].mean()
    loss = answer_loss(states, head.float(), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(states.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert answer_loss(states, head, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_answer_loss_in_bfloat16_equals_autograd() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).bfloat16().requires_grad_(False)
    states, targets = torch.randn(6, 8).bfloat16().requires_grad_(), torch.randint(50, (6,))
    loss = answer_loss(states, head, targets)
    expected = torch.nn.functional.cross_entropy(head(states).float(), targets)
    (found,), (wanted,) = (torch.autograd.grad(value, [states]) for value in (loss, expected))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-4)
