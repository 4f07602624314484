"""The servicer and the interceptor, over gRPC, around a fake engine."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from mtlora.client import AsyncClient, ServerError, make_request
from mtlora.task import TaskSpec
from server.errors import EngineAbortedError, EngineDeadError
from server.job import Delta, TokenLogprob, TokenLogprobs
from server.rpc.generation import AnswerSplitter
from server.scheduling.admission import State
from server.telemetry.logs import JsonFormatter
from tests.server.fakes import Service
from tests.waiting import eventually


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service().running() as service:
        yield service


async def ask(client: AsyncClient, *, stream: bool, timeout: float | None = None) -> None:
    """Ask the same by either method, to the end."""
    if stream:
        async for _ in client.stream("one", "x", timeout=timeout):
            pass
    else:
        await client.generate("one", "x", timeout=timeout)


async def test_unary_and_streamed_answers_agree(service: Service, client: AsyncClient) -> None:
    answer = await client.generate("one", "x")
    pieces = [piece async for piece in client.stream("one", "x")]
    assert answer.text == "ab"
    assert "".join(piece.text for piece in pieces) == " ab "
    assert [piece.HasField("summary") for piece in pieces] == [False, True]
    for summary in (answer.summary, pieces[-1].summary):
        assert (summary.task_id, summary.adapter_name, summary.adapter_version) == ("one", "alpha", "1")
        assert (summary.prompt_tokens, summary.completion_tokens) == (len("x\nAnswer:"), 2)
        assert summary.finish_reason == pb.FINISH_REASON_STOP
    assert service.value("mtlora_completion_tokens_total", task="one") == 4
    assert service.value("mtlora_requests_total", method="GenerateStream", task="one", status="OK") == 1
    assert service.value("mtlora_request_seconds_count") == 2
    assert service.value("mtlora_inter_token_latency_seconds_count") == 2


WORKED = [
    Delta(" 3+4", 2),
    Delta("=7 =", 2),
    Delta("> 7", 2),
    Delta(" => 8", 2),
    Delta("", 1, finish_reason="stop"),
]


def with_marker(service: Service) -> None:
    """Give task one an answer marker, and the engine an answer with working."""
    served = service.servicer.catalog.tasks["one"]
    spec = served.spec.model_copy(update={"answer_marker": "=>"})
    service.serve(replace(served, spec=spec))
    service.engine.deltas = list(WORKED)


async def test_the_answer_is_what_follows_the_marker(service: Service, client: AsyncClient) -> None:
    with_marker(service)
    answer = await client.generate("one", "x")
    assert (answer.text, answer.reasoning) == ("7 => 8", "")
    assert answer.summary.completion_tokens == 9
    assert (await client.generate("one", "x", include_reasoning=True)).reasoning == "3+4=7"
    assert (await client.generate("one", "x", without_adapter=True)).text == "3+4=7 => 7 => 8"


async def test_streams_working_only_on_request(service: Service, client: AsyncClient) -> None:
    """Two deltas share the marker: its beginning waits for the next one."""
    with_marker(service)
    pieces = [piece async for piece in client.stream("one", "x", include_reasoning=True)]
    parts = [(piece.reasoning, piece.text) for piece in pieces]
    assert parts == [(" 3+4", ""), ("=7 ", ""), ("", " 7"), ("", " => 8"), ("", "")]
    assert pieces[-1].summary.completion_tokens == 9
    assert [piece.text async for piece in client.stream("one", "x")] == [" 7", " => 8", ""]


async def test_streams_logprobs_of_working_at_once(service: Service, client: AsyncClient) -> None:
    with_marker(service)
    token = TokenLogprobs(TokenLogprob(5, "5", -0.5), ())
    service.engine.deltas = [replace(delta, logprobs=(token,) * delta.tokens) for delta in WORKED]
    pieces = [piece async for piece in client.stream("one", "x", logprobs=1)]
    assert [len(piece.logprobs) for piece in pieces] == [2, 2, 2, 2, 1]
    assert "".join(piece.text for piece in pieces) == " 7 => 8"
    assert len((await client.generate("one", "x", logprobs=1)).logprobs) == 9


async def test_counts_the_tokens_of_the_working(service: Service, client: AsyncClient) -> None:
    """The fake tokenizer has a token for each character."""
    with_marker(service)
    deltas = [Delta("3+4", 3), Delta("=7=>", 4), Delta("8", 1, finish_reason="stop")]
    service.engine.deltas = [replace(delta, token_ids=[ord(letter) for letter in delta.text]) for delta in deltas]
    answer = await client.generate("one", "x")
    assert (answer.summary.working_tokens, answer.summary.completion_tokens) == (5, 8)
    pieces = [piece async for piece in client.stream("one", "x")]
    assert pieces[-1].summary.working_tokens == 5
    # Without the marker there is no working, nor is there for the backbone alone.
    assert (await client.generate("one", "x", without_adapter=True)).summary.working_tokens == 0
    service.engine.deltas = service.engine.deltas[:1] + service.engine.deltas[2:]
    assert (await client.generate("one", "x")).summary.working_tokens == 0


async def test_a_text_without_the_marker_is_all_answer(service: Service, client: AsyncClient) -> None:
    with_marker(service)
    service.engine.deltas = [Delta(" 3+", 2), Delta("4 =", 2, finish_reason="length")]
    answer = await client.generate("one", "x", include_reasoning=True)
    assert (answer.text, answer.reasoning) == ("3+4 =", "")
    assert [piece.text async for piece in client.stream("one", "x")] == [" 3+4 ="]
    pieces = [piece async for piece in client.stream("one", "x", include_reasoning=True)]
    assert [(piece.reasoning, piece.text) for piece in pieces] == [(" 3+", ""), ("", " 3+4 =")]


@given(text=st.text(alphabet="a =>", max_size=12), cuts=st.lists(st.integers(0, 12), max_size=5))
def test_splits_pieces_of_a_text_as_the_whole_text(text: str, cuts: list[int]) -> None:
    """The result equals the offline generator's."""
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    splitter = AnswerSplitter("=>")
    parts = [splitter.feed(text[a:b], last=b == len(text)) for a, b in pairwise(bounds)] or [("", "")]
    spec = TaskSpec(id="t", description="d", answer_marker="=>")
    working, answer = spec.split_answer(text)
    assert (splitter.working, "".join(part[1] for part in parts)) == (working, answer)
    handed_out = "".join(part[0] for part in parts)
    assert handed_out == working or (not working and answer.startswith(handed_out))


async def test_chat_answers_keep_their_blanks(client: AsyncClient) -> None:
    answer = await client.generate("one", [{"role": "user", "content": "x"}])
    assert answer.text == " ab "


async def test_answers_without_adapter_name_no_adapter(service: Service, client: AsyncClient) -> None:
    answer = await client.generate("one", "x", without_adapter=True)
    assert (answer.summary.adapter_name, answer.summary.adapter_version) == ("", "")
    assert service.engine.jobs[-1].without_adapter


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineDeadError(), grpc.StatusCode.UNAVAILABLE),
        (EngineAbortedError("abort"), grpc.StatusCode.UNAVAILABLE),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_engine_failures_become_statuses_without_their_texts(
    service: Service, client: AsyncClient, stream: bool, error: Exception, code: grpc.StatusCode
) -> None:
    service.engine.error = error
    with pytest.raises(ServerError) as raised:
        await ask(client, stream=stream)
    assert raised.value.code is code
    assert "secret" not in str(raised.value)
    assert raised.value.request_id
    assert service.engine.running == 0


async def test_a_full_server_says_when_to_retry(service: Service, client: AsyncClient) -> None:
    service.engine.hold = asyncio.Event()
    running = [asyncio.create_task(client.generate("one", "x")) for _ in range(4)]
    await eventually(lambda: service.engine.running == 4)
    assert service.value("mtlora_requests_in_flight") == 4
    with pytest.raises(ServerError) as raised:
        await client.generate("one", "x")
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.retry_after_s is not None
    service.engine.hold.set()
    assert [answer.text for answer in await asyncio.gather(*running)] == ["ab"] * 4
    assert service.value("mtlora_requests_in_flight") == 0


@pytest.mark.parametrize("state", [State.STARTING, State.DRAINING, State.RESTARTING])
async def test_refuses_every_call_unless_serving(service: Service, client: AsyncClient, state: State) -> None:
    service.admission.state = state
    stub = inference_pb2_grpc.InferenceStub(client._channel)
    for call in (
        stub.Generate(make_request("one", "x")),
        stub.ListTasks(pb.ListTasksRequest()),
        stub.GetTask(pb.GetTaskRequest(task_id="one")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        error = ServerError(raised.value)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert error.retry_after_s


@pytest.mark.parametrize("stream", [False, True])
async def test_cancellation_aborts_the_sequence(service: Service, client: AsyncClient, stream: bool) -> None:
    service.engine.hold = asyncio.Event()
    stub = inference_pb2_grpc.InferenceStub(client._channel)
    call = (stub.GenerateStream if stream else stub.Generate)(make_request("one", "x"))
    if stream:
        assert (await call.read()).text == " a"
    await eventually(lambda: service.engine.running == 1)
    call.cancel()
    await eventually(lambda: service.engine.running == 0)
    method = "GenerateStream" if stream else "Generate"
    await eventually(lambda: service.value("mtlora_requests_total", method=method, task="one", status="CANCELLED") == 1)
    assert service.value("mtlora_requests_in_flight") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_aborts_the_sequence(service: Service, client: AsyncClient, stream: bool) -> None:
    service.engine.hold = asyncio.Event()
    with pytest.raises(ServerError) as raised:
        await ask(client, stream=stream, timeout=0.2)
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: service.engine.running == 0)
    method = "GenerateStream" if stream else "Generate"
    await eventually(
        lambda: service.value("mtlora_requests_total", method=method, task="one", status="DEADLINE_EXCEEDED") == 1
    )


@pytest.mark.parametrize(("given", "kept"), [("my-id.1", True), ("x" * 65, False), ("-dash first", False), ("", False)])
async def test_keeps_sane_request_ids_and_replaces_others(client: AsyncClient, given: str, kept: bool) -> None:
    stub = inference_pb2_grpc.InferenceStub(client._channel)
    call = stub.Generate(make_request("one", "x"), metadata=(("x-request-id", given),))
    reply = await call
    trailer = dict(await call.trailing_metadata())
    assert trailer["x-request-id"] == reply.summary.request_id
    assert (reply.summary.request_id == given) is kept


async def test_labels_only_served_tasks(service: Service, client: AsyncClient) -> None:
    for task_id in ("nonsense", "two", "other"):
        with contextlib.suppress(ServerError):
            await client.generate(task_id, "")
    samples = [sample for metric in service.metrics.registry.collect() for sample in metric.samples]
    assert {sample.labels["task"] for sample in samples if "task" in sample.labels} == {"unknown", "two"}


async def test_lists_tasks_in_pages(client: AsyncClient) -> None:
    stub = inference_pb2_grpc.InferenceStub(client._channel)
    first = await stub.ListTasks(pb.ListTasksRequest(page_size=1))
    second = await stub.ListTasks(pb.ListTasksRequest(page_size=1, page_token=first.next_page_token))
    assert [task.id for page in (first, second) for task in page.tasks] == ["one", "two"]
    assert not second.next_page_token
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.ListTasks(pb.ListTasksRequest(page_size=1001, page_token="?"))
    assert [field for field, _ in ServerError(raised.value).violations] == ["page_size", "page_token"]


async def test_a_large_input_is_counted_in_full(client: AsyncClient) -> None:
    with pytest.raises(ServerError) as raised:
        await client.generate("one", "x" * 20_000)
    assert "found 20008 tokens" in raised.value.violations[0][1]


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_logs_prompts_only_on_demand(server_log: pytest.LogCaptureFixture, log_prompts: bool) -> None:
    async with Service(log_prompts=log_prompts).running() as service, AsyncClient(service.address) as client:
        answer = await client.generate("one", "confidential")
    lines = [json.loads(JsonFormatter().format(record)) for record in server_log.records]
    assert ("confidential" in json.dumps(lines)) is log_prompts
    (line,) = [line for line in lines if line["message"] == "request"]
    assert line["request_id"] == answer.summary.request_id
    assert (line["method"], line["task"], line["status"]) == ("Generate", "one", "OK")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (20, 2)
    assert line["ms"] > 0
