"""Masks of structured outputs on CPUs: the same logits as by vLLM's own function."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora import vllm_plugin
from mtlora.ops import cpu_kernel

pytestmark = pytest.mark.skipif(cpu_kernel.compiled_kernel() is None, reason="the kernel is not built here")
SIZE = 100


def step(ids: list[str], masked: list[str], seed: int, drafts: dict[str, list[int]]) -> tuple[Any, Any, Any]:
    draws = np.random.default_rng(seed)
    rows = sum(1 + len(drafts.get(each, ())) for each in masked)
    bits = draws.choice([0, -1, 77], (rows, -(-SIZE // 32))).astype(np.int32)
    return (
        SimpleNamespace(scheduled_spec_decode_tokens=drafts),
        SimpleNamespace(structured_output_request_ids=masked, grammar_bitmask=bits),
        SimpleNamespace(req_ids=ids),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    ids=st.permutations("abcdef"), masked=st.permutations("abcdefgh"), some=st.integers(1, 8), seed=st.integers(0, 999),
    drafted=st.booleans(),
)  # fmt: skip
@settings(max_examples=30)
def test_logits_are_masked_as_by_vllm(
    dtype: torch.dtype, ids: list[str], masked: list[str], some: int, seed: int, drafted: bool
) -> None:
    vllm_plugin.register()
    from vllm.v1.worker import gpu_model_runner

    from mtlora.vllm_cpu import masks

    assert gpu_model_runner.apply_grammar_bitmask is masks._apply
    # Includes requests without a mask and masks of requests that have left, in any order.
    drafts = {"b": [1, 2]} if drafted else {}
    arguments = step(ids, masked[:some], seed, drafts)
    rows = sum(1 + len(drafts.get(each, ())) for each in ids)
    expected = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = expected.clone()
    masks._stock(*arguments, expected)
    masks._apply(*arguments, found)
    assert torch.equal(found, expected)
