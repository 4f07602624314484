"""Folders that are no language backbone are refused in a line, by the trainer as by the server."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mtlora.backbone import vocabulary
from mtlora.errors import BackboneError
from mtlora.model.language import load_backbone
from tests.mtlora.vision.models import write_model


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [without_tokenizer, truncated])
def test_a_damaged_backbone_is_refused_by_name(
    tiny_backbone: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "backbone"))
    load_backbone(folder, torch.float32)
    damage(folder)
    with pytest.raises(BackboneError, match=r"backbone: no usable language backbone \(\w+: .{10,300}\)$") as failure:
        load_backbone(folder, torch.float32)
    assert "\n" not in str(failure.value)


def test_a_vision_backbone_is_refused_for_texts(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "sees", "dinov2")
    for use in (vocabulary, lambda folder: load_backbone(folder, torch.float32)):
        with pytest.raises(BackboneError, match="sees: model_type: found 'dinov2'; allowed for texts: a causal "):
            use(folder)
