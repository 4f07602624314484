"""A reader meets the old checkpoint or the new one, also through links."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlora.checkpoint.read
import mtlora.files
from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE, CheckpointError
from mtlora.checkpoint.read import read_checkpoint
from tests.factories import (
    CONFIG,
    random_tensors,
    write_random,
)
from tests.mtlora.checkpoint.damage import NAMED


def mounted(root: Path, *seeds: int) -> Path:
    """A folder as Kubernetes mounts a ConfigMap: files are links through `..data` to a dated folder."""
    mount = root / "mount"
    for seed in seeds:
        write_random(mount / f"..{seed}", seed=seed)
    (mount / "..data").symlink_to(f"..{seeds[0]}")
    for name in (MANIFEST_FILE, TENSORS_FILE):
        (mount / name).symlink_to(f"..data/{name}")
    return mount


def flip(mount: Path, seed: int) -> None:
    (mount / "..new").symlink_to(f"..{seed}")
    os.rename(mount / "..new", mount / "..data")


def test_reads_a_mounted_config_map(tmp_path: Path) -> None:
    mount = mounted(tmp_path, 0, 1)
    assert read_checkpoint(mount).manifest.training == {"seed": 0}
    flip(mount, 1)
    assert read_checkpoint(mount).manifest.training == {"seed": 1}


def test_reads_a_folder_that_is_a_link(tmp_path: Path) -> None:
    write_random(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    assert read_checkpoint(tmp_path / "current").manifest.training == {"seed": 0}


@pytest.mark.parametrize("flips", [1, 3])
def test_reads_again_after_a_flip_between_the_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flips: int
) -> None:
    mount = mounted(tmp_path, 0, 1)
    original, left = mtlora.checkpoint.read.open_file, [flips]

    def opened(folder: Path, name: str) -> Any:
        if name == TENSORS_FILE and left[0]:
            left[0] -= 1
            flip(mount, (left[0] + 1) % 2)
        return original(folder, name)

    monkeypatch.setattr(mtlora.checkpoint.read, "open_file", opened)
    checkpoint = read_checkpoint(mount)
    assert torch.equal(checkpoint.tensors[NAMED], random_tensors(seed=checkpoint.manifest.training["seed"])[NAMED])
    assert left == [0]


@pytest.mark.parametrize("change", [-1, 1])
def test_refuses_a_file_that_grows_or_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    config = CONFIG.model_copy(update={"r": 512})  # More than the reader's buffer.
    write_random(tmp_path, config=config, tensors=random_tensors(config))
    original = mtlora.checkpoint.read._layout

    def resized(path: Path, *args: Any) -> Any:
        layout = original(path, *args)
        os.truncate(path, path.stat().st_size + change)
        return layout

    monkeypatch.setattr(mtlora.checkpoint.read, "_layout", resized)
    # The reader tries again because the file changed; then the file does not match its header.
    with pytest.raises(CheckpointError, match="bytes of tensors, found"):
        read_checkpoint(tmp_path)


def test_tensors_do_not_change_with_the_file(folder: Path) -> None:
    tensors = read_checkpoint(folder).tensors
    with (folder / TENSORS_FILE).open("r+b") as file:
        file.write(b"\xff" * (folder / TENSORS_FILE).stat().st_size)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in random_tensors().items())
