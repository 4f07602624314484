"""`mtlora merge` of a task of images: its head is learned, and the other tasks keep their bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness.adapters import random_tensors
from mtlora.backbone import identify
from mtlora.checkpoint.format import Checkpoint
from mtlora.checkpoint.read import read_checkpoint
from mtlora.checkpoint.write import write_checkpoint
from mtlora.cli import main
from mtlora.config import MtLoRAConfig
from mtlora.merge.compare import compare_images
from mtlora.suite import load_suite
from tests.factories import image_table
from tests.mtlora.vision.models import SIZE, write_model


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """One task of dark and bright pictures."""
    rng = np.random.default_rng(0)
    for i in range(32):
        pixels = rng.integers(0, 80, (20, 20, 3)) + 160 * (i % 2)
        path = tmp_path / "suite" / "bright" / ("test" if i < 8 else "train") / ("dark", "bright")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    (tmp_path / "suite" / "bright" / "task.json").write_text(json.dumps({"image": {"size": SIZE}}))
    return tmp_path / "suite"


@pytest.mark.parametrize("mode", ["bias", "experts"])
def test_merge_command_adds_a_task_of_images(
    mode: str, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its positions are interpolated to the images' size.
    backbone = write_model(tmp_path / "model", image_size=SIZE // 2)
    config = MtLoRAConfig(r=4, num_experts=3, num_groups=2)
    tensors = random_tensors(identify(backbone), config, image_table(2), scale=0.2)
    write_checkpoint(
        tmp_path / "before", backbone=identify(backbone), config=config, tasks=image_table(2), tensors=tensors,
        calibration={"task-1": 1.5},
    )  # fmt: skip
    out = tmp_path / "after"
    arguments = ["merge", str(tmp_path / "before"), "--task", "bright", "--suite", str(suite), "--out", str(out),
                 "--mode", mode, "--backbone", str(backbone)]  # fmt: skip
    assert main([*arguments, "--set", "epochs=1", "--set", "threads=1", "--set", "dtype=float32"]) == 0
    printed = capsys.readouterr().out
    assert "other tasks: 2 tasks, 8 images, 20 logits" in printed
    if mode == "bias":
        assert "bit-identical before and after" in printed
    before, after = read_checkpoint(tmp_path / "before"), read_checkpoint(out, identify(backbone))
    assert [task.id for task in after.manifest.tasks] == ["task-0", "task-1", "bright"]
    assert after.manifest.calibration.keys() == {"task-1", "bright"}
    assert after.manifest.calibration["task-1"] == 1.5
    assert after.head("bright")[0].shape == (2, 64)
    assert after.head("bright")[0].abs().max() > 0
    for task in before.manifest.tasks:
        assert all(map(torch.equal, after.head(task.id), before.head(task.id)))
    # Check that the comparison can fail.
    examples = load_suite(str(suite)).examples("bright", "test", None)[:2]
    for spoiled in ("layers.0.mlp.lora_A", "heads.1.bias"):
        worse = {name: tensor + 0.01 if name == spoiled else tensor for name, tensor in after.tensors.items()}
        assert not compare_images(backbone, before, Checkpoint(after.manifest, worse), examples).identical

    assert main([*arguments[:1], str(out), *arguments[2:]]) == 2
    assert "the adapter has a task 'bright' already" in capsys.readouterr().err
    assert main([*arguments[:3], "object_counting", "--suite", "builtin", *arguments[6:]]) == 2
    assert "task object_counting: the adapter's tasks take images, this one takes text" in capsys.readouterr().err
