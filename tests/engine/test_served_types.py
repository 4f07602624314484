"""vLLM's own server: a request for a task's module is held to the task's type."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from mtlora.vllm_plugin.served_types import FREE, typed
from mtlora.vllm_plugin.typed import constraint_of
from tests.server.adapters import entry, write_adapter

_LABEL = {"type": "label", "labels": ["a", "b"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("typed") / "1"
    write_adapter(made, [entry("label", answer=_LABEL), entry("open")])
    return made


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
