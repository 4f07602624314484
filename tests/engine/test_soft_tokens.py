"""Prompts of tokens and rows of embeddings: the engine answers as Hugging Face does, whatever is cached.

Shape suffixes: L positions, S soft tokens, D hidden size, V vocabulary.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mtlora.backbone import identify
from mtlora.config import MtLoRAConfig
from tests.engine._engine import noted_preemptions, running_engine
from tests.engine._models import HuggingFace, make_adapter

CONFIG = MtLoRAConfig(r=8, num_experts=4, num_groups=2, blocks="both")
BLOCK = 32
NUM_SOFT = 16
TOP = 8
TOLERANCE = 2e-4


class Serving:
    """An engine of the default backbone's first layers in float32, with room for few sequences."""

    def __init__(self, engine: Any, backbone: Path, slots: list[Any]) -> None:
        self.engine, self.slots, self.reference = engine, slots, HuggingFace(backbone)
        embeddings_VD = self.reference.model.get_input_embeddings().weight
        self.hidden_size, self.spread = embeddings_VD.shape[1], float(embeddings_VD.detach().std())

    def image(self, seed: int) -> torch.Tensor:
        """Soft tokens [S, D] as large as embeddings of tokens."""
        generator = torch.Generator().manual_seed(seed)
        return self.spread * torch.randn(NUM_SOFT, self.hidden_size, generator=generator)

    def run(self, work: list[Any], new_tokens: int = 3, *, fresh: bool = False) -> list[Any]:
        """Greedy answers to (ids, place of the soft tokens, soft tokens or None, adapter)."""
        from vllm import SamplingParams

        from mtlora.vllm_plugin.requests import soft_prompt

        return self.engine.generate(
            [
                {"prompt_token_ids": ids} if soft_SD is None else _unread(soft_prompt(ids, at, soft_SD))
                for ids, at, soft_SD, _ in work
            ],
            SamplingParams(
                temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=TOP, skip_reading_prefix_cache=fresh
            ),
            lora_request=[self.slots[adapter] for *_, adapter in work],
            use_tqdm=False,
        )

    @torch.inference_mode()
    def check(self, item: Any, output: Any) -> None:
        """Compare log-probabilities of the likeliest tokens with Hugging Face's on the same `inputs_embeds`."""
        ids, at, soft_SD, adapter = item
        generated = list(output.outputs[0].token_ids)
        model, forward = self.reference.model, self.reference.model.forward
        embeds_LD = model.get_input_embeddings()(torch.tensor(ids + generated[:-1])).clone()
        if soft_SD is not None:
            embeds_LD[at : at + NUM_SOFT] = soft_SD
        model.forward = lambda _: forward(inputs_embeds=embeds_LD.unsqueeze(0))
        try:
            folder, _, task = self.slots[adapter].lora_path.partition("#") if adapter else ("", "", "")
            expected_LV = self.reference.logprobs(ids, Path(folder) if adapter else None, task or None)
        finally:
            model.forward = forward
        for step, found in enumerate(output.outputs[0].logprobs):
            wanted_V = expected_LV[len(ids) - 1 + step]
            assert float(wanted_V.max() - wanted_V[generated[step]]) < TOLERANCE
            for token, entry in found.items():
                assert entry.logprob == pytest.approx(float(wanted_V[token]), abs=TOLERANCE)


def _unread(made: Any) -> dict[str, Any]:
    """The same prompt before vLLM's renderer: `vllm.LLM` takes no other, and has another name for the mask."""
    return {name: made[name] for name in ("prompt_embeds", "prompt_token_ids")} | {
        "prompt_is_token_ids": made["is_token_ids"]
    }


@pytest.fixture(scope="module")
def serving(short_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mtlora.vllm_plugin.requests import slot_requests

    folder = tmp_path_factory.mktemp("adapters")
    slots: list[Any] = [None]
    for seed in (1, 2):
        manifest = make_adapter(folder / f"{seed}", identify(short_backbone), CONFIG, num_tasks=1, seed=seed)
        slots += set(slot_requests(f"{seed}", "1", folder / f"{seed}", manifest, seed).values())
    with running_engine(
        short_backbone, dtype="float32", skip_tokenizer_init=False, enable_prompt_embeds=True,
        enable_prefix_caching=True, block_size=BLOCK, max_num_batched_tokens=48, num_gpu_blocks_override=12,
    ) as engine:  # fmt: skip
        for slot in filter(None, slots):
            assert engine.llm_engine.add_lora(slot)
        yield Serving(engine, short_backbone, slots)


def ids_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(length)]


def test_a_mixed_prompt_gives_hugging_faces_logits(serving: Serving) -> None:
    """With an adapter and without, of images at a prompt's begin, middle and end, beside plain prompts."""
    work = [
        (ids_of(30, place), place, serving.image(place) if soft else None, adapter)
        for place in (0, 9, 30 - NUM_SOFT)
        for soft, adapter in ((True, 1), (True, 0), (False, 1), (False, 0))
    ]
    for item, output in zip(work, serving.run(work, fresh=True), strict=True):
        serving.check(item, output)


def test_two_images_share_no_block_and_the_same_image_does(serving: Serving) -> None:
    ids, images = ids_of(100, 5), [serving.image(7), serving.image(8)]
    found = []
    serving.engine.reset_prefix_cache()
    for soft_SD, adapter, cached in (
        (images[0], 1, 0),
        # The block before the image is that of any image.
        (images[1], 1, BLOCK),
        (images[0], 1, 3 * BLOCK),
        (images[0], 2, 0),
        (None, 1, 0),
    ):
        item = (ids, 40, soft_SD, adapter)
        (output,) = serving.run([item])
        assert output.num_cached_tokens == cached
        serving.check(item, output)
        found.append(tuple(output.outputs[0].token_ids))
    assert found[0] == found[2]


def test_the_placeholder_tokens_do_not_matter(serving: Serving) -> None:
    ids, soft_SD = ids_of(40, 6), serving.image(9)
    other = [*ids[:10], *[3] * NUM_SOFT, *ids[10 + NUM_SOFT :]]
    first, second = serving.run([(ids, 10, soft_SD, 1)], fresh=True), serving.run([(other, 10, soft_SD, 1)])
    assert second[0].num_cached_tokens == BLOCK
    assert first[0].outputs[0].token_ids == second[0].outputs[0].token_ids


def test_chunks_hits_and_preemptions_change_no_answer(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random mixes in a cache of 11 blocks, in chunks of 48 tokens: an image is cut wherever a chunk ends."""
    rng = random.Random(0)
    prompts, images = [ids_of(90, 1), ids_of(60, 2)], [serving.image(i) for i in range(2)]
    work = []
    for _ in range(12):
        ids, soft_SD = rng.choice(prompts), rng.choice([*images, None])
        work.append((ids, rng.choice([3, 40]), soft_SD, rng.randrange(2)))
    preempted = noted_preemptions(serving.engine, monkeypatch)
    outputs = serving.run(work, 12)
    assert any(request.prompt_embeds is not None for request in preempted)
    assert sum(output.num_cached_tokens for output in outputs) > 2 * BLOCK
    for item, output in zip(work, outputs, strict=True):
        serving.check(item, output)
