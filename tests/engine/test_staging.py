"""Staging beside running steps."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mtlora.vllm_plugin.worker_manager import _stand_back


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
