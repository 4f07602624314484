"""Sampled routing equals the routing, and sampling changes no served token."""

import math

import numpy as np
import pytest
import torch

from mtlora.ops.packed_block import pack_block
from mtlora.ops.table import AdapterRows
from mtlora.vllm_plugin.sampling import ENVIRONMENT_STEPS, RoutingSampler, entropy

D, R, N, G, BLOCKS, TOKENS = 16, 4, 3, 2, 3, 5


@pytest.fixture
def mapping(tmp_path, monkeypatch):
    """A step of TOKENS tokens of one adapter, and the adapter's tensors."""
    from mtlora.checkpoint.format import AdapterManifest
    from mtlora.config import MtLoRAConfig
    from mtlora.ops.table import AdapterTable
    from mtlora.vllm_plugin.packed import PackedAdapter, Slot
    from mtlora.vllm_plugin.step import CpuStep
    from tests.factories import IDENTITY, task_table

    generator = torch.Generator().manual_seed(0)
    route, bias = torch.randn(G * N, D, generator=generator), torch.randn(2, G, N, generator=generator)
    blocks = [
        pack_block(
            torch.randn(R, D, generator=generator), torch.randn(N, D, R, generator=generator), route,
            num_groups=G, scaling=1.0, dtype=torch.float32, bias_bGN=bias,
        )
        for _ in range(BLOCKS)
    ]  # fmt: skip
    manifest = AdapterManifest(
        backbone=IDENTITY, config=MtLoRAConfig(r=2, num_experts=3, num_groups=2), tasks=task_table(3),
        tensors_sha256="0" * 64,
    )  # fmt: skip
    adapter = PackedAdapter(tmp_path, manifest, AdapterRows(blocks))
    table = AdapterTable(BLOCKS, 2, hidden_size=D, dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setenv(ENVIRONMENT_STEPS, "2")
    step = CpuStep(table, RoutingSampler.from_environment(BLOCKS))
    step.set(np.full(TOKENS, 9), lambda _: Slot(9, "name/7@0123#task", "", adapter, bias_row=1))
    return step, route, bias


def run(step, steps: int) -> list[torch.Tensor]:
    outputs = []
    for number in range(steps):
        x_TD = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(number))
        y_TD = torch.zeros(TOKENS, D)
        for block in range(BLOCKS):
            step.finish_(y_TD, x_TD, block)
        outputs.append(y_TD)
    return outputs


def test_sums_cover_the_sampled_steps(mapping):
    step, route, bias = mapping
    run(step, 6)
    (name, sums), *others = step.sampler.sums().items()
    assert (name, others) == ("name/7", [])
    entropies, weights = 0.0, torch.zeros(N)
    for number in (0, 2, 4):
        x_TD = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(number))
        chosen_TGN = ((x_TD @ route.t()).view(TOKENS, G, N) + bias[1]).softmax(-1)
        entropies += float(-(chosen_TGN * chosen_TGN.log()).sum()) / math.log(N)
        weights += chosen_TGN.sum((0, 1))
    assert sums["rows"] == 3 * TOKENS * G
    assert sums["entropy"] == pytest.approx(entropies, rel=1e-5)
    assert sums["expert_weights"] == pytest.approx(weights.tolist(), rel=1e-5)


def test_sampling_changes_no_output(mapping):
    step, *_ = mapping
    sampled = run(step, 4)
    step.sampler = None
    assert all(torch.equal(a, b) for a, b in zip(sampled, run(step, 4), strict=True))


def test_blocks_take_turns():
    sampler = RoutingSampler(steps=2, num_blocks=3)
    turns = [[block for block in range(3) if sampler.due(block)] for _ in range(8)]
    assert turns == [[0], [], [1], [], [2], [], [0], []]


def test_routing_is_not_sampled_by_default(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_STEPS, raising=False)
    assert RoutingSampler.from_environment(3) is None
    monkeypatch.setenv(ENVIRONMENT_STEPS, "0")
    assert RoutingSampler.from_environment(3) is None


def test_entropy_is_greatest_for_even_weights_and_zero_for_certain_ones():
    even, certain = torch.full((1, 1, 4), 0.25), torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    assert float(entropy(even)) == pytest.approx(math.log(4))
    assert float(entropy(certain)) == pytest.approx(0.0, abs=1e-6)
