"""Engines in these tests run inside the test's process, which makes a start a matter of seconds."""

import os
from collections.abc import Iterator

import pytest
import torch

# Only for this package: other tests start engines as in production.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "0"),
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@pytest.fixture(scope="package", autouse=True)
def _environment() -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)
