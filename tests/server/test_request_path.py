"""How many files a request passes, from the interceptor's entry to vLLM's `generate`: counted while one runs."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType, MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import pytest

from mtlora.client import Client
from server.engine import Engine
from server.job import ServedTask
from server.registry.catalog import Catalog
from server.rpc.interceptor import CallInterceptor
from tests.server.adapters import entry
from tests.server.fakes import Service
from tests.server.slots import serving_version

ROOT = Path(__file__).parents[2]
# A tenant's fields, and the most files that its request passes.
BOUNDS = (
    ({}, 14),
    ({"requests_per_second": 100, "tokens_per_second": 10_000, "max_queue": 8, "daily_requests": 1000}, 18),
)


class Recorder:
    """The files of this project whose functions run in this thread between `begin` and `end`."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def begin(self) -> None:
        self.files.clear()
        sys.setprofile(self._note)

    def end(self) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        # The generated `__init__` of a data class stands in no file.
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in ("server", "mtlora"):
            self.files.add(str(file.relative_to(ROOT)))


# The part of vLLM that a request imports: the whole takes seconds.
VLLM: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.inputs": {"tokens_input": lambda prompt_ids, cache_salt: prompt_ids},
    "vllm.sampling_params": {
        "SamplingParams": SimpleNamespace,
        "RequestOutputKind": SimpleNamespace(DELTA=1, FINAL_ONLY=2),
    },
}


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, contents in VLLM.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def async_llm(recorder: Recorder) -> Any:
    """The part of AsyncLLM that the engine calls for a sequence: one that ends with its first token."""

    async def generate(prompt: Any, params: Any, request_id: str, *, lora_request: Any) -> AsyncIterator[Any]:
        recorder.end()
        completion = SimpleNamespace(
            text="x", token_ids=[1], logprobs=None, finish_reason="stop", cumulative_logprob=None
        )
        yield SimpleNamespace(outputs=[completion], metrics=None, num_cached_tokens=0, prompt_logprobs=None)

    return SimpleNamespace(generate=generate)


@pytest.mark.parametrize(("limits", "most_files"), BOUNDS)
async def test_a_request_passes_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], most_files: int
) -> None:
    """A unary call of a tenant with a key, on a server that has answered one before. One with limits has a deadline."""
    recorder = Recorder()
    service = Service.with_tenants(tmp_path, {"a": limits})
    engine = Engine(service.settings, tmp_path, lambda _: None)
    engine._llm = async_llm(recorder)
    service.use(engine)
    version = serving_version("alpha", "one")
    served = ServedTask(entry("one"), "alpha", "1", slot=version.slots["one"], version=version)
    service.servicer.catalog = Catalog(MappingProxyType({"one": served}))

    answer = CallInterceptor._answer

    async def recorded(*arguments: Any) -> Any:
        recorder.begin()
        return await answer(*arguments)

    monkeypatch.setattr(CallInterceptor, "_answer", recorded)
    async with service.running():
        with Client(service.address, service.access("a")) as client:
            for _ in range(2):
                reply = await asyncio.to_thread(client.generate, "one", "x", timeout=10 if limits else None)
    assert reply.text == "x"
    assert "server/engine/engine.py" in recorder.files
    assert len(recorder.files) <= most_files, sorted(recorder.files)
