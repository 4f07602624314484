"""A checkpoint is written whole or not at all, and replaces only another checkpoint."""

import errno
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlora.checkpoint.read
import mtlora.files
from mtlora.checkpoint.format import CheckpointError
from mtlora.checkpoint.read import read_checkpoint, read_manifest
from tests.factories import (
    CONFIG,
    IDENTITY,
    random_tensors,
    task_table,
    write_random,
)
from tests.mtlora.checkpoint.damage import NAMED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": random_tensors() | {NAMED: torch.zeros(3, 8, 3)}}, f"{NAMED}: expected shape"),
        ({"tensors": random_tensors() | {NAMED: torch.full((3, 8, 2), math.nan)}}, f"{NAMED}: expected finite"),
        ({"tensors": random_tensors() | {NAMED: torch.zeros(3, 8, 2).double()}}, f"{NAMED}: expected dtype"),
        ({"tensors": random_tensors() | {"more": torch.zeros(1)}}, "tensor 'more'"),
        ({"tensors": {}}, "lora_A: expected by the config, found none"),
        ({"tasks": task_table(2)}, "task_bias: expected shape"),
        ({"tasks": task_table(3, biased=False)}, "bias_index: expected 0 to 2"),
        ({"tasks": ()}, "tasks"),
        ({"config": CONFIG.model_copy(update={"num_groups": 3})}, "num_groups 3 does not divide"),
        ({"training": {"loss": math.nan}}, "training"),
    ],
)
def test_refuses_to_write_what_could_not_be_read(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_random(tmp_path / "a", seed=5)
    with pytest.raises(CheckpointError) as caught:
        write_random(tmp_path / "a", **change)
    assert message in str(caught.value)
    assert "made" not in str(caught.value)
    assert read_checkpoint(tmp_path / "a").manifest.training == {"seed": 5}
    assert os.listdir(tmp_path) == ["a"]


def test_replaces_a_checkpoint(folder: Path) -> None:
    write_random(folder, seed=1)
    assert read_checkpoint(folder).manifest.training == {"seed": 1}
    assert os.listdir(folder.parent) == ["good"]


def test_replaces_in_one_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "one").mkdir()
    (folder.parent / "other").mkdir()
    try:
        mtlora.files._exchange(folder.parent / "one", folder.parent / "other")
    except OSError as error:
        pytest.skip(f"this file system cannot exchange two folders: {error}")

    def rename(*args: Any) -> None:
        raise AssertionError("two renames, between which the checkpoint is absent")

    monkeypatch.setattr(os, "rename", rename)
    write_random(folder, seed=1)
    assert read_checkpoint(folder).manifest.training == {"seed": 1}


def test_replaces_the_target_of_a_link(tmp_path: Path) -> None:
    write_random(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    write_random(tmp_path / "current", seed=1)
    assert (tmp_path / "current").is_symlink()
    assert read_manifest(tmp_path / "v1").training == {"seed": 1}


@pytest.mark.parametrize("name", ["notes.txt", ".git", "adapter.json.bak"])
def test_never_replaces_a_folder_of_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "home" / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"home: not replaced: holds '{name}', which is not a checkpoint file"):
        write_random(tmp_path / "home")
    assert os.listdir(tmp_path / "home") == [name]


def test_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a folder or nothing, found a file"):
        write_random(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_random(tmp_path / "a" / "b")


def test_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_random(tmp_path / "a")
    assert read_manifest(tmp_path / "a").training == {"seed": 0}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_any_call_leaves_the_old_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Without an exchange, there are two renames: each rename, and each fsync before them, fails once."""

    def no_exchange(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "no exchange here")

    monkeypatch.setattr(mtlora.files, "_exchange", no_exchange)
    original, calls = getattr(os, call), 0
    for failing in range(10):
        calls = 0

        def flaky(*args: Any, failing: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(errno.EIO, "disk on fire")
            return original(*args)

        monkeypatch.setattr(os, call, flaky)
        try:
            write_random(folder, seed=1)
        except CheckpointError:
            # The last fsync, of the parent, comes after the new checkpoint is in place.
            assert read_checkpoint(folder).manifest.training["seed"] == (1 if call == "fsync" and calls == 4 else 0)
            assert os.listdir(folder.parent) == ["good"]
        else:
            break
    assert failing == {"fsync": 4, "rename": 2}[call]
    assert read_checkpoint(folder).manifest.training == {"seed": 1}
    assert os.listdir(folder.parent) == ["good"]


def _write_for_ever(folder: Path) -> None:
    seed = 0
    while True:
        seed += 1
        write_random(folder, seed=seed)


@pytest.mark.slow
def test_readers_and_kills_see_only_whole_checkpoints(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    reads, seeds = 0, set()
    for attempt in range(8):
        writer = context.Process(target=_write_for_ever, args=(folder,))
        writer.start()
        until = time.monotonic() + 0.05 + 0.013 * attempt
        # A writer that gets no core writes nothing for a while.
        while time.monotonic() < until or len(seeds) <= attempt / 3:
            checkpoint = read_checkpoint(folder, IDENTITY)
            reads += 1
            seeds.add(checkpoint.manifest.training["seed"])
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        checkpoint = read_checkpoint(folder, IDENTITY)
        seed = checkpoint.manifest.training["seed"]
        assert all(torch.equal(checkpoint.tensors[n], t) for n, t in random_tensors(seed=seed).items())
    assert reads > 8
    assert len(seeds) > 2
