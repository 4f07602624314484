"""Checkpoints of tasks of images: heads, and what is refused of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mtlora.backbone import identify
from mtlora.checkpoint.convert import ConversionError, convert_heads
from mtlora.checkpoint.format import CheckpointError
from mtlora.checkpoint.publish import publish
from mtlora.checkpoint.read import read_checkpoint, read_manifest
from mtlora.checkpoint.write import record_evaluation, write_checkpoint
from mtlora.cli import main
from mtlora.config import MtLoRAConfig
from mtlora.merge.extend import extended_config, merged_tasks, merged_tensors, starting_point
from mtlora.task import TaskSpec
from tests.factories import (
    IDENTITY,
    edit_manifest,
    image_table,
    image_tensors,
    random_tensors,
    replace_tensors,
    task_table,
    write_random_images,
)
from tests.mtlora.authors import AuthorsBlockAdapter, authors_state
from tests.mtlora.vision.models import write_model

TASKS = image_table(3)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A good checkpoint of images."""
    write_random_images(tmp_path / "images")
    return tmp_path / "images"


def test_heads_are_read_as_written(images: Path) -> None:
    checkpoint, tensors = read_checkpoint(images, IDENTITY), image_tensors(TASKS)
    assert checkpoint.manifest.format_version == 2
    assert checkpoint.manifest.images
    for row, task in enumerate(TASKS):
        weight_CF, bias_C = checkpoint.head(task.id)
        assert weight_CF.shape == (row + 2, 2 * IDENTITY.hidden_size)
        assert torch.equal(weight_CF, tensors[f"heads.{row}.weight"])
        assert torch.equal(bias_C, tensors[f"heads.{row}.bias"])
    assert checkpoint.paths.keys() == random_tensors().keys()
    with pytest.raises(KeyError):
        checkpoint.head("other")


@pytest.mark.parametrize(("pooling", "features"), [("cls", 8), ("mean", 8), ("cls_mean", 16)])
def test_a_heads_width_follows_the_pooling(tmp_path: Path, pooling: Any, features: int) -> None:
    tasks = image_table(1, pooling=pooling)
    write_random_images(tmp_path / "a", tasks=tasks, tensors=image_tensors(tasks))
    assert read_checkpoint(tmp_path / "a").head("task-0")[0].shape == (2, features)


def test_an_adapter_of_text_has_no_heads(tmp_path: Path) -> None:
    tensors = random_tensors() | {"heads.0.weight": torch.zeros(2, 16), "heads.0.bias": torch.zeros(2)}
    with pytest.raises(
        CheckpointError, match=r"unexpected tensor 'heads.0.bias': this config has no such part \(and 1 more"
    ):
        write_random_images(tmp_path / "a", tasks=task_table(3), tensors=tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads.1.weight": None}, "tensor heads.1.weight: expected by the config, found none"),
        ({"heads.1.bias": None}, "tensor heads.1.bias: expected by the config, found none"),
        ({"heads.1.weight": torch.zeros(3, 8)}, "heads.1.weight: expected shape [3, 16], found [3, 8]"),
        ({"heads.1.weight": torch.zeros(2, 16)}, "heads.1.weight: expected shape [3, 16], found [2, 16]"),
        ({"heads.1.bias": torch.zeros(3, 1)}, "heads.1.bias: expected shape [3], found [3, 1]"),
        ({"heads.1.bias": torch.full((3,), math.nan)}, "heads.1.bias: expected finite values"),
        ({"heads.1.bias": torch.zeros(3).double()}, "heads.1.bias: expected dtype"),
        ({"heads.3.bias": torch.zeros(3)}, "unexpected tensor 'heads.3.bias'"),
        ({"heads.01.bias": torch.zeros(3)}, "unexpected tensor 'heads.01.bias'"),
    ],
)
def test_refuses_wrong_heads(images: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {**image_tensors(TASKS), **changes}
    replace_tensors(images, save({name: tensor for name, tensor in tensors.items() if tensor is not None}))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(images)
    assert message in str(caught.value)


def _set(manifest: dict[str, Any], row: int, **fields: Any) -> None:
    manifest["tasks"][row].update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format_version=1), "format_version: expected 2, found 1"),
        (lambda m: m["tasks"][1].pop("image"), "expected in every task or in none, found none in task 'task-1'"),
        (lambda m: _set(m, 1, image=None), "expected in every task or in none, found none in task 'task-1'"),
        (lambda m: _set(m, 1, allowed_answers=None), "a task of images needs labels"),
        (lambda m: _set(m, 1, template="{input}?"), "template"),
        (lambda m: _set(m, 1, image={"size": "112"}), "tasks.1.image.size"),
        (lambda m: _set(m, 1, image={"size": 112, "more": 1}), "tasks.1.image.more"),
        (lambda m: m["config"].update(activation="task"), "document_template: expected one"),
        (lambda m: m.update(calibration={"other": 1.0}), "calibration: expected tasks of this adapter, found 'other'"),
        # Another number of labels than the head has.
        (lambda m: _set(m, 1, allowed_answers=["a", "b"]), "heads.1.weight: expected shape [2, 16], found [3, 16]"),
        (lambda m: m["tasks"][1]["image"].update(pooling="cls"), "heads.1.weight: expected shape [3, 8]"),
    ],
)
def test_refuses_wrong_entries(images: Path, edit: Any, message: str) -> None:
    edit_manifest(images, edit)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(images)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_temperatures_are_recorded_beside_heads(images: Path) -> None:
    before = read_checkpoint(images)
    record_evaluation(images, {"split": "test"}, {"task-1": 1.5})
    after = read_checkpoint(images)
    assert after.manifest.calibration == {"task-1": 1.5}
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in after.tensors.items())


def test_is_published_like_any_other(images: Path, tmp_path: Path) -> None:
    assert publish(images, tmp_path / "served") == tmp_path / "served" / "1"
    assert read_manifest(tmp_path / "served" / "1") == read_manifest(images)


def test_inspect_and_verify_show_images(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(images)]) == 0
    assert "3 tasks" in capsys.readouterr().out
    assert main(["inspect", str(images)]) == 0
    printed = capsys.readouterr().out
    assert "153 of heads" in printed
    for part in ("56 px", "squash", "cls_mean", "classes"):
        assert part in printed
    assert main(["inspect", str(images), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tasks"][2]["image"]["pooling"] == "cls_mean"


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("dinov2", {"size": 56}, ""),
        ("dinov2", {"size": 60}, "task t: an image of 60 x 60 pixels: expected a multiple of the backbone's patch, 14"),
        ("siglip", {"size": 56, "pooling": "cls_mean"}, "allowed: 'mean', as siglip_vision_model has no class token"),
        ("siglip", {"size": 56, "pooling": "mean"}, ""),
    ],
)
def test_verify_compares_with_the_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, image: dict[str, Any], message: str
) -> None:
    folder = write_model(tmp_path / "model", name)
    backbone, config = identify(folder), MtLoRAConfig(r=1, num_experts=1, task_bias=False)
    task = {"id": "t", "description": "d", "allowed_answers": ["a", "b"], "image": image}
    torch.save(
        {"heads.t.weight": torch.ones(2, 64), "heads.t.bias": torch.ones(2)} | block_state(backbone), tmp_path / "s"
    )
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    state = torch.load(tmp_path / "s")
    state["heads.t.weight"] = state["heads.t.weight"][:, : 32 if image.get("pooling") == "mean" else 64]
    torch.save(state, tmp_path / "s")
    arguments = [str(tmp_path / "s"), str(tmp_path / "a"), "--tasks", str(tmp_path / "tasks.json")]
    assert main(["convert", *arguments, "--backbone", str(folder)]) == 0
    converted = read_checkpoint(tmp_path / "a", backbone)
    assert converted.manifest.config.num_experts == config.num_experts
    assert torch.equal(converted.head("t")[1], torch.ones(2))
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "a"), "--backbone", str(folder)]) == (1 if message else 0)
    assert message in capsys.readouterr().err


def block_state(backbone: Any) -> dict[str, torch.Tensor]:
    """The authors' state of an adapter with one expert."""
    torch.manual_seed(0)
    return authors_state(
        {
            (layer, "mlp"): AuthorsBlockAdapter(backbone.hidden_size, 1, 1, lora_alpha=4.0, num_groups=1)
            for layer in range(backbone.num_layers)
        },
        "x.",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads.task-1.weight": None}, "heads.task-1.weight: found 0; task task-1 of images needs one [3, 16]"),
        ({"x.heads.task-1.bias": torch.zeros(3)}, "heads.task-1.bias: found 2; task task-1 of images needs one [3]"),
        (
            {"heads.task-1.weight": torch.zeros(3, 8)},
            "expected [3, 16], as 3 labels and pooling 'cls_mean' give, found [3",
        ),
        ({"heads.task-1.bias": torch.zeros(3, 1)}, "heads.task-1.bias: expected one dimensions, found [3, 1]"),
        ({"heads.task-1.bias": torch.full((3,), math.inf)}, "heads.task-1.bias: expected finite values"),
        ({"heads.task-1.bias": "no"}, "heads.task-1.bias: expected a tensor, found str"),
    ],
)
def test_convert_refuses_wrong_heads(change: dict[str, Any], message: str) -> None:
    state = {f"heads.{task.id}.weight": torch.zeros(row + 2, 16) for row, task in enumerate(TASKS)}
    state |= {f"heads.{task.id}.bias": torch.zeros(row + 2) for row, task in enumerate(TASKS)}
    assert len(convert_heads(state, TASKS, hidden_size=8)) == 6
    state = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
    with pytest.raises(ConversionError) as caught:
        convert_heads(state, TASKS, hidden_size=8)
    assert message in str(caught.value)


def test_merged_heads_stand_behind_the_old_ones(images: Path, tmp_path: Path) -> None:
    before = read_checkpoint(images)
    new = TaskSpec(id="added", description="Added.", allowed_answers=("a", "b"), image=TASKS[0].image)
    start = starting_point(before, 0, torch.Generator().manual_seed(0))
    head = {"heads.0.weight": torch.randn(2, 16), "heads.0.bias": torch.randn(2)}
    tensors = merged_tensors(before, {**start.tensors, **head})
    tasks = merged_tasks(before, new)
    write_checkpoint(
        tmp_path / "after", backbone=IDENTITY, config=extended_config(before, 0), tasks=tasks, tensors=tensors
    )
    after = read_checkpoint(tmp_path / "after")
    assert torch.equal(after.head("added")[0], head["heads.0.weight"])
    for task in TASKS:
        assert all(map(torch.equal, after.head(task.id), before.head(task.id)))
