"""The CPU backend, compiled and in torch ops, against the oracle."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu.cases import SHAPE_CLASSES, Batch, Case, Shape, random_rows
from mtlora.ops import cpu, cpu_kernel
from mtlora.ops.table import Layout
from tests.mtlora.ops.instruction_sets import KERNEL, lacks

BACKENDS = {"torch": cpu.in_torch_ops, "best": cpu.add_mixed_paths_}
if KERNEL is not None:
    BACKENDS |= {name: partial(cpu.run_kernel, KERNEL, isa) for name, isa in cpu_kernel.INSTRUCTION_SETS.items()}

every_backend = pytest.mark.parametrize(
    "backend", ["torch", "best", *(pytest.param(name, marks=lacks(name)) for name in cpu_kernel.INSTRUCTION_SETS)]
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any adapters of one hidden size, and any rows."""
    D = draw(st.sampled_from([24, 48, 60, 96]))
    divisors = [g for g in range(1, 33) if D % g == 0]
    shape = st.builds(Shape, st.integers(1, 20), st.integers(1, 9), st.sampled_from(divisors), st.integers(0, 3))
    shapes = tuple(draw(st.lists(st.none() | shape, min_size=1, max_size=4)))
    seed = draw(st.integers(0, 2**31))
    return Case(D, shapes, *random_rows(shapes, draw(st.integers(1, 24)), seed), seed=seed)


@every_backend
@every_dtype
@given(case=cases())
@settings(max_examples=15)
def test_random_batches_equal_the_formula(backend: str, dtype: torch.dtype, case: Case) -> None:
    batch = Batch(case, dtype)
    BACKENDS[backend](batch.mix)
    batch.check()


@every_backend
@every_dtype
@pytest.mark.parametrize("name", list(SHAPE_CLASSES))
def test_shape_classes_equal_the_formula(backend: str, dtype: torch.dtype, name: str) -> None:
    batch = Batch(SHAPE_CLASSES[name], dtype)
    BACKENDS[backend](batch.mix)
    batch.check()


@every_dtype
@pytest.mark.parametrize(("K", "C"), [(1, 1), (7, 16), (8, 33), (576, 48)])
def test_units_can_be_inverted(K: int, C: int, dtype: torch.dtype) -> None:
    weights = torch.randn(3, K, C).to(dtype)
    units = cpu_kernel.to_units(weights)
    assert units.shape == (3, *cpu_kernel.units_shape(K, C, dtype))
    assert torch.equal(cpu_kernel.from_units(units, K, C), weights)


@every_dtype
def test_torch_ops_read_weights_as_given_and_the_kernel_refuses_them(dtype: torch.dtype) -> None:
    batch = Batch(SHAPE_CLASSES["ragged-sizes"], dtype, layout=Layout.GIVEN)
    cpu.in_torch_ops(batch.mix)
    batch.check()
    if KERNEL is not None:
        with pytest.raises(ValueError, match="layout"):
            cpu.run_kernel(KERNEL, 0, batch.mix)


def test_a_bound_step_equals_the_formula_and_refuses_wrong_tensors() -> None:
    batch = Batch(SHAPE_CLASSES["many-tokens-of-many"], torch.bfloat16)
    add_path_ = cpu.bind(batch.table, batch.plan)
    wrong = (
        (batch.y_TD.float(), batch.x_TD), (batch.y_TD, batch.x_TD[:-1]), (batch.y_TD[:, ::2], batch.x_TD[:, ::2]),
        (batch.y_TD, batch.x_TD.t().contiguous().t()), (batch.y_TD[:, 1:], batch.x_TD[:, 1:]),
        (batch.y_TD[:5], batch.x_TD[:5]),
    )  # fmt: skip
    for y_TD, x_TD in wrong:
        with pytest.raises(ValueError, match=r"must|table|range"):
            add_path_(y_TD, x_TD, 0)
    assert torch.equal(batch.y_TD, batch.before_TD)
    add_path_(batch.y_TD, batch.x_TD, 0)
    batch.check()


@every_backend
def test_accepts_rows_of_wider_tensors(backend: str) -> None:
    batch = Batch(SHAPE_CLASSES["many-tokens-of-many"], torch.float32)
    wide_y, wide_x = torch.cat([batch.y_TD, batch.y_TD], 1), torch.cat([batch.x_TD, batch.x_TD], 1)
    D = batch.x_TD.shape[1]
    batch.y_TD, batch.x_TD = wide_y[:, :D], wide_x[:, D:]
    BACKENDS[backend](batch.mix)
    batch.check()
    assert torch.equal(wide_y[:, D:], batch.before_TD)


@every_backend
def test_large_logits_choose_one_expert(backend: str) -> None:
    batch = Batch(Case(48, (Shape(4, 5, 3, 1),), (0,) * 6, (0,) * 6), torch.float32)
    block = batch.blocks[0]
    assert block is not None
    bias = block.bias_bGN
    assert bias is not None
    bias.copy_(torch.full_like(bias, -3e4))
    bias[..., 2] = 3e4
    BACKENDS[backend](batch.mix)
    shrink, expand, r, _ = block
    h = (batch.x_TD @ shrink)[:, :r]
    only = torch.cat([h @ expand[j, 2 * r : 3 * r] for j in range(3)], 1)
    torch.testing.assert_close(batch.y_TD, batch.before_TD + only)


@every_backend
def test_nan_stays_in_its_token(backend: str) -> None:
    batch = Batch(Case(48, (Shape(4, 5, 3),), (0, 0, -1), (-1,) * 3), torch.bfloat16)
    batch.x_TD[0, 3] = float("nan")
    BACKENDS[backend](batch.mix)
    assert batch.y_TD[0].isnan().all()
    assert not batch.y_TD[1:].isnan().any()


@pytest.mark.skipif(KERNEL is None, reason="the kernel was not built")
def test_refuses_a_kernel_of_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernel, "LAYOUT", cpu_kernel.LAYOUT + 1)
    assert cpu_kernel.compiled_kernel.__wrapped__() is None
