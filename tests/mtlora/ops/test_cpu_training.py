"""The compiled kernel of training, in every instruction set of this processor, against torch ops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora.ops import cpu_training, training
from mtlora.ops.cpu_training import PathInputs, Saved
from mtlora.ops.training import path_with_gradients
from tests.mtlora.ops.instruction_sets import KERNEL, every_set

pytestmark = pytest.mark.skipif(KERNEL is None, reason="the kernel is not built here")
# Relative to the largest value: sums in float32, and one rounding of bfloat16 outputs.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3}

SHAPES = st.fixed_dictionaries(
    {
        "T": st.integers(1, 80), "E": st.integers(1, 40), "r": st.integers(1, 20), "N": st.integers(1, 9),
        "G": st.integers(1, 5), "biased": st.booleans(), "dropped": st.booleans(), "balanced": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)  # fmt: skip


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    atol = TOLERANCE[found.dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@given(shape=SHAPES)
@settings(max_examples=25)
def test_values_and_gradients_equal_torch_ops(isa: int, dtype: torch.dtype, shape: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(shape["seed"])

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    T, r, N, G = shape["T"], shape["r"], shape["N"], shape["G"]
    D = G * shape["E"]
    x_TD = randn(T, D).to(dtype)
    dropped_TD = (x_TD * (randn(T, D) > 0)).to(dtype) if shape["dropped"] else None
    parameters = [randn(r, D) / D**0.5, randn(N, D, r) / r**0.5, randn(G * N, D) / D**0.5]
    bias_TGN = randn(T, G, N) if shape["biased"] else None
    grad_TD, grad_weights_TGN = randn(T, D).to(dtype), randn(T, G, N) if shape["balanced"] else torch.zeros(T, G, N)
    wide = [None if t is None else t.double() for t in (x_TD, dropped_TD, *parameters, bias_TGN)]

    found = cpu_training.forward(PathInputs(x_TD, dropped_TD, *parameters, bias_TGN, G, 1.7), isa)
    expected = training._in_torch_ops(PathInputs(*wide, G, 1.7))
    needs = {"needs_x": True, "needs_dropped": shape["dropped"]}
    found += cpu_training.backward(
        grad_TD, grad_weights_TGN, Saved(x_TD, dropped_TD, *parameters, *found[1:]), 1.7, **needs, isa=isa
    )
    expected += training._backward_in_torch_ops(
        grad_TD.double(), grad_weights_TGN.double(), Saved(*wide[:-1], *expected[1:]), 1.7, **needs
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours, theirs)


def test_same_threads_give_same_bits_and_other_threads_close_values() -> None:
    generator = torch.Generator().manual_seed(0)
    x, A, B, R = (torch.randn(*s, generator=generator) for s in ((203, 48), (4, 48), (3, 48, 4), (6, 48)))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in (x, A, B, R)]
            out, _ = path_with_gradients(*leaves, None, num_groups=2, scaling=2.0)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    one, two, again, five = results
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    # A token's own values do not depend on the thread that computes them.
    assert torch.equal(one[0], five[0])
    assert torch.equal(one[1], five[1])
    for a, b in zip(one, five, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_token(dtype: torch.dtype) -> None:
    x, A, B, R = (torch.randn(*s) for s in ((20, 32), (4, 32), (3, 32, 4), (6, 32)))
    clean, _, _ = cpu_training.forward(PathInputs(x.to(dtype), None, A, B, R, None, 2, 1.0))
    x[5] = float("nan")
    found, _, _ = cpu_training.forward(PathInputs(x.to(dtype), None, A, B, R, None, 2, 1.0))
    others = torch.arange(20) != 5
    assert found[5].isnan().all()
    assert torch.equal(found[others], clean[others])


def test_a_stale_library_is_logged_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_training, "LAYOUT", cpu_training.LAYOUT + 1)
    assert cpu_training._library.__wrapped__() is None
    assert "is stale; install again" in caplog.text
