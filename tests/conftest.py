"""Fixtures of every test."""

import os
from pathlib import Path

import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"
if not torch.cuda.is_available():
    # Triton looks at it when it is imported first, which any test may bring about.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def backbone() -> Path:
    """The prepared default backbone; made on first use."""
    from mtlora.backbone import resolve

    return resolve("default")
