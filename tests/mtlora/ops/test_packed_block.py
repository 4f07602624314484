"""The routed low-rank path against the formula in float64: values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora.adapter import BlockAdapter, TaskContext
from mtlora.config import MtLoRAConfig
from mtlora.ops.packed_block import pack_block, pack_experts, packed_path
from mtlora.ops.reference import routed_lora_reference

# Enough tokens and dimensions that sums do not cancel: the error is relative to the whole output.
SHAPES = st.fixed_dictionaries(
    {
        "tokens": st.integers(6, 9),
        "group_size": st.integers(4, 8),
        "num_groups": st.integers(1, 4),
        "num_experts": st.integers(2, 5),
        "r": st.integers(1, 4),
        "biased": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)

SMALL = {"tokens": 5, "group_size": 3, "num_groups": 2, "num_experts": 4, "r": 2, "seed": 0}


def weights(shape: dict[str, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, A, B, R and a bias per token, with sizes as in training."""
    generator = torch.Generator().manual_seed(shape["seed"])
    T, G, N, r = shape["tokens"], shape["num_groups"], shape["num_experts"], shape["r"]
    D = G * shape["group_size"]

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, A, B, R = randn(T, D), randn(r, D) / D**0.5, randn(N, D, r), randn(G * N, D) / D**0.5
    return *(t.to(dtype) for t in (x, A, B, R)), randn(T, G, N).float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@given(shape=SHAPES)
@settings(max_examples=40)
def test_packed_path_equals_the_formula(dtype: torch.dtype, tolerance: float, shape: dict[str, int]) -> None:
    x, A, B, R, bias = weights(shape, dtype)
    row = bias if shape["biased"] else None
    expected = routed_lora_reference(x, A, B, R, row, num_groups=shape["num_groups"], scaling=2.5)
    block = pack_block(A, B, R, num_groups=shape["num_groups"], scaling=2.5, dtype=dtype)
    assert (block.rank, block.num_groups, block.num_experts) == (shape["r"], shape["num_groups"], shape["num_experts"])
    found = packed_path(x, block, row)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert relative_error(found, expected) < tolerance


@given(shape=SHAPES)
@settings(max_examples=25)
def test_block_adapter_equals_the_formula_in_values_and_gradients(shape: dict[str, int]) -> None:
    x, A, B, R, _ = weights(shape, torch.float64)
    config = MtLoRAConfig(
        r=shape["r"], lora_alpha=3.0, num_experts=shape["num_experts"], num_groups=shape["num_groups"],
        task_bias=bool(shape["biased"]),
    )  # fmt: skip
    context = TaskContext()
    adapter = BlockAdapter(config, x.shape[1], num_tasks=2, context=context).double()
    adapter.lora_A.data, adapter.lora_B.data, adapter.lora_route.data = A, B, R
    parameters = [adapter.lora_A, adapter.lora_B, adapter.lora_route]
    # Two sequences of different tasks; the second is the negative of the first.
    x_BLD = torch.stack([x, -x])
    bias_index_B, bias_TGN = None, None
    if config.task_bias:
        torch.nn.init.normal_(adapter.task_bias)
        parameters.append(adapter.task_bias)
        bias_index_B = torch.tensor([1, 0])
        bias_TGN = adapter.task_bias[bias_index_B].repeat_interleave(x.shape[0], dim=0)
    expected = routed_lora_reference(
        x_BLD.flatten(0, 1), adapter.lora_A, adapter.lora_B, adapter.lora_route, bias_TGN,
        num_groups=config.num_groups, scaling=config.scaling,
    ).view_as(x_BLD)  # fmt: skip
    with context.use(bias_index_B):
        found = adapter(x_BLD)
    assert relative_error(found.detach(), expected.detach()) < 1e-5
    probe = torch.randn(x_BLD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad((found * probe).sum(), parameters),
        torch.autograd.grad((expected * probe).sum(), parameters),
        strict=True,
    ):
        # The tolerance covers softmax, which runs in float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-9)


def test_zero_experts_add_exactly_zero() -> None:
    x, A, B, R, bias = weights(SMALL, torch.float32)
    block = pack_block(A, torch.zeros_like(B), R, num_groups=2, scaling=2.0, dtype=torch.float32)
    assert torch.equal(packed_path(x, block, bias), torch.zeros_like(x))
    adapter = BlockAdapter(MtLoRAConfig(r=2, num_experts=4, num_groups=2), 6, num_tasks=1, context=TaskContext())
    assert torch.equal(adapter(x[None]), torch.zeros(1, 5, 6))


def test_one_expert_equals_plain_lora() -> None:
    x, A, B, R, _ = weights(SMALL | {"num_experts": 1}, torch.float64)
    expected = 1.5 * x @ A.T @ B[0].T
    block = pack_block(A.float(), B.float(), R.float(), num_groups=2, scaling=1.5, dtype=torch.float32)
    torch.testing.assert_close(packed_path(x.float(), block, None), expected.float())
    torch.testing.assert_close(routed_lora_reference(x, A, B, R, None, num_groups=2, scaling=1.5), expected)


def test_a_large_bias_picks_one_expert_of_one_group() -> None:
    x, A, B, R, bias = weights(SMALL | {"tokens": 2}, torch.float32)
    bias = torch.zeros_like(bias)
    bias[0, 1, 2] = bias[0, 0, 3] = bias[1, 1, 0] = bias[1, 0, 1] = 1e4
    block = pack_block(A, B, R, num_groups=2, scaling=1.0, dtype=torch.float32)
    out = packed_path(x, block, bias)
    for token, expert_of_group in ((0, (3, 2)), (1, (1, 0))):
        rows = torch.cat([B[expert, 3 * j : 3 * j + 3] @ (A @ x[token]) for j, expert in enumerate(expert_of_group)])
        torch.testing.assert_close(out[token], rows)


def test_packed_experts_are_the_transposed_rows_of_each_group() -> None:
    B = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    packed = pack_experts(B, num_groups=3)
    assert packed.shape == (3, 6, 2)
    for j in range(3):
        torch.testing.assert_close(packed[j], torch.cat([B[i, 2 * j : 2 * j + 2].T for i in range(2)]))


def test_mean_routing_is_a_distribution_and_set_only_in_training() -> None:
    adapter = BlockAdapter(MtLoRAConfig(r=2, num_experts=4, num_groups=3), 6, num_tasks=1, context=TaskContext())
    adapter.eval()
    adapter(torch.randn(1, 2, 6))
    assert adapter.mean_routing_GN is None
    adapter.train()
    adapter(torch.randn(1, 2, 6))
    assert adapter.mean_routing_GN is not None
    torch.testing.assert_close(adapter.mean_routing_GN.sum(-1), torch.ones(3))


def test_dropout_does_not_touch_the_router() -> None:
    torch.manual_seed(0)
    config = MtLoRAConfig(r=2, num_experts=4, num_groups=3, lora_dropout=0.9)
    adapter = BlockAdapter(config, 6, num_tasks=1, context=TaskContext())
    torch.nn.init.normal_(adapter.lora_B)
    x = torch.randn(1, 40, 6)
    adapter.train()
    first, second = adapter(x), adapter(x)
    routing = adapter.mean_routing_GN
    assert not torch.equal(first, second)
    adapter(x)
    assert torch.equal(routing, adapter.mean_routing_GN)
