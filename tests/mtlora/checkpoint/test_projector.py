"""Checkpoints of text tasks that take an image: the projector, and what is refused of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mtlora.checkpoint.convert import ConversionError, convert
from mtlora.checkpoint.format import CheckpointError
from mtlora.checkpoint.publish import publish
from mtlora.checkpoint.read import read_checkpoint
from mtlora.checkpoint.write import record_evaluation
from mtlora.cli import main
from mtlora.merge.extend import MergeError
from mtlora.merge.merge import merge
from mtlora.train.config import TrainingConfig
from tests.factories import (
    CONFIG,
    IDENTITY,
    PROJECTOR,
    edit_manifest,
    picture_table,
    picture_tensors,
    replace_tensors,
    write_random_pictures,
)

TASKS, TENSORS = picture_table(), picture_tensors()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_random_pictures(tmp_path / "a")
    return tmp_path / "a"


def test_a_projector_is_read_as_written(folder: Path) -> None:
    checkpoint = read_checkpoint(folder, IDENTITY)
    assert checkpoint.manifest.format_version == 2
    assert checkpoint.manifest.projector == PROJECTOR
    weight_DK, bias_D = checkpoint.projector
    assert weight_DK.shape == (IDENTITY.hidden_size, 4 * 6)
    assert torch.equal(weight_DK, TENSORS["projector.weight"])
    assert torch.equal(bias_D, TENSORS["projector.bias"])
    assert all(name.startswith("layers.") for name in checkpoint.paths)
    record_evaluation(folder, {"kept": True})
    assert read_checkpoint(folder).manifest.projector == PROJECTOR


def test_commands_take_a_projector(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    assert main(["inspect", str(folder)]) == 0
    assert "200 of projector" in capsys.readouterr().out
    assert read_checkpoint(publish(folder, tmp_path / "published")).manifest.projector == PROJECTOR


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("projector"), "projector: expected one, as task 'task-1' has a picture"),
        (lambda m: m["projector"].update(merge=3), r"projector.weight: expected shape \[8, 54\]"),
        (lambda m: m["projector"].update(merge=0), "projector.merge"),
        (lambda m: m["projector"].update(merge=9), "projector.merge"),
        (lambda m: m["projector"]["backbone"].update(hidden_size=7), "projector.weight: expected shape"),
        (lambda m: m["projector"].pop("backbone"), "projector.backbone"),
        (lambda m: m["projector"].update(norm=True), "projector.norm"),
        (lambda m: m.update(format_version=1), "format_version: expected 2, found 1"),
        (
            lambda m: [task.pop("picture") for task in m["tasks"][1:]],
            "format_version: expected 1|no task has a picture",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(edit: Any, message: str, folder: Path) -> None:
    edit_manifest(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"projector.bias": None}, "projector.bias: expected by the config, found none"),
        ({"projector.norm": torch.ones(2)}, "unexpected tensor 'projector.norm': this config has no such part"),
        ({"projector.weight": torch.full((8, 24), float("nan"))}, "projector.weight: expected finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, folder: Path) -> None:
    tensors = {name: tensor for name, tensor in (TENSORS | changed).items() if tensor is not None}
    replace_tensors(folder, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


def test_merge_and_convert_refuse_a_projector(folder: Path, tmp_path: Path) -> None:
    config = TrainingConfig(adapter=CONFIG, suite="builtin", tasks=("navigate",))
    with pytest.raises(MergeError, match="tasks that take text and an image"):
        merge(read_checkpoint(folder), tmp_path, tmp_path / "out", config)
    with pytest.raises(ConversionError, match="task task-1: picture: found one"):
        convert(tmp_path / "absent", tmp_path / "out", backbone=IDENTITY, tasks=TASKS)
