"""Adapters that several servers serve."""

from pathlib import Path

import pytest

from mtlora.backbone import BackboneIdentity, identify
from tests.server.adapters import entry, write_adapter


@pytest.fixture(scope="session")
def adapters(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_adapters`."""
    return write_adapters(tmp_path_factory.mktemp("adapters"), identify(backbone))


@pytest.fixture(scope="session")
def short_adapters(short_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the short backbone."""
    return write_adapters(tmp_path_factory.mktemp("short-adapters"), identify(short_backbone))


def write_adapters(folder: Path, backbone: BackboneIdentity) -> Path:
    """alpha: tasks with a bias each; beta: tasks without, in two versions; broken: cannot be read."""
    alpha = [
        entry("sort_words", allowed_answers=("yes", "no")),
        entry("count_words", stop=(), max_new_tokens=8),
        entry("pair", template="First: {first}\nSecond: {second}\nAnswer:", max_new_tokens=8),
    ]
    beta = [entry("echo"), entry("open", stop=(), max_new_tokens=16)]
    write_adapter(folder / "alpha" / "1", alpha, backbone=backbone)
    write_adapter(folder / "beta" / "9", [entry("old")], task_bias=False, backbone=backbone)
    write_adapter(folder / "beta" / "10", beta, task_bias=False, backbone=backbone)
    write_adapter(folder / "broken" / "1", [entry("lost")], backbone=backbone)
    (folder / "broken" / "1" / "adapter.safetensors").write_bytes(b"not tensors")
    return folder
