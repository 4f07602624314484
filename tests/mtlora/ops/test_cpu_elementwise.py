"""The backbone's compiled operations, in every instruction set that this processor has, against torch in float64."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtlora.ops import cpu_elementwise
from tests.mtlora.ops.instruction_sets import KERNEL, every_set

pytestmark = pytest.mark.skipif(KERNEL is None, reason="the kernel is not built here")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SHAPES = {"rows": st.integers(1, 5), "size": st.integers(1, 70), "seed": st.integers(0, 2**31)}


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, roundings: int = 1) -> None:
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[found.dtype] * roundings
    torch.testing.assert_close(found.double(), expected.detach(), rtol=unit, atol=unit * 1e-2)


@every_set
@every_dtype
@given(**SHAPES)
@settings(max_examples=20)
def test_rms_norm_equals_torch(isa: int, dtype: torch.dtype, rows: int, size: int, seed: int) -> None:
    x, grad = randn(2, rows, size, seed=seed, dtype=dtype).unbind()
    weight = randn(size, seed=seed + 1, dtype=dtype)
    wide = x.double().requires_grad_()
    expected = torch.nn.functional.rms_norm(wide, (size,), weight.double(), 1e-2)
    out, inverse = cpu_elementwise.rms_norm(x, weight, 1e-2, isa)
    close(out, expected, roundings=2)
    close(inverse, (wide.square().mean(-1) + 1e-2).rsqrt())
    assert torch.equal(cpu_elementwise.norm(x, weight, 1e-2, isa), out)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    found = cpu_elementwise.rms_norm_backward(grad, x, weight, inverse, isa)
    atol = {torch.float32: 1e-4, torch.bfloat16: 2**-7}[dtype] * max(1.0, expected_grad.abs().max().item())
    torch.testing.assert_close(found.double(), expected_grad, rtol=0, atol=atol)


@every_dtype
@given(rows=st.integers(1, 5), size=st.integers(1, 300), held=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_masks_forbid_what_their_bits_leave_out(dtype: torch.dtype, rows: int, size: int, held: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    logits, held = randn(rows, size, seed=seed, dtype=dtype), min(rows, held)
    # Words of all zeros, of all ones and of both; bits beyond the vocabulary count for nothing.
    words = draws.choice([0, -1, 5, -5, int(draws.integers(-(2**31), 2**31))], (held, -(-size // 32) + 1))
    words = words.astype(np.int32)
    places = draws.permutation(rows)[:held].tolist()
    expected = logits.clone()
    for mask, place in zip(words, places, strict=True):
        for token in range(size):
            if not int(mask[token // 32]) >> token % 32 & 1:
                expected[place, token] = -torch.inf
    cpu_elementwise.mask_(logits, words, places)
    assert torch.equal(logits, expected)


def test_masks_of_other_sizes_are_refused() -> None:
    logits, words = torch.zeros(2, 65), np.zeros((1, 3), np.int32)
    cpu_elementwise.mask_(logits, words, [1])
    for bits, places in ((words[:, :2], [1]), (words, [0, 1]), (words, [2]), (words, [-1])):
        with pytest.raises(ValueError, match="expected a mask of 65 bits"):
            cpu_elementwise.mask_(logits, bits, places)


@every_set
@every_dtype
@given(**SHAPES)
@settings(max_examples=20)
def test_add_rms_norm_equals_torch(isa: int, dtype: torch.dtype, rows: int, size: int, seed: int) -> None:
    x, residual = randn(2, rows, size, seed=seed, dtype=dtype).unbind()
    weight = randn(size, seed=seed + 1, dtype=dtype)
    total = x.double() + residual.double()
    expected = torch.nn.functional.rms_norm(total, (size,), weight.double(), 1e-2)
    found, kept = cpu_elementwise.add_rms_norm_(x.clone(), residual.clone(), weight, 1e-2, isa)
    close(found, expected, roundings=2)
    # Rounded to nearest, as in torch.
    assert torch.equal(kept, x + residual)


@every_set
@every_dtype
@given(**SHAPES)
@example(rows=5, size=19, seed=18200486)  # a gate gradient near zero
@settings(max_examples=20)
def test_swiglu_equals_torch(isa: int, dtype: torch.dtype, rows: int, size: int, seed: int) -> None:
    gate, up, grad = randn(3, rows, size, seed=seed, dtype=dtype).unbind()
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    expected = torch.nn.functional.silu(leaves[0]) * leaves[1]
    close(cpu_elementwise.swiglu(gate, up, isa), expected)
    wanted_gate, wanted_up = torch.autograd.grad(expected, leaves, grad.double())
    found_gate, found_up = cpu_elementwise.swiglu_backward(grad, gate, up, isa)
    close(found_up, wanted_up)
    # 1 + gate (1 - sigmoid(gate)) passes through zero near -1.28: a rounding there is one of its terms.
    terms = (1 + gate.double().abs()) * (grad.double() * up.double()).abs()
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    rounding = torch.finfo(torch.float32).eps * terms
    assert ((found_gate.double() - wanted_gate).abs() <= unit * wanted_gate.abs() + unit * 1e-2 + rounding).all()
    side_by_side = torch.cat([gate, up], dim=-1)
    assert torch.equal(cpu_elementwise.silu_and_mul(side_by_side, isa), cpu_elementwise.swiglu(gate, up, isa))


@every_set
@every_dtype
@given(heads=st.integers(1, 4), length=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_causal_softmax_equals_torch(isa: int, dtype: torch.dtype, heads: int, length: int, seed: int) -> None:
    scores = randn(heads, length, length, seed=seed, dtype=dtype)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = (0.7 * scores.double()).masked_fill(future, float("-inf")).softmax(-1)
    # Values after the diagonal are never read.
    scores.masked_fill_(future, float("nan"))
    found = cpu_elementwise.causal_softmax_(scores, 0.7, isa)
    assert found is scores
    assert not found[:, future].any()
    close(found, expected)


@every_set
def test_softmax_and_swiglu_of_extreme_values(isa: int) -> None:
    scores = torch.full((1, 40, 40), -1e30)
    scores[0, :, 0] = 1e30
    assert torch.equal(cpu_elementwise.causal_softmax_(scores, 1.0, isa)[0, :, 0], torch.ones(40))
    scores = torch.zeros(1, 40, 40)
    scores[0, 20, 3] = float("nan")
    found = cpu_elementwise.causal_softmax_(scores, 1.0, isa)[0]
    assert found[20, :21].isnan().all()
    assert not found[torch.arange(40) != 20].isnan().any()
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4, float("nan")])
    found = cpu_elementwise.swiglu(gate, torch.ones(6), isa)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-30, equal_nan=True)


def test_runs_only_for_cpu_tensors_of_one_dtype() -> None:
    x = torch.zeros(3)
    assert cpu_elementwise.runs(x, x)
    assert not cpu_elementwise.runs(x, x.bfloat16())
    assert not cpu_elementwise.runs(x.double())
    assert not cpu_elementwise.runs(x.to("meta"))


def test_a_stale_library_is_logged_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_elementwise, "LAYOUT", cpu_elementwise.LAYOUT + 1)
    assert cpu_elementwise._library.__wrapped__() is None
    assert "is stale; install again" in caplog.text
