"""The engine's features of images equal the plain encoder's, with many tasks and adapters in one batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtlora.adapter import AdapterSet
from mtlora.backbone import identify
from mtlora.checkpoint.read import read_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.vision.encoder import load_encoder, pool
from mtlora.vision.image_input import ImageInput
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
        return pool(states_BTD, "cls_mean", self.encoder.config.num_prefix)[0]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    from mtlora.vllm_vision import vision_engine_args

    folder = tmp_path_factory.mktemp("vision")
    model = write_model(folder / "model", "dinov2 with registers")
    arguments = vision_engine_args(model, max_images=16, size=SIZE, largest_size=max(SIZES))
    with running_bare_engine(**arguments, dtype="float32", max_loras=4, max_cpu_loras=5) as engine:
        yield Vision(engine, model, folder)


def images(vision: Vision, number: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [SIZES[i % len(SIZES)] for i in range(number)]
    return [vision.encoder.embed(torch.randn(1, 3, size, size, generator=generator))[0] for size in sizes]


def test_features_of_mixed_tasks_adapters_and_sizes_equal_the_plain_encoders(vision: Vision) -> None:
    keys = [*vision.slots, *reversed(vision.slots)]
    work = list(zip(images(vision, len(keys)), keys, strict=True))
    for (x_TD, key), found in zip(work, vision.features(work), strict=True):
        torch.testing.assert_close(found, vision.expected(x_TD, key), atol=TOLERANCE, rtol=0)
