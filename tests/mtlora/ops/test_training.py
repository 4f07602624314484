"""The training operator against autograd through the reference, and by finite differences."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ops.layer import expert_loop, peak_bytes, training_variants
from mtlora.ops import cpu_training
from mtlora.ops.reference import routed_lora_reference
from mtlora.ops.training import path_with_gradients

SHAPES = st.fixed_dictionaries(
    {
        "T": st.integers(1, 6), "E": st.integers(1, 5), "r": st.integers(1, 4), "N": st.integers(1, 5),
        "G": st.integers(1, 4), "biased": st.booleans(), "seed": st.integers(0, 2**31),
    }
)  # fmt: skip


def inputs(shape: dict[str, int], dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
    """x, A, B, R and a bias per token (or None), all leaves."""
    generator = torch.Generator().manual_seed(shape["seed"])
    T, r, N, G = shape["T"], shape["r"], shape["N"], shape["G"]
    D = G * shape["E"]

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()

    return [leaf(T, D), leaf(r, D), leaf(N, D, r), leaf(G * N, D), leaf(T, G, N) if shape["biased"] else None]


@given(shape=SHAPES)
@settings(max_examples=30)
def test_values_and_gradients_equal_the_reference(shape: dict[str, int]) -> None:
    tensors = inputs(shape)
    wanted = [t for t in tensors if t is not None]
    found, weights = path_with_gradients(*tensors, num_groups=shape["G"], scaling=1.7)
    expected = routed_lora_reference(*tensors, num_groups=shape["G"], scaling=1.7)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    probe = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, wanted, probe), torch.autograd.grad(expected, wanted, probe), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropped", [False, True])
def test_gradients_equal_finite_differences(dropped: bool) -> None:
    tensors = inputs({"T": 3, "E": 2, "r": 2, "N": 3, "G": 2, "biased": True, "seed": 0})
    if dropped:
        tensors.append(torch.randn(3, 4, dtype=torch.float64, requires_grad=True))

    def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        extra = {"dropped_TD": leaves[5]} if dropped else {}
        return path_with_gradients(*leaves[:5], num_groups=2, scaling=1.3, **extra)

    assert torch.autograd.gradcheck(run, tensors)


def test_float32_equals_the_authors_loop() -> None:
    x, A, B, R, _ = inputs({"T": 32, "E": 24, "r": 8, "N": 4, "G": 3, "biased": False, "seed": 1}, torch.float32)
    ours, _ = path_with_gradients(x, A, B, R, None, num_groups=3, scaling=2.0)
    loop = expert_loop(x, A, B, R, 3, 2.0)
    assert (ours - loop).norm() / loop.norm() < 1e-5
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), [x, A, B, R]),
        torch.autograd.grad(loop.square().sum(), [x, A, B, R]),
        strict=True,
    ):
        assert (a - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize("compiled", [True, False])
def test_accepts_an_input_of_less_precision_than_the_parameters(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(cpu_training, "runs", lambda *tensors: False)
    x, A, B, R, bias = inputs({"T": 9, "E": 8, "r": 4, "N": 3, "G": 2, "biased": True, "seed": 1}, torch.float32)
    x = x.detach().bfloat16().requires_grad_()
    dropped = (x.detach() * 1.5).requires_grad_()
    out, weights = path_with_gradients(x, A, B, R, bias, num_groups=2, scaling=2.0, dropped_TD=dropped)
    assert (out.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (x, A, B, R, bias, dropped)]
    expected, expected_weights = path_with_gradients(*wide[:5], num_groups=2, scaling=2.0, dropped_TD=wide[5])
    close = partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2, check_dtype=False)
    close(out, expected)
    probes = torch.ones_like(expected), torch.randn_like(expected_weights)
    found = torch.autograd.grad(
        [out, weights], [x, A, B, R, bias, dropped], [p.to(t) for p, t in zip(probes, (out, weights), strict=True)]
    )
    for ours, theirs in zip(found, torch.autograd.grad([expected, expected_weights], wide, probes), strict=True):
        close(ours, theirs)
    assert [t.dtype for t in found] == [torch.bfloat16, *[torch.float32] * 4, torch.bfloat16]


def test_computes_only_the_gradients_needed() -> None:
    x, A, B, R, _ = inputs({"T": 4, "E": 2, "r": 2, "N": 2, "G": 2, "biased": False, "seed": 2})
    frozen = x.detach()
    out, _ = path_with_gradients(frozen, A, B, R, None, num_groups=2, scaling=1.0)
    out.sum().backward()
    assert frozen.grad is None
    assert all(t.grad is not None for t in (A, B, R))


@pytest.mark.slow
def test_traces_and_compiles() -> None:
    x, A, B, R, bias = inputs({"T": 3, "E": 2, "r": 2, "N": 3, "G": 4, "biased": True, "seed": 3})
    torch.library.opcheck(torch.ops.mtlora.path_with_gradients.default, (x, None, A, B, R, bias, 4, 1.5))


def test_keeps_less_memory_than_the_authors_loop() -> None:
    ours, loop = (peak_bytes(run) for run in training_variants().values())
    assert ours <= loop / 4


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (1, lambda t: t[:, :-1], "lora_A must be"),
        (2, lambda t: t.float(), "lora_B is torch.float32, lora_A torch.float64"),
        (0, lambda t: t.long(), "x must be of a floating dtype"),
        (3, lambda t: t[1:], "lora_route must be"),
        (4, lambda t: t[:, :1], "bias must be"),
        (2, lambda t: t.to("meta"), "lora_B is on meta"),
        (0, lambda t: t[None], "x must be"),
    ],
)
def test_refuses_wrong_shapes_and_dtypes(position: int, change, message: str) -> None:
    tensors = inputs({"T": 3, "E": 3, "r": 2, "N": 2, "G": 2, "biased": True, "seed": 0})
    tensors[position] = change(tensors[position])
    with pytest.raises(ValueError, match=message):
        path_with_gradients(*tensors, num_groups=2, scaling=1.0)


def test_refuses_groups_that_do_not_divide() -> None:
    tensors = inputs({"T": 3, "E": 3, "r": 2, "N": 2, "G": 2, "biased": False, "seed": 0})
    with pytest.raises(ValueError, match="num_groups 4 does not divide the hidden size 6"):
        path_with_gradients(*tensors, num_groups=4, scaling=1.0)
