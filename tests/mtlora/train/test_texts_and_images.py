"""Training on texts and images with tiny backbones: it learns from both, resumes to the same bits, and is read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mtlora.backbone import identify
from mtlora.checkpoint.read import read_checkpoint
from mtlora.errors import MtLoRAError
from mtlora.evaluation.answerers import with_other_images
from mtlora.evaluation.offline import offline_answerer, offline_labeller
from mtlora.model.language import load_adapted_model
from mtlora.train.config import TrainingConfig
from mtlora.train.trainer import Trainer
from tests.mtlora.train.runs import same_adapters
from tests.mtlora.vision.models import write_model

SMALL: dict[str, Any] = {
    "adapter": {"r": 4, "num_experts": 3, "num_groups": 2}, "examples_per_task": 12, "validation_per_task": 4,
    "batch_size": 8, "save_every": 2, "dtype": "float32", "threads": 1, "learning_rate": 5e-3,
    "suite": "builtin-pictures", "tasks": ["picture_number", "picture_colour"], "max_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vision"))


def _config(**changed: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(SMALL | changed)


def test_a_run_is_read_back_and_resumes_to_the_same_bits(tiny_backbone: Path, vision: Path, tmp_path: Path) -> None:
    config = _config()
    whole = Trainer(config, tiny_backbone, tmp_path / "whole", vision=vision)
    reader = whole.adapted.reader
    first = {name: value.clone() for name, value in reader.projector.state_dict().items()}
    manifest = whole.fit()
    assert manifest.projector.backbone == identify(vision)
    assert set(manifest.evaluation["adapter"]["tasks"]) == {"picture_number", "picture_colour"}
    assert not torch.equal(reader.projector.weight, first["weight"])
    assert torch.equal(reader.projector.mean_K, first["mean_K"])

    stopped = Trainer(config, tiny_backbone, tmp_path / "stopped", vision=vision)
    stopped.train_step()
    stopped.train_step()
    stopped.save()
    stopped.folder._lock.close()  # type: ignore[union-attr]
    resumed = Trainer(config, tiny_backbone, tmp_path / "stopped", vision=vision, resume=True)
    assert resumed.step == 2
    resumed.fit()
    assert same_adapters(tmp_path / "whole", tmp_path / "stopped")

    # The folded projector gives the trainer's soft tokens, and the checkpoint its losses, but for the paths' float16.
    checkpoint = read_checkpoint(tmp_path / "whole" / "adapter")
    adapted = load_adapted_model(tiny_backbone, checkpoint, torch.float32, vision)
    keys = [each.image.key for each in whole.work.examples.train if each.image][:2]  # type: ignore[attr-defined]
    states_PK = reader.states(keys)
    torch.testing.assert_close(adapted.reader.projector(states_PK), reader.projector(states_PK), atol=1e-3, rtol=1e-3)
    examples = [e for task in whole.tasks for e in whole.suite.examples(task.id, "test", 3)]
    probabilities = offline_labeller(adapted, manifest.tasks)(examples[3:])
    others = with_other_images(
        lambda rotated: [json.dumps(found) for found in offline_labeller(adapted, manifest.tasks)(rotated)]
    )(examples[3:])
    assert all(sum(each.values()) == pytest.approx(1, abs=1e-4) for each in probabilities)
    assert all(found != json.loads(other) for found, other in zip(probabilities, others, strict=True))
    # Compare batches of one and of many, because padding moves an image's position.
    together = offline_answerer(adapted, manifest.tasks)(examples)
    assert together == offline_answerer(adapted, manifest.tasks, batch_size=1)(examples)
    assert len(offline_answerer(adapted, manifest.tasks, with_adapter=False)(examples)) == 6

    again = _config(init_from=str(tmp_path / "whole" / "adapter"), max_steps=1)
    warm = Trainer(again, tiny_backbone, tmp_path / "warm", vision=vision)
    torch.testing.assert_close(
        warm.adapted.reader.projector(states_PK), reader.projector(states_PK), atol=1e-3, rtol=1e-3
    )


def test_it_learns_from_the_image(tiny_backbone: Path, vision: Path, tmp_path: Path) -> None:
    """It learns a few examples by heart: the same texts stand beside other images with other answers."""
    config = _config(
        tasks=["picture_number"],
        examples_per_task=8,
        validation_per_task=0,
        epochs=100,
        max_steps=100,
        learning_rate=1e-2,
    )
    trainer = Trainer(config, tiny_backbone, tmp_path / "run", vision=vision)
    losses = [trainer.train_step().loss for _ in range(100)]
    examples = trainer.suite.examples("picture_number", "train", 8)
    # Without the image, no answer is better than a guess between two: 0.6.
    assert len({example.target for example in examples}) == 2
    assert losses[-1] < 0.1


def test_what_cannot_be_trained_is_refused(tiny_backbone: Path, vision: Path, tmp_path: Path) -> None:
    with pytest.raises(MtLoRAError, match="found no vision backbone"):
        Trainer(_config(), tiny_backbone, tmp_path / "run")
    with pytest.raises(MtLoRAError, match="with tasks that take an image: the adapter alone"):
        Trainer(_config(baseline={"method": "lora"}), tiny_backbone, tmp_path / "run", vision=vision)
    suite = _folder(tmp_path / "suite", {"size": 112})
    with pytest.raises(MtLoRAError, match="112 x 112 pixels: expected a multiple of 3 x 3 patches of 14, 42"):
        Trainer(_config(**suite, merge_patches=3), tiny_backbone, tmp_path / "run", vision=vision)


def _folder(folder: Path, picture: dict[str, Any]) -> dict[str, Any]:
    """The settings of a suite of one task with such a `picture`."""
    folder.mkdir()
    examples = []
    for i in range(20):
        Image.new("RGB", (20, 20), (255 - i, i, 0)).save(folder / f"{i}.png")
        examples.append({"input": "What is it?", "image": f"{i}.png", "target": "red"})
    (folder / "ask.json").write_text(json.dumps({"picture": picture, "examples": examples}))
    return {"suite": str(folder), "tasks": None, "examples_per_task": 4, "validation_per_task": 0, "max_steps": 1}


@pytest.mark.parametrize(
    ("picture", "merge", "size", "soft_tokens"),
    [({"size": 168}, 2, 168, 36), ({"size": 168}, 4, 168, 9), ({}, 2, 112, 16), ({}, 3, 42, 1), ({}, 8, 112, 1)],
)
def test_a_task_states_the_size_of_its_images_or_follows_the_patches(
    tiny_backbone: Path, vision: Path, tmp_path: Path, picture: dict[str, Any], merge: int, size: int, soft_tokens: int
) -> None:
    config = _config(**_folder(tmp_path / "suite", picture), merge_patches=merge)
    trainer = Trainer(config, tiny_backbone, tmp_path / "run", vision=vision)
    manifest = trainer.fit()
    assert [task.picture.size for task in manifest.tasks if task.picture] == [size]
    key = next(each.image.key for each in trainer.work.examples.train if each.image)  # type: ignore[attr-defined]
    assert len(trainer.adapted.reader.states([key])) == soft_tokens
    # A checkpoint is read with the size that it was trained with.
    adapted = load_adapted_model(tiny_backbone, read_checkpoint(tmp_path / "run" / "adapter"), torch.float32, vision)
    (answer,) = offline_answerer(adapted, manifest.tasks)(trainer.suite.examples("ask", "train", 1))
    assert isinstance(answer, str)
