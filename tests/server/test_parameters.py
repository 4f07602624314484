"""Sampling parameters beyond the plain ones: limits, contradictions, a task's own values, what the engine gets."""

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb
from pydantic import ValidationError

from mtlora.checkpoint.format import CheckpointError
from mtlora.client import make_request
from mtlora.parameters import MAX_LISTED, MAX_SAMPLES, TaskDefaults
from mtlora.prompt import PromptEncoder
from server.call import Call
from server.errors import Violation
from server.job import GenerationJob, Lane, MoreSampling, ServedTask
from server.registry.check import VerificationLimits, check
from server.rpc import encoding
from server.rpc.batch import samples
from server.rpc.generation import Generation
from server.rpc.parameters import _MAX_PROMPT_LOGITS
from server.rpc.validation import PromptLimits, Received, samples_of, validate
from server.telemetry.metrics import Metrics
from server.tenants import Tenant
from tests.server.adapters import entry, write_adapter
from tests.server.fakes import FakeTokenizer
from tests.server.slots import TINY

END = 5
LIMITS = PromptLimits(max_model_len=64, vocab_size=300, end_tokens=frozenset({END}))


class Tokenizer(FakeTokenizer):
    """Puts token 1 before a text; 1, 2 and 3 are special, 4 is a mark of the chat template."""

    all_special_ids: ClassVar[list[int]] = [1, 2]
    added_tokens_decoder: ClassVar[dict[int, Any]] = {
        1: SimpleNamespace(content="<s>", special=True),
        3: SimpleNamespace(content="<|user|>", special=True),
        4: SimpleNamespace(content="[INST]", special=False),
        6: SimpleNamespace(content="<think>", special=False),
    }

    def __call__(self, text: str, *, add_special_tokens: bool = False, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [*([1] if add_special_tokens else []), *map(ord, text)]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"[INST]{message['content']}" for message in messages)


PROMPTS = PromptEncoder(Tokenizer())


def served(**fields: Any) -> ServedTask:
    return ServedTask(entry("one", **fields), "a", "1", slot=None)


def result(task: ServedTask | None = None, input: Any = "x", *, stream: bool = False, **parameters: Any) -> Any:
    request = make_request("one", input, **parameters)
    return validate(Received(request, task or served(), stream=stream), PROMPTS, LIMITS)


def job(*arguments: Any, **named: Any) -> GenerationJob:
    made = result(*arguments, **named)
    assert isinstance(made, GenerationJob), made
    return made


def more(*arguments: Any, **named: Any) -> MoreSampling:
    sampled = job(*arguments, **named).sampling.more
    assert sampled is not None
    return sampled


NAN = float("nan")
HOT = {"temperature": 1.0}


@pytest.mark.parametrize(
    ("parameters", "field", "description"),
    [
        ({"n": 0}, "n", "found 0; allowed: 1 to 16"),
        ({"n": MAX_SAMPLES + 1, **HOT}, "n", "found 17; allowed: 1 to 16"),
        ({"best_of": 2**32 - 1, **HOT}, "best_of", "found 4.29497e+09; allowed: 1 to 16"),
        ({"n": 3, "best_of": 2, **HOT}, "best_of", "found 2; allowed: n, 3, or more"),
        ({"n": 2}, "n", "found 2 at temperature 0, where all samples are equal; allowed: 1"),
        ({"best_of": 2}, "best_of", "found 2 at temperature 0, where all samples are equal; allowed: 1"),
        ({"min_p": 1.5}, "min_p", "found 1.5; allowed: 0 to 1"),
        ({"min_p": NAN}, "min_p", "found nan; allowed: 0 to 1"),
        ({"presence_penalty": -2.5}, "presence_penalty", "found -2.5; allowed: -2 to 2"),
        ({"frequency_penalty": math.inf}, "frequency_penalty", "found inf; allowed: -2 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "found 0; allowed: 0.01 to 10"),
        ({"repetition_penalty": NAN}, "repetition_penalty", "found nan; allowed: 0.01 to 10"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "found 21; allowed: 0 to 20"),
        ({"priority": 101}, "priority", "found 101; allowed: -100 to 100"),
        ({"priority": -(2**31)}, "priority", "found -2.14748e+09; allowed: -100 to 100"),
        ({"logit_bias": {300: 1.0}}, "logit_bias.values[300]", "found 300, which is no token; allowed: 0 to 299"),
        ({"logit_bias": {7: 101.0}}, "logit_bias.values[7]", "found 101; allowed: -100 to 100"),
        ({"logit_bias": {7: NAN}}, "logit_bias.values[7]", "found nan; allowed: -100 to 100"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias.values", "found 1025; allowed: up to 1024"),
        ({"allowed_tokens": [7, 999]}, "allowed_tokens.values[1]", "found 999, which is no token; allowed: 0 to 299"),
        ({"allowed_tokens": [7] * 1025}, "allowed_tokens.values", "found 1025; allowed: up to 1024"),
        (
            {"banned_tokens": [2**32 - 1]},
            "banned_tokens.values[0]",
            "found 4294967295, which is no token; allowed: 0 to 299",
        ),
        ({"stop_token_ids": [300]}, "stop_token_ids.values[0]", "found 300, which is no token; allowed: 0 to 299"),
        ({"stop_token_ids": [7] * 65}, "stop_token_ids.values", "found 65; allowed: up to 64"),
        (
            {"allowed_tokens": [7, 8], "banned_tokens": [8]},
            "allowed_tokens",
            "found 8, which banned_tokens has too; allowed: each in one of the two",
        ),
        ({"banned_tokens": list(range(300))}, "banned_tokens.values", "found every token; allowed: fewer"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens", "found 9; allowed: 0 to 8, max_new_tokens"),
        (
            {"min_new_tokens": 1, "allowed_tokens": [END]},
            "min_new_tokens",
            "found 1, where every allowed token ends the answer; allowed: 0",
        ),
        (
            {"min_new_tokens": 1, "allowed_tokens": [7, 8], "stop_token_ids": [7, 8]},
            "min_new_tokens",
            "found 1, where every allowed token ends the answer; allowed: 0",
        ),
    ],
)
def test_names_what_is_wrong(parameters: dict[str, Any], field: str, description: str) -> None:
    assert result(**parameters) == [Violation(f"parameters.{field}", description)]


def test_the_engine_has_room_for_so_many_changed_logits() -> None:
    """Biases and bans share it, and a worker that has none left ends the engine."""
    limits = PromptLimits(max_model_len=64, vocab_size=5000)
    request = make_request("one", "x", logit_bias=dict.fromkeys(range(1000), 1.0), banned_tokens=list(range(990, 1025)))
    assert validate(Received(request, served()), PROMPTS, limits) == [
        Violation("parameters.logit_bias.values", "found 1025 tokens together with banned_tokens; allowed: up to 1024")
    ]
    request.parameters.banned_tokens.values.pop()
    assert isinstance(validate(Received(request, served()), PROMPTS, limits), GenerationJob)


def test_bounds_the_logits_of_a_prompt() -> None:
    vocab_size = _MAX_PROMPT_LOGITS // 4
    limits = PromptLimits(max_model_len=64, vocab_size=vocab_size)
    task = served(template="{input}")
    fits, long = (make_request("one", text, prompt_logprobs=1) for text in ("xyz", "wxyz"))
    assert isinstance(validate(Received(fits, task), PROMPTS, limits), GenerationJob)
    assert validate(Received(long, task), PROMPTS, limits) == [
        Violation("parameters.prompt_logprobs", "found a prompt of 5 tokens; allowed: up to 4")
    ]


def test_a_valid_request_reaches_the_job_whole() -> None:
    made = job(
        n=2, best_of=3, temperature=1.0, seed=2**63 - 1, min_p=0.5, presence_penalty=-2.0, frequency_penalty=2.0,
        repetition_penalty=1.5, logit_bias={7: -100.0}, allowed_tokens=[7, 8], banned_tokens=[9], stop_token_ids=[8],
        min_new_tokens=1, prompt_logprobs=20, return_token_ids=True, priority=-3,
    )  # fmt: skip
    assert (made.n, made.best_of, made.return_token_ids, made.priority) == (2, 3, True, -3)
    assert made.sampling.more == MoreSampling(
        min_p=0.5, presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=1.5, logit_bias={7: -100.0},
        allowed_tokens=(7, 8), banned_tokens=(9,), stop_token_ids=(8,), min_new_tokens=1, prompt_logprobs=20,
        cumulative_logprob=True,
    )  # fmt: skip
    first, *others = [each.job for each in samples(Generation(made, Call("id", "Generate"), Metrics()))]
    assert first is made
    assert [each.sampling.seed for each in others] == [0, 1]
    assert all(each.sampling.more and each.sampling.more.prompt_logprobs == 0 for each in others)


def test_a_plain_request_carries_nothing_more() -> None:
    made = job(temperature=0.5, seed=1, logprobs=2, max_new_tokens=3, top_k=3, top_p=0.5, stop=["x"])
    assert made.sampling.more is None
    assert (made.n, made.best_of, made.priority) == (1, 1, 0)


DEFAULTS: dict[str, Any] = {
    "temperature": 0.5, "top_k": 10**6, "n": 2, "best_of": 4, "banned_tokens": [7], "logit_bias": {8: 2.0},
    "priority": 3, "min_new_tokens": 2, "logprobs": 1,
}  # fmt: skip


def test_a_tasks_own_values_are_the_defaults() -> None:
    task = served(defaults=DEFAULTS)
    made = job(task)
    assert (made.n, made.best_of, made.priority) == (2, 4, 3)
    sampling = made.sampling
    assert (sampling.temperature, sampling.top_k, sampling.logprobs) == (0.5, 300, 1)
    assert more(task).banned_tokens == (7,)
    # Empty lists, and 0, are values too.
    changed = job(task, banned_tokens=[], logit_bias={}, priority=0, logprobs=0, n=1, best_of=1, temperature=0.0)
    assert (changed.n, changed.priority, changed.sampling.temperature, changed.sampling.logprobs) == (1, 0, 0.0, 0)
    assert changed.sampling.more == MoreSampling(min_new_tokens=2)
    # The task draws at least as many samples as a request answers with.
    assert [job(task, n=n).best_of for n in (1, 4, 6)] == [4, 4, 6]
    assert samples_of(make_request("one", "x", n=6), task) == 6
    streamed = job(task, stream=True)
    assert (streamed.n, streamed.best_of) == (1, 1)


def test_a_request_may_contradict_its_task() -> None:
    assert result(served(defaults=DEFAULTS), allowed_tokens=[7, 8]) == [
        Violation("parameters.allowed_tokens", "found 7, which banned_tokens has too; allowed: each in one of the two")
    ]
    assert result(served(defaults=DEFAULTS), max_new_tokens=1) == [
        Violation("parameters.min_new_tokens", "found 2; allowed: 0 to 1, max_new_tokens")
    ]


def test_the_contract_shows_a_tasks_own_values() -> None:
    shown = encoding.task(served(defaults=DEFAULTS)).defaults
    assert (shown.n, shown.best_of, shown.priority, shown.min_new_tokens) == (2, 4, 3, 2)
    assert list(shown.banned_tokens.values) == [7]
    assert dict(shown.logit_bias.values) == {8: 2.0}
    assert not shown.HasField("min_p")
    assert not encoding.task(served()).HasField("defaults")


@pytest.mark.parametrize(
    ("defaults", "reason"),
    [
        ({"n": 2}, "n: found 2 at temperature 0"),
        ({"n": 3, "best_of": 2, "temperature": 1}, "best_of: found 2; allowed: n, 3, or more"),
        ({"allowed_tokens": [1], "banned_tokens": [1]}, "allowed_tokens: found 1, which banned_tokens has too"),
        ({"min_new_tokens": 33}, "min_new_tokens: found 33, above max_new_tokens, 32"),
        ({"n": 17}, "less than or equal to 16"),
        ({"logit_bias": {"7": 101}}, "less than or equal to 100"),
        ({"logit_bias": {"-7": 1}}, "greater than or equal to 0"),
        ({"presence_penalty": 3}, "less than or equal to 2"),
        ({"stop_token_ids": [7] * 65}, "at most 64 items"),
        ({"surprise": 1}, "Extra inputs are not permitted"),
    ],
)
def test_a_tasks_own_values_are_checked_with_it(defaults: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        entry("one", defaults=defaults)


def test_a_task_without_defaults_is_written_as_before() -> None:
    assert "defaults" not in entry("one").model_dump(mode="json")
    written = entry("one", defaults=DEFAULTS).model_dump_json()
    assert type(entry("one")).model_validate_json(written) == entry("one", defaults=DEFAULTS)


def test_a_version_that_names_tokens_beyond_the_vocabulary_is_refused(tmp_path: Any) -> None:
    folder = tmp_path / "a" / "1"
    write_adapter(folder, [entry("one", defaults={"banned_tokens": [300]})], backbone=TINY)
    (tmp_path / "in").mkdir()
    with pytest.raises(CheckpointError, match=r"task one: defaults: found token 300, expected .* 0 to 299"):
        check(tmp_path, folder, tmp_path / "in", {Lane.TEXT: TINY}, VerificationLimits(1 << 20, tokens=300))
    (tmp_path / "other").mkdir()
    assert check(tmp_path, folder, tmp_path / "other", {Lane.TEXT: TINY}, VerificationLimits(1 << 20, tokens=301))


# Token ids as an input.


def of_ids(ids: list[int], tenant: Tenant | None = None) -> Any:
    request = pb.GenerateRequest(task_id="one")
    request.token_ids.values.extend(ids)
    return validate(Received(request, served(), tenant or Tenant(id="a", token_ids=True)), PROMPTS, LIMITS)


@pytest.mark.parametrize(
    ("ids", "field", "description"),
    [
        ([], "token_ids", "found 0 tokens; allowed: at least 1"),
        ([7, 300], "token_ids.values[1]", "found 300, which is no token; allowed: 0 to 299"),
        # A chat's marks, and ends of texts, wherever they are; only what the tokenizer puts first may be first.
        ([7, 1], "token_ids.values[1]", "found 1, a special token; allowed: ordinary tokens"),
        ([1, 1], "token_ids.values[1]", "found 1, a special token; allowed: ordinary tokens"),
        ([2, 7], "token_ids.values[0]", "found 2, a special token; allowed: ordinary tokens"),
        ([1, 3, 7], "token_ids.values[1]", "found 3, a special token; allowed: ordinary tokens"),
        ([4, 7], "token_ids.values[0]", "found 4, a special token; allowed: ordinary tokens"),
        ([7] * 64, "token_ids", "prompt is too long: found 64 tokens with the template; allowed: 63"),
    ],
)
def test_refuses_ids_that_no_text_becomes(ids: list[int], field: str, description: str) -> None:
    assert of_ids(ids) == [Violation(field, description)]


def test_ids_are_the_whole_prompt() -> None:
    assert of_ids([7, 8]).prompt_ids == (7, 8)
    assert of_ids([1, 7, 6]).prompt_ids == (1, 7, 6)


def test_only_some_tenants_may_send_ids() -> None:
    assert of_ids([7], Tenant(id="a")) == [
        Violation("token_ids", "found in a request of a tenant without `token_ids`; allowed: text, chat, fields")
    ]


TOKENS = st.lists(st.integers(0, 310), max_size=20)


@given(ids=TOKENS)
def test_no_ids_smuggle_a_special_token(ids: list[int]) -> None:
    made = of_ids(ids)
    if isinstance(made, GenerationJob):
        assert made.prompt_ids == tuple(ids)
        assert not {1, 2, 3, 4} & set(ids[1:])
        assert ids[0] not in (2, 3, 4)


FLOATS = st.floats(width=32) | st.floats(-2, 2, width=32)
LISTS = st.lists(st.integers(0, 310), max_size=70)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(0, 20), "best_of": st.integers(0, 20), "temperature": st.floats(0, 2, width=32),
        "min_p": FLOATS, "presence_penalty": FLOATS, "frequency_penalty": FLOATS, "repetition_penalty": FLOATS,
        "allowed_tokens": LISTS,
        "banned_tokens": LISTS, "stop_token_ids": LISTS, "min_new_tokens": st.integers(0, 70),
        "logit_bias": st.dictionaries(st.integers(0, 310), FLOATS, max_size=5), "prompt_logprobs": st.integers(0, 22),
        "priority": st.integers(-200, 200), "logprobs": st.integers(0, 22),
    },
)  # fmt: skip


@given(parameters=PARAMETERS, stream=st.booleans())
def test_any_parameters_become_a_job_that_the_engine_can_run_or_violations(
    parameters: dict[str, Any], stream: bool
) -> None:
    made = result(stream=stream, **parameters)
    if isinstance(made, list):
        assert made
        assert all(violation.field.startswith("parameters.") for violation in made)
        return
    assert 1 <= made.n <= made.best_of <= (1 if stream else MAX_SAMPLES)
    sampling = made.sampling
    sampled = sampling.more or MoreSampling()
    assert made.best_of == 1 or sampling.temperature > 0
    assert sampled.min_new_tokens <= sampling.max_new_tokens
    # Every request leaves a token to choose.
    left = (set(sampled.allowed_tokens) or set(range(300))) - set(sampled.banned_tokens)
    assert left
    if sampled.min_new_tokens:
        assert left - {END} - set(sampled.stop_token_ids)
    assert len(sampled.logit_bias.keys() | set(sampled.banned_tokens)) <= MAX_LISTED


def test_defaults_name_their_largest_token() -> None:
    assert TaskDefaults().largest_token == -1
    assert TaskDefaults(logit_bias={9: 1.0}, banned_tokens=(4,), stop_token_ids=(12,)).largest_token == 12
