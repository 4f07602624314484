"""Adapters that several servers serve."""

from pathlib import Path

import pytest

from tests.server.adapters import entry, write_adapter


@pytest.fixture(scope="session")
def adapters(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alpha: tasks with a bias each; beta: tasks without, in two versions; broken: cannot be read."""
    folder = tmp_path_factory.mktemp("adapters")
    alpha = [
        entry("sort_words", allowed_answers=("yes", "no")),
        entry("count_words", stop=(), max_new_tokens=8),
        entry("pair", template="First: {first}\nSecond: {second}\nAnswer:", max_new_tokens=8),
    ]
    write_adapter(folder / "alpha" / "1", alpha)
    write_adapter(folder / "beta" / "9", [entry("old")], task_bias=False)
    write_adapter(folder / "beta" / "10", [entry("echo"), entry("open", stop=(), max_new_tokens=16)], task_bias=False)
    write_adapter(folder / "broken" / "1", [entry("lost")])
    (folder / "broken" / "1" / "adapter.safetensors").write_bytes(b"not tensors")
    return folder
