"""Fixtures of every test."""

import os
from pathlib import Path

import pytest

os.environ["TQDM_DISABLE"] = "1"


@pytest.fixture(scope="session")
def backbone() -> Path:
    """The prepared default backbone; made on first use."""
    from mtlora.backbone import resolve

    return resolve("default")
