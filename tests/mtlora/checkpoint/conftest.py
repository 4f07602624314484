"""Fixtures of the checkpoint tests."""

from pathlib import Path

import pytest

from tests.factories import write_random


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint."""
    write_random(tmp_path / "good")
    return tmp_path / "good"
