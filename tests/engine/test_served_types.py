"""vLLM's own server: a request for a task's module is held to the task's type."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from mtlora.vllm_plugin import served_types
from mtlora.vllm_plugin.served_types import FREE, typed
from mtlora.vllm_plugin.typed import _compile, constraint_of
from tests.server.adapters import entry, write_adapter

_LABEL = {"type": "label", "labels": ["a", "b"]}
_SCHEMA = {"type": "object", "properties": {"open": {"const": True}}, "required": ["open"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("typed") / "1"
    record = entry("record", answer={"type": "json", "schema": _SCHEMA})
    write_adapter(made, [entry("label", answer=_LABEL), record, entry("open")])
    return made


class Engine:
    """A client of vLLM's of an engine whose answers take five tokens."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    async def call_utility_async(self, method: str, *given: Any) -> Any:
        self.calls.append((method, *given))
        if method == "add_lora":
            return True
        inspect.signature(_compile).bind(self, *given)
        return [5] * len(given[0])


@pytest.mark.parametrize("by_name", [False, True])
def test_the_module_tells_the_task(folder: Path, by_name: bool) -> None:
    request = LoRARequest("label", 1, str(folder)) if by_name else LoRARequest("any", 1, f"{folder}#label")
    params = SamplingParams(stop=["\n"])
    held = typed(params, request)
    constraint = entry("label", answer=_LABEL).constraint()
    assert constraint is not None
    assert constraint_of(held) == constraint.text
    # The caller's own parameters stay as they are.
    assert params.structured_outputs is None
    assert typed(held, request) is held


def test_other_modules_and_free_requests_are_left_alone(folder: Path, tmp_path: Path) -> None:
    params = SamplingParams(extra_args={FREE: 1})
    assert typed(params, LoRARequest("label", 1, str(folder))) is params
    for request in (LoRARequest("open", 1, str(folder)), LoRARequest("label", 1, str(tmp_path))):
        assert typed(SamplingParams(stop=["x"]), request).structured_outputs is None


@pytest.mark.parametrize(
    "given",
    [
        {"stop": ["x"]}, {"stop_token_ids": [1]}, {"min_tokens": 2}, {"allowed_token_ids": [1]}, {"bad_words": ["x"]},
        {"structured_outputs": StructuredOutputsParams(regex="a|b|c")},
    ],
)  # fmt: skip
def test_refuses_what_contradicts_the_type(folder: Path, given: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError, match="task label has a type"):
        typed(SamplingParams(**given), LoRARequest("label", 1, str(folder)))


async def test_the_load_of_a_module_compiles_its_type(folder: Path) -> None:
    engine, label, untyped = Engine(), LoRARequest("label", 1, str(folder)), LoRARequest("open", 2, str(folder))
    for request in (label, untyped):
        assert await served_types._add_lora_async(engine, request)
    constraint = entry("label", answer=_LABEL).constraint()
    assert constraint is not None
    assert engine.calls == [("mtlora_compile", [constraint.text], True), ("add_lora", label), ("add_lora", untyped)]


async def test_a_type_that_the_engine_refuses_loads_nothing(folder: Path) -> None:
    class Refusing(Engine):
        async def call_utility_async(self, method: str, *given: Any) -> Any:
            await super().call_utility_async(method, *given)
            raise ValueError("too many states")

    engine = Refusing()
    with pytest.raises(ValueError, match="too many states"):
        await served_types._add_lora_async(engine, LoRARequest("label", 1, str(folder)))
    assert [method for method, *_ in engine.calls] == ["mtlora_compile"]


@pytest.mark.parametrize(("max_tokens", "prompt"), [(4, 10), (100, 96)])
async def test_refuses_fewer_tokens_than_the_shortest_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int, prompt: int
) -> None:
    def process(processor: Any, request_id: str, prompt: Any, params: SamplingParams, *more: Any) -> SimpleNamespace:
        return SimpleNamespace(sampling_params=params, prompt_token_ids=prompt, prompt_embeds=None)

    monkeypatch.setattr(served_types, "_processed", process)
    processor = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))
    label = LoRARequest("label", 1, str(folder))
    await served_types._add_lora_async(Engine(), label)

    def ask(tokens: int, length: int, **extra: Any) -> Any:
        params = SamplingParams(max_tokens=tokens, **extra)
        return served_types._process_inputs(processor, "id", [1] * length, params, (), None, label)

    with pytest.raises(VLLMValidationError, match="max_tokens: found 4, the context included; allowed: 5 or more"):
        ask(max_tokens, prompt)
    assert ask(max_tokens, prompt, extra_args={FREE: 1})
    assert ask(max_tokens + 1, prompt - 1)


@pytest.mark.parametrize("as_text", [False, True])
def test_takes_the_tasks_own_schema(folder: Path, as_text: bool) -> None:
    schema = dict(reversed(_SCHEMA.items()))
    given = StructuredOutputsParams(json=json.dumps(schema) if as_text else schema)
    held = typed(SamplingParams(structured_outputs=given), LoRARequest("record", 1, str(folder)))
    constraint = entry("record", answer={"type": "json", "schema": _SCHEMA}).constraint()
    assert constraint is not None
    assert constraint_of(held) == constraint.text


@pytest.mark.parametrize(
    "given",
    [
        {"json": {**_SCHEMA, "properties": {"open": {"const": 1}}}}, {"json": "{"}, {"json_object": True},
        {"json": _SCHEMA, "whitespace_pattern": " "},
    ],
)  # fmt: skip
def test_refuses_other_schemas_than_the_tasks(folder: Path, given: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**given))
    with pytest.raises(VLLMValidationError, match="structured_outputs: task record has a type"):
        typed(params, LoRARequest("record", 1, str(folder)))
