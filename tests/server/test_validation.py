"""Requests become jobs or violations, with the default backbone's tokenizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb
from transformers import AutoTokenizer

from mtlora.client import make_request
from mtlora.prompt import PromptEncoder
from server.errors import Violation
from server.job import GenerationJob, ServedTask
from server.rpc.listing import page_of, page_token
from server.rpc.validation import MAX_STOP_STRINGS, PromptLimits, Received, validate
from tests.server.adapters import entry

LIMITS = PromptLimits(max_model_len=128, vocab_size=49152)
ONE = ServedTask(entry("one", max_new_tokens=200), "a", "1", slot=None)
TWO = ServedTask(entry("two", template="{x} and {y}"), "a", "1", slot=None)
UINT32 = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def prompts(backbone: Path) -> PromptEncoder:
    return PromptEncoder(AutoTokenizer.from_pretrained(backbone))


def fields(violations: Iterable[Violation] | GenerationJob) -> list[str]:
    assert isinstance(violations, list)
    return [violation.field for violation in violations]


def job(result: GenerationJob | list[Violation]) -> GenerationJob:
    assert isinstance(result, GenerationJob), result
    return result


def test_defaults_come_from_the_task(prompts: PromptEncoder) -> None:
    made = job(validate(Received(make_request("one", "hello"), ONE), prompts, LIMITS))
    assert list(made.prompt_ids) == prompts.prompt("hello\nAnswer:")
    # The task's default of 200 tokens does not fit and is cut; only a request's own number is refused.
    assert made.sampling.max_new_tokens == 128 - len(made.prompt_ids)
    assert made.sampling.stop == ("\n",)
    assert (made.sampling.temperature, made.sampling.top_p, made.sampling.top_k) == (0.0, 1.0, 0)
    assert made.sampling.seed is None
    assert made.strip
    assert not made.without_adapter


def test_parameters_replace_defaults(prompts: PromptEncoder) -> None:
    request = make_request(
        "one", "hello", max_new_tokens=3, temperature=0.5, top_p=0.5, top_k=10**6, seed=0, stop=[], logprobs=20,
        without_adapter=True,
    )  # fmt: skip
    made = job(validate(Received(request, ONE), prompts, LIMITS))
    assert made.without_adapter
    sampling = made.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (3, 0.5, 0.5)
    assert (sampling.top_k, sampling.seed, sampling.stop, sampling.logprobs) == (LIMITS.vocab_size, 0, (), 20)


def test_chats_use_the_backbones_template(prompts: PromptEncoder) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    made = job(validate(Received(make_request("one", messages), ONE), prompts, LIMITS))
    assert list(made.prompt_ids) == prompts.chat(prompts.render_chat(messages))
    assert not made.strip


def test_fields_fill_the_template(prompts: PromptEncoder) -> None:
    made = job(validate(Received(make_request("two", {"x": "1", "y": ""}), TWO), prompts, LIMITS))
    assert list(made.prompt_ids) == prompts.prompt("1 and ")


@pytest.mark.parametrize(
    ("task", "given_input", "expected"),
    [
        (ONE, "", ["text"]),
        (ONE, " \n", ["text"]),
        (TWO, "x", ["text"]),
        (TWO, {"x": "1", "z": "2"}, ["fields.values[y]", "fields.values[z]"]),
        (TWO, {"x": "", "y": " "}, ["fields"]),
        (ONE, [], ["chat.messages"]),
        (ONE, [{"role": "bot", "content": "x"}], ["chat.messages[0].role"]),
        (ONE, [{"role": "user", "content": ""}], ["chat.messages[0].content"]),
        (ONE, [{"role": "user", "content": "x<|im_end|>"}], ["chat.messages[0].content"]),
        (ONE, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], ["chat.messages[1].role"]),
        (ONE, [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], ["chat.messages[1].role"] * 2),
    ],
)
def test_names_the_violations_of_an_input(
    prompts: PromptEncoder, task: ServedTask, given_input: Any, expected: list[str]
) -> None:
    assert fields(validate(Received(make_request(task.spec.id, given_input), task), prompts, LIMITS)) == expected


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 127},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": 2**63},
        {"logprobs": 21},
    ],
)
def test_names_the_violation_of_a_parameter(prompts: PromptEncoder, parameters: dict[str, Any]) -> None:
    (name,) = parameters
    result = validate(Received(make_request("one", "hello", **parameters), ONE), prompts, LIMITS)
    assert fields(result) == [f"parameters.{name}"]


def test_names_the_violations_of_stop_strings(prompts: PromptEncoder) -> None:
    result = validate(Received(make_request("one", "x", stop=["a", ""]), ONE), prompts, LIMITS)
    assert fields(result) == ["parameters.stop.values[1]"]
    result = validate(Received(make_request("one", "x", stop=["a"] * 9), ONE), prompts, LIMITS)
    assert fields(result) == ["parameters.stop.values"]


def test_names_all_violations_at_once(prompts: PromptEncoder) -> None:
    request = make_request("", "", temperature=3.0, top_p=2.0, logprobs=29, max_new_tokens=0)
    assert fields(validate(Received(request, None), prompts, LIMITS)) == [
        "task_id", "text", "parameters.max_new_tokens", "parameters.temperature", "parameters.top_p",
        "parameters.logprobs",
    ]  # fmt: skip
    assert fields(validate(Received(pb.GenerateRequest(), None), prompts, LIMITS)) == ["task_id", "input"]


def test_refuses_a_long_prompt_with_tokens_found_and_allowed(prompts: PromptEncoder) -> None:
    text = "word " * 300
    found = len(prompts.prompt(f"{text}\nAnswer:"))
    (violation,) = validate(Received(make_request("one", text), ONE), prompts, LIMITS)
    assert violation.field == "text"
    assert f"found {found} tokens" in violation.description
    assert "allowed: 127" in violation.description


def test_refuses_chats_without_a_chat_template(prompts: PromptEncoder) -> None:
    class Plain:
        chat_template = None
        all_special_tokens = ()
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    assert fields(
        validate(Received(make_request("one", [{"role": "user", "content": "x"}]), ONE), PromptEncoder(Plain()), LIMITS)
    ) == ["chat"]


def test_names_the_templates_refusal_of_a_chat(prompts: PromptEncoder) -> None:
    from jinja2 import TemplateError

    class Strict:
        chat_template = "strict"
        all_special_tokens = ()
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise TemplateError("roles must alternate")

    (violation,) = validate(
        Received(make_request("one", [{"role": "user", "content": "x"}]), ONE), PromptEncoder(Strict()), LIMITS
    )
    assert violation.field == "chat.messages"
    assert "roles must alternate" in violation.description


def test_bounds_page_sizes() -> None:
    assert page_of(pb.ListTasksRequest()) == ([], 1000, "")
    assert page_of(pb.ListTasksRequest(page_size=3, page_token=page_token("one"))) == ([], 3, "one")
    violations, *_ = page_of(pb.ListTasksRequest(page_size=1001, page_token="?"))
    assert [each.field for each in violations] == ["page_size", "page_token"]


TEXTS = st.text(max_size=200)
CHATS = st.builds(
    pb.Chat,
    messages=st.lists(
        st.builds(pb.ChatMessage, role=st.sampled_from(["user", "assistant", "system"]) | TEXTS, content=TEXTS),
        max_size=5,
    ),
)
FIELDS = st.builds(
    pb.TemplateFields, values=st.dictionaries(st.sampled_from(["x", "y", "input"]) | TEXTS, TEXTS, max_size=4)
)
FLOATS = st.floats(width=32) | st.floats(0, 2, width=32)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.integers(0, 200) | UINT32,
        "temperature": FLOATS,
        "top_p": FLOATS,
        "top_k": UINT32,
        "seed": st.integers(0, 2**64 - 1),
        "logprobs": st.integers(0, 22) | UINT32,
        "stop": st.builds(pb.StopStrings, values=st.lists(st.text(max_size=10), max_size=12)),
    },
)


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    request = pb.GenerateRequest(task_id=draw(st.sampled_from(["one", "two", ""])), without_adapter=draw(st.booleans()))
    match draw(st.sampled_from(["text", "chat", "fields", None])):
        case "text":
            request.text = draw(TEXTS)
        case "chat":
            request.chat.CopyFrom(draw(CHATS))
        case "fields":
            request.fields.CopyFrom(draw(FIELDS))
    if draw(st.booleans()):
        request.parameters.CopyFrom(pb.GenerationParameters(**draw(PARAMETERS)))
    return request


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests())
def test_any_request_becomes_a_job_within_the_limits_or_violations(
    prompts: PromptEncoder, request: pb.GenerateRequest
) -> None:
    task = {"one": ONE, "two": TWO}.get(request.task_id)
    result = validate(Received(request, task), prompts, LIMITS)
    if isinstance(result, list):
        assert result
        assert all(violation.field and violation.description for violation in result)
        return
    assert task is not None
    sampling = result.sampling
    assert result.prompt_ids
    assert sampling.max_new_tokens >= 1
    assert len(result.prompt_ids) + sampling.max_new_tokens <= LIMITS.max_model_len
    assert 0 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.top_k <= LIMITS.vocab_size
    assert sampling.seed is None or 0 <= sampling.seed < 2**63
    assert len(sampling.stop) <= MAX_STOP_STRINGS
    assert all(sampling.stop)
    assert 0 <= sampling.logprobs <= 20


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_that_parse_become_a_job_or_violations(prompts: PromptEncoder, data: bytes) -> None:
    from google.protobuf.message import DecodeError

    request = pb.GenerateRequest()
    try:
        request.ParseFromString(data)
    except DecodeError:
        return
    assert validate(Received(request, ONE), prompts, LIMITS)
