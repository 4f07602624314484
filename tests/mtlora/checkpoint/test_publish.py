"""Publishing numbers versions upwards and never shows half a checkpoint."""

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
