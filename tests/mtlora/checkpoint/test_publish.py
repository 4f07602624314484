"""Publishing numbers versions upwards and never shows half a checkpoint."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtlora.checkpoint.format import CheckpointError
from mtlora.checkpoint.publish import publish
from mtlora.checkpoint.read import read_checkpoint
from mtlora.errors import MtLoRAError
from tests.factories import write_random


def test_versions_count_upwards(tmp_path: Path) -> None:
    source, adapter = tmp_path / "source", tmp_path / "adapters" / "mine"
    manifest = write_random(source)
    assert publish(source, adapter) == adapter / "1"
    (adapter / "9").mkdir()
    (adapter / "notes").mkdir()
    assert publish(source, adapter) == adapter / "10"
    assert read_checkpoint(adapter / "10").manifest == manifest
    assert sorted(path.name for path in adapter.iterdir()) == ["1", "10", "9", "notes"]


def test_refuses_to_publish_a_damaged_checkpoint(tmp_path: Path) -> None:
    source, adapter = tmp_path / "source", tmp_path / "mine"
    write_random(source)
    with pytest.raises(MtLoRAError, match="a checkpoint; expected an adapter's folder"):
        publish(source, source)
    (source / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        publish(source, adapter)
    assert not adapter.exists()


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("strict_umask")
def test_every_user_may_read_what_is_written_and_published(tmp_path: Path) -> None:
    write_random(tmp_path / "source")
    version = publish(tmp_path / "source", tmp_path / "adapters" / "mine")
    modes = {
        str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777)
        for folder in (tmp_path / "source", version)
        for path in (folder, folder.parent, *folder.iterdir())
        if path != tmp_path
    }
    assert modes == {
        "source": "0o755",
        "source/adapter.json": "0o644",
        "source/adapter.safetensors": "0o644",
        "adapters/mine": "0o755",
        "adapters/mine/1": "0o755",
        "adapters/mine/1/adapter.json": "0o644",
        "adapters/mine/1/adapter.safetensors": "0o644",
    }
    assert oct((tmp_path / "adapters").stat().st_mode & 0o777) == "0o755"
