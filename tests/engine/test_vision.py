"""The engine's features of images equal the plain encoder's, with many tasks and adapters in one batch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtlora.adapter import AdapterSet
from mtlora.backbone import identify
from mtlora.checkpoint.read import read_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.vision.encoder import load_encoder, pool
from mtlora.vision.image_input import ImageInput, num_features, task_feature
from tests.engine._engine import running_bare_engine
from tests.engine._models import make_adapter
from tests.mtlora.vision.models import PATCH, SIZE, write_model

CONFIGS = {
    "biased": MtLoRAConfig(r=4, num_experts=8, num_groups=4, blocks="ffn"),
    "attending": MtLoRAConfig(r=8, num_experts=4, num_groups=2, blocks="attention"),
    "unbiased": MtLoRAConfig(r=4, num_experts=6, num_groups=1, blocks="both", task_bias=False),
}
NUM_TASKS = 3
SIZES = (SIZE, SIZE + PATCH, 2 * PATCH)
LABELS = {"allowed_answers": ("yes", "no", "neither"), "image": ImageInput(size=SIZE)}
TOLERANCE = 5e-5


class Vision:
    """A running engine beside the plain encoder; adapters by name, requests by (adapter, task)."""

    def __init__(self, engine: Any, model: Path, folder: Path) -> None:
        from mtlora.vllm_plugin.requests import slot_requests

        self.engine, self.folder, self.encoder = engine.llm_engine, folder, load_encoder(model)
        self.backbone = identify(model)
        self.slots: dict[tuple[str, str] | None, Any] = {None: None}
        first_id = 1
        for seed, (name, config) in enumerate(CONFIGS.items()):
            manifest = make_adapter(folder / name, self.backbone, config, num_tasks=NUM_TASKS, seed=seed, **LABELS)
            requests = slot_requests(name, "1", folder / name, manifest, first_id)
            first_id += len(set(requests.values()))
            self.slots |= {(name, task): request for task, request in requests.items()}
        for request in set(self.slots.values()) - {None}:
            assert self.engine.add_lora(request)

    def features(self, work: list[tuple[torch.Tensor, tuple[str, str] | None]]) -> list[torch.Tensor]:
        """The engine's features of (embeddings [T, D], adapter and task), all handed over before the first step."""
        from mtlora.vllm_vision import feature_params, image_prompt

        for i, (x_TD, key) in enumerate(work):
            self.engine.add_request(str(i), image_prompt(x_TD), feature_params(), lora_request=self.slots[key])
        found = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                found[output.request_id] = output.outputs.data
        return [found[str(i)] for i in range(len(work))]

    @torch.inference_mode()
    def expected(self, x_TD: torch.Tensor, key: tuple[str, str] | None) -> torch.Tensor:
        """The plain encoder's feature, with the adapter attached by hooks."""
        handles: list[Any] = []
        if key is not None:
            checkpoint = read_checkpoint(self.folder / key[0])
            manifest = checkpoint.manifest
            paths = AdapterSet(manifest.config, self.backbone.hidden_size, self.backbone.num_layers, NUM_TASKS).eval()
            paths.load_state_dict(checkpoint.paths)
            handles = paths.attach(self.encoder)
            if manifest.config.task_bias:
                paths.context.bias_index = torch.tensor([manifest.task(key[1]).bias_index])
        try:
            states_BTD = self.encoder(x_TD.unsqueeze(0))
        finally:
            for handle in handles:
                handle.remove()
        config = self.encoder.config
        return pool(states_BTD, "cls_mean" if config.traits.class_token else "mean", config.num_prefix)[0]


def arguments(model: Path) -> dict[str, Any]:
    """An engine with fewer slots than the tests' adapters have tasks, so that it evicts in every step."""
    from mtlora.vllm_vision import vision_engine_args

    sizes = {"size": SIZE, "largest_size": max(SIZES)}
    return vision_engine_args(model, max_images=16, **sizes) | {"dtype": "float32", "max_loras": 4, "max_cpu_loras": 5}


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    model = write_model(folder / "model", "dinov2 with registers")
    with running_bare_engine(**arguments(model)) as engine:
        yield Vision(engine, model, folder)


def images(vision: Vision, number: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [SIZES[i % len(SIZES)] for i in range(number)]
    return [vision.encoder.embed(torch.randn(1, 3, size, size, generator=generator))[0] for size in sizes]


def check(vision: Vision, work: list[tuple[torch.Tensor, tuple[str, str] | None]]) -> None:
    for (x_TD, key), found in zip(work, vision.features(work), strict=True):
        torch.testing.assert_close(found, vision.expected(x_TD, key), atol=TOLERANCE, rtol=0)


def test_features_of_mixed_tasks_adapters_and_sizes_equal_the_plain_encoders(vision: Vision) -> None:
    keys = [*vision.slots, *reversed(vision.slots)]
    work = list(zip(images(vision, len(keys)), keys, strict=True))
    check(vision, work)
    bare = [vision.expected(x_TD, None) for x_TD, _ in work]
    effects = [(vision.expected(*item) - b).abs().max() for item, b in zip(work, bare, strict=True) if item[1]]
    assert min(effects) > 100 * TOLERANCE, "an adapter that changes nothing tests nothing"


def test_a_batch_gives_the_features_of_single_images(vision: Vision) -> None:
    work = list(zip(images(vision, len(vision.slots), seed=1), vision.slots, strict=True))
    together = vision.features(work)
    for item, found in zip(work, together, strict=True):
        torch.testing.assert_close(vision.features([item])[0], found, atol=TOLERANCE, rtol=0)


def test_images_that_begin_alike_share_nothing(vision: Vision) -> None:
    (x_TD,) = images(vision, 1, seed=2)
    others = [torch.cat([x_TD[:-1], x_TD[-1:] * factor]) for factor in (1.0, -3.0, 5.0)]
    check(vision, [(each, key) for each in others for key in (None, ("biased", "t0"), ("unbiased", "t0"))])
    # Again: nothing of the first time is left.
    check(vision, [(x_TD, None), (others[1], None)])


def test_adapters_come_and_go_beside_others(vision: Vision) -> None:
    from vllm.lora.request import LoRARequest

    make_adapter(vision.folder / "new", vision.backbone, CONFIGS["biased"], num_tasks=NUM_TASKS, seed=9, **LABELS)
    path = f"{vision.folder / 'new'}#t2"
    call = vision.engine.collective_rpc
    while (state := call("mtlora_stage", args=(str(vision.folder / "new"),))[0])[0] == "pending":
        check(vision, [(images(vision, 1, seed=3)[0], ("attending", "t1"))])
    # A server asks all ranks until the slowest is ready, too.
    again = [call("mtlora_stage", args=(str(vision.folder / "new"),))[0] for _ in range(5)]
    assert [state, *again] == 6 * [("ready", "")]
    assert call("mtlora_place", args=(str(vision.folder / "new"), [(900, "new", path)]))[0] == ("ready", "")
    vision.slots["new", "t2"] = LoRARequest("new", 900, path)
    try:
        keys = [("new", "t2"), ("biased", "t2"), None, ("new", "t2")]
        check(vision, list(zip(images(vision, 4, seed=4), keys, strict=True)))
    finally:
        del vision.slots["new", "t2"]
        assert call("mtlora_remove", args=([900],))[0] == 1
    check(vision, list(zip(images(vision, 2, seed=5), [("biased", "t2"), None], strict=True)))


def test_an_adapter_of_another_backbone_is_refused_and_harms_nothing(vision: Vision) -> None:
    other = vision.backbone.model_copy(update={"weights_fingerprint": "ab" * 32})
    make_adapter(vision.folder / "other", other, CONFIGS["biased"], **LABELS)
    call = vision.engine.collective_rpc
    while (state := call("mtlora_stage", args=(str(vision.folder / "other"),))[0])[0] == "pending":
        pass
    assert state[0] == "failed"
    assert "weights_fingerprint: expected" in state[1]
    check(vision, [(images(vision, 1, seed=6)[0], ("biased", "t1"))])


def test_token_embed_gives_all_states_of_an_image(vision: Vision) -> None:
    from vllm import PoolingParams

    from mtlora.vllm_vision import image_prompt

    (x_TD,) = images(vision, 1, seed=7)
    vision.engine.add_request("states", image_prompt(x_TD), PoolingParams(task="token_embed"))
    outputs = []
    while not outputs:
        outputs = vision.engine.step()
    with torch.inference_mode():
        expected_TD = vision.encoder(x_TD.unsqueeze(0))[0]
    torch.testing.assert_close(outputs[0].outputs.data, expected_TD, atol=TOLERANCE, rtol=0)


def test_a_tasks_feature_is_a_part_of_the_engines(vision: Vision) -> None:
    (x_TD,) = images(vision, 1, seed=8)
    (found_F,) = vision.features([(x_TD, None)])
    config = vision.encoder.config
    with torch.inference_mode():
        states_BTD = vision.encoder(x_TD.unsqueeze(0))
    for pooling in ("cls", "mean", "cls_mean"):
        expected = pool(states_BTD, pooling, config.num_prefix)[0]
        found = task_feature(found_F, pooling, num_features(pooling, config.hidden_size))
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["dinov2 with gates", "siglip", "dinov3"])
def test_other_families_give_the_encoders_states(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", name)
    with running_bare_engine(**arguments(model)) as engine:
        vision = Vision(engine, model, tmp_path)
        check(vision, list(zip(images(vision, 4), [None, ("biased", "t1"), ("attending", "t0"), None], strict=True)))


@pytest.mark.parametrize("flag", ["enable_prefix_caching", "enable_chunked_prefill"])
def test_refuses_engines_that_would_cut_or_share_images(flag: str) -> None:
    from mtlora.vllm_vision.model import VisionModel

    flags = {"enable_prefix_caching": False, "enable_chunked_prefill": False} | {flag: True}
    config = SimpleNamespace(cache_config=SimpleNamespace(**flags), scheduler_config=SimpleNamespace(**flags))
    with pytest.raises(ValueError, match="allowed: neither"):
        VisionModel(vllm_config=config)
