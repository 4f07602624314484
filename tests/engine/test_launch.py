"""Settings that vLLM refuses."""

import os
from pathlib import Path
from unittest import mock

import pytest

from server.engine import Engine, EngineStartError
from server.settings import load_settings
from tests.engine._models import make_model


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    settings = load_settings({"adapters": tmp_path, "max_model_len": 1_000_000, "enforce_eager": False})
    engine = Engine(settings, make_model(tmp_path / "model", "llama"), on_stats=lambda _: None)
    with (
        mock.patch.dict(os.environ),
        pytest.raises(EngineStartError, match=r"(?s)the engine did not start.*max_model_len"),
    ):
        engine.start()
