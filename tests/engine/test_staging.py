"""Staging beside running steps."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mtlora.vllm_plugin.worker_manager import _stand_back


def test_it_takes_one_thread_where_vllm_lets_nobody_say_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            # As vLLM's CPU worker leaves it.
            patch.setattr(torch, "set_num_threads", lambda _: None)
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == 2
            with ThreadPoolExecutor(1, initializer=_stand_back) as pool:
                assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
