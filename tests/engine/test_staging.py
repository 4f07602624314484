"""Staging beside running steps."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mtlora.vllm_plugin.worker_manager import _stand_back
from tests.engine._engine import running_engine
from tests.engine._models import make_model


def test_staging_uses_one_thread_although_vllm_disables_set_num_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            # vLLM's CPU worker does this.
            patch.setattr(torch, "set_num_threads", lambda _: None)
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == 2
            with ThreadPoolExecutor(1, initializer=_stand_back) as pool:
                assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_thread_that_begins_after_the_engine_has_one_openmp_thread(tmp_path: Path) -> None:
    """A second team of OpenMP threads would put the model's to sleep at every barrier."""
    torch._C.set_num_threads(2)
    try:
        with running_engine(make_model(tmp_path, "llama"), dtype="float32"), ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
    finally:
        torch._C.set_num_threads(1)
