"""Ranks that share a model give the tokens of one rank: each has whole adapters beside its parts of the blocks."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mtlora.backbone import identify, resolve
from mtlora.config import MtLoRAConfig
from tests.engine._engine import running_engine
from tests.engine._models import VOCABULARY, make_adapter, make_model

pytestmark = pytest.mark.scaleout

CONFIGS = {
    "ffn": MtLoRAConfig(r=8, num_experts=4, num_groups=2, blocks="ffn"),
    "attention": MtLoRAConfig(r=8, num_experts=4, num_groups=2, blocks="attention"),
    "both": MtLoRAConfig(r=4, num_experts=3, num_groups=1, blocks="both", task_bias=False),
}
NEW_TOKENS = 12


def greedy(
    model: Path, adapters: Path, prompts: Sequence[Sequence[int]], bind: str, monkeypatch: pytest.MonkeyPatch,
    **arguments: Any,
) -> tuple[list[tuple[int, ...]], list[bool]]:  # fmt: skip
    """Greedy tokens of every prompt, bare and with each adapter, all in one batch; and which ranks show routing."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    monkeypatch.setenv("MTLORA_ROUTING_SAMPLE_STEPS", "1")
    requests = [LoRARequest(name, i, str(adapters / name)) for i, name in enumerate(CONFIGS, start=1)]
    work = [(prompt, request) for prompt in prompts for request in (None, *requests)]
    with running_engine(model, dtype="float32", **arguments) as engine:
        for request in requests:
            assert engine.llm_engine.add_lora(request)
        outputs = engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt, _ in work],
            SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False),
            lora_request=[request for _, request in work],
            use_tqdm=False,
        )
        ranks = engine.llm_engine.collective_rpc("mtlora_statistics")
    return [tuple(output.outputs[0].token_ids) for output in outputs], [bool(rank["routing"]) for rank in ranks]


def prepare(model: Path, adapters: Path, vocabulary: int) -> list[list[int]]:
    """Write an adapter of each kind; returns prompts."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        make_adapter(adapters / name, identify(model), config, seed=seed, size=2.0)
    chooser = random.Random(0)
    return [[chooser.randrange(3, vocabulary) for _ in range(length)] for length in (5, 23, 40)]


def check(alone: list[tuple[int, ...]], shared: list[tuple[int, ...]]) -> None:
    assert shared == alone
    kinds = len(CONFIGS) + 1
    for kind in range(1, kinds):
        assert alone[kind::kinds] != alone[::kinds], "an adapter that changes nothing tests nothing"


def test_three_ranks_share_the_layers_of_the_default_backbone(tmp_path, monkeypatch):
    """Each rank has 3 of 9 heads and one of 3 key-value heads."""
    model = resolve("default")
    prompts = prepare(model, tmp_path, 49152)
    alone, _ = greedy(model, tmp_path, prompts, "0", monkeypatch)
    shared, _ = greedy(model, tmp_path, prompts, "0|1|1", monkeypatch, tensor_parallel_size=3)
    check(alone, shared)


def test_two_ranks_in_tensor_and_in_pipeline_parallel_give_the_tokens_of_one(tmp_path, monkeypatch):
    model = make_model(tmp_path / "model", "llama", num_layers=4)
    prompts = prepare(model, tmp_path, VOCABULARY)
    alone, _ = greedy(model, tmp_path, prompts, "0", monkeypatch)
    tensor, routing = greedy(model, tmp_path, prompts, "0|1", monkeypatch, tensor_parallel_size=2)
    check(alone, tensor)
    assert routing == [True, False], "both ranks sample the same rows"
    pipeline, routing = greedy(model, tmp_path, prompts, "0|1", monkeypatch, pipeline_parallel_size=2)
    check(alone, pipeline)
    assert routing == [True, True], "each rank samples blocks of its own"
