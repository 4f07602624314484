"""Kernels run in two threads, which a worker of pytest-xdist would not give them."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    # vLLM makes the public function do nothing.
    torch._C.set_num_threads(2)
    yield
    torch._C.set_num_threads(threads)
