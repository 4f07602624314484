"""The clients, against a server with only the answers that the tests need."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from mtlora_pb.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

from mtlora.client import Access, AsyncClient, Client, Retry, ServerError, make_analysis, make_batch, make_request
from mtlora.client.messages import make_score
from mtlora.client.retry import Attempts
from tests.servicers import serving


class Server(adapters_pb2_grpc.AdaptersServicer, inference_pb2_grpc.InferenceServicer):
    """Collects each call's API key. Two pages of tasks; a stream fails after its first piece."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        # RetryInfo, in seconds, of each call that fails before one answers.
        self.failures: list[float] = []
        # The deadline of the last rollback.
        self.left_s: float | None = None
        self.address = ""

    def List(self, request: Any, context: Any) -> Any:
        self._called(context)
        self._fail(context)
        return adapters_pb2.ListAdaptersResponse()

    def Rollback(self, request: Any, context: Any) -> Any:
        self._called(context)
        self._fail(context)
        self.left_s = context.time_remaining()
        return adapters_pb2.RollbackAdapterResponse()

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        self._called(context)
        context.send_initial_metadata(())
        yield adapters_pb2.AdapterEvent(adapter="a")

    def ListTasks(self, request: Any, context: Any) -> Any:
        self._called(context)
        self._fail(context)
        if request.page_token:
            return inference_pb2.ListTasksResponse(tasks=[inference_pb2.Task(id="two")])
        return inference_pb2.ListTasksResponse(tasks=[inference_pb2.Task(id="one")], next_page_token="2")

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        self._called(context)
        yield inference_pb2.GenerateStreamResponse(text="first")
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    def Generate(self, request: Any, context: Any) -> Any:
        self._called(context)
        self._fail(context)
        return inference_pb2.GenerateResponse(text="answer")

    def Score(self, request: Any, context: Any) -> Any:
        self._called(context)
        return inference_pb2.ScoreResponse(
            scores=[inference_pb2.InputScore(label=each.routing_key) for each in request.inputs]
        )

    def GenerateBatchStream(self, request: Any, context: Any) -> Iterator[Any]:
        self._called(context)
        if self.failures:
            self.failures.pop(0)
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        for index, each in enumerate(request.items):
            response = inference_pb2.GenerateResponse(text=each.text)
            yield inference_pb2.GenerateBatchStreamResponse(
                item=inference_pb2.BatchItem(index=index, response=response)
            )

    def _fail(self, context: Any) -> None:
        if self.failures:
            seconds = self.failures.pop(0)
            context.set_trailing_metadata((("grpc-status-details-bin", unavailable(seconds)),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")

    def _called(self, context: Any) -> None:
        self.keys.append(dict(context.invocation_metadata()).get("authorization", ""))


def unavailable(seconds: float) -> bytes:
    """The details of a status with RetryInfo."""
    info = error_details_pb2.RetryInfo(
        retry_delay=duration_pb2.Duration(nanos=int(seconds * 1e9) % 10**9, seconds=int(seconds))
    )
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="not yet")
    status.details.add().Pack(info)
    return bytes(status.SerializeToString())


@pytest.fixture
def server() -> Iterator[Server]:
    adds = (adapters_pb2_grpc.add_AdaptersServicer_to_server, inference_pb2_grpc.add_InferenceServicer_to_server)
    servicer = Server()
    with serving(servicer, *adds, threads=2) as (servicer.address, _):
        yield servicer


def test_every_call_carries_the_api_key(server: Server) -> None:
    with Client(server.address, Access(api_key="k")) as client:
        client.adapters()
        assert [event.adapter for event in client.watch_adapters()] == ["a"]
        client.tasks()
    assert set(server.keys) == {"Bearer k"}


async def test_every_call_of_the_asynchronous_client_carries_the_api_key(server: Server) -> None:
    async with AsyncClient(server.address, Access(api_key="k")) as client:
        assert await client.adapters() == []
        assert [event.adapter async for event in await client.watch_adapters()] == ["a"]
        assert [task.id for task in await client.tasks()] == ["one", "two"]
    assert server.keys == ["Bearer k"] * 4


def test_both_clients_have_the_calls_of_both_contracts() -> None:
    methods = {name for name in dir(Client) if not name.startswith("_")}
    assert methods - set(dir(AsyncClient)) == {"is_serving", "wait_ready"}
    assert Client.load_adapter.__doc__ == AsyncClient.load_adapter.__doc__ is not None


def test_tasks_are_those_of_all_pages(server: Server) -> None:
    with Client(server.address) as client:
        assert [task.id for task in client.tasks()] == ["one", "two"]


async def test_a_failed_stream_raises_after_its_pieces(server: Server) -> None:
    with Client(server.address) as client:
        stream = client.stream("t", "x")
        assert next(stream).text == "first"
        with pytest.raises(ServerError, match="UNAVAILABLE: gone"):
            next(stream)
    async with AsyncClient(server.address) as asynchronous:
        pieces = asynchronous.stream("t", "x")
        assert (await anext(pieces)).text == "first"
        with pytest.raises(ServerError, match="UNAVAILABLE: gone"):
            await anext(pieces)


FAST = Retry(first_s=0.001, most_s=0.002)


async def test_calls_are_repeated_within_their_deadline(server: Server) -> None:
    with Client(server.address, retry=FAST) as client:
        server.failures = [0.0, 0.01]
        assert client.generate("t", "x", timeout=10).text == "answer"
        assert len(server.keys) == 3
        server.failures = [0.0]
        assert [each.result().text for each in client.generate_batch([("t", "a"), ("t", "b")], timeout=10)] == [
            "a",
            "b",
        ]
    async with AsyncClient(server.address, retry=FAST) as asynchronous:
        server.failures = [0.0, 0.01]
        assert (await asynchronous.generate("t", "x", timeout=10)).text == "answer"
        server.failures = [0.0]
        answers = [each.result().text async for each in asynchronous.generate_batch([("t", "a")], timeout=10)]
        assert answers == ["a"]
    assert len(server.keys) == 3 + 2 + 3 + 2


async def test_calls_of_tasks_and_adapters_are_repeated_too(server: Server) -> None:
    with Client(server.address, retry=FAST) as client:
        server.failures = [0.0]
        assert client.adapters(timeout=10) == []
        server.failures = [0.0]
        assert [task.id for task in client.tasks(timeout=10)] == ["one", "two"]
    async with AsyncClient(server.address, retry=FAST) as asynchronous:
        server.failures = [0.0]
        assert await asynchronous.adapters(timeout=10) == []


async def test_a_rollback_has_a_deadline_and_one_attempt(server: Server) -> None:
    """A repeated rollback would go further back."""
    with Client(server.address, retry=FAST) as client:
        client.rollback_adapter("a", timeout=10)
        assert server.left_s is not None
        assert 0 < server.left_s < 20
        server.failures = [0.0]
        with pytest.raises(ServerError, match="not yet"):
            client.rollback_adapter("a", timeout=10)
    async with AsyncClient(server.address, retry=FAST) as asynchronous:
        server.failures = [0.0]
        with pytest.raises(ServerError, match="not yet"):
            await asynchronous.rollback_adapter("a", timeout=10)
    assert len(server.keys) == 3


@pytest.mark.parametrize(
    ("retry", "timeout", "retry_after_s"), [(None, 10.0, 0.0), (FAST, None, 0.0), (FAST, 10.0, 60.0), (FAST, 0.5, 0.6)]
)
def test_does_not_repeat_a_call_without_retry_or_time(
    server: Server, retry: Retry | None, timeout: float | None, retry_after_s: float
) -> None:
    """No retries, no deadline, or a RetryInfo beyond it: the failure is there at once."""
    server.failures = [retry_after_s] * 2
    with Client(server.address, retry=retry) as client, pytest.raises(ServerError, match="not yet") as raised:
        client.generate("t", "x", timeout=timeout)
    assert raised.value.retry_after_s == pytest.approx(retry_after_s)
    assert len(server.failures) == 1


def test_a_stream_is_not_repeated_after_a_piece(server: Server) -> None:
    with Client(server.address, retry=FAST) as client:
        stream = client.stream("t", "x", timeout=10)
        assert next(stream).text == "first"
        with pytest.raises(ServerError, match="UNAVAILABLE: gone"):
            next(stream)
    assert len(server.keys) == 1


def test_waits_grow_and_keep_to_the_servers_own() -> None:
    retry, error = Retry(attempts=4, first_s=0.1, most_s=0.3), ServerError.__new__(ServerError)
    error.code, error.retry_after_s = grpc.StatusCode.UNAVAILABLE, None
    waits = [retry.wait_s(error, attempt, 10.0) for attempt in (1, 2, 3)]
    for wait, most in zip(waits, (0.1, 0.2, 0.3), strict=True):
        assert wait is not None
        assert most / 2 <= wait <= most
    assert retry.wait_s(error, 4, 10.0) is None
    error.retry_after_s = 2.0
    wait = retry.wait_s(error, 1, 10.0)
    assert wait is not None
    assert 2.05 <= wait <= 2.1
    assert retry.wait_s(error, 1, 2.0) is None
    error.code = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert retry.wait_s(error, 1, 10.0) is None


def test_an_attempt_that_got_on_counts_anew() -> None:
    attempts = Attempts(Retry(attempts=2, first_s=0.001), timeout=60)
    error = ServerError.__new__(ServerError)
    error.code, error.retry_after_s = grpc.StatusCode.UNAVAILABLE, None
    for _ in range(3):
        attempts.after(error)
        attempts.got_on()
    attempts.after(error)
    with pytest.raises(ServerError):
        attempts.after(error)


def test_a_batch_takes_whole_requests_too() -> None:
    request = inference_pb2.GenerateRequest(task_id="t", text="y")
    batch = make_batch([("t", "x"), request], seed=1, allowed_tokens=[5])
    assert [each.parameters.seed for each in batch.items] == [1, 0]
    assert list(batch.items[0].parameters.allowed_tokens.values) == [5]


def test_a_request_holds_its_parameters() -> None:
    request = make_request("one", [5, 6], logit_bias={7: 1.5}, banned_tokens=[], stop_token_ids=[9])
    assert list(request.token_ids.values) == [5, 6]
    assert request.parameters.HasField("banned_tokens")
    assert dict(request.parameters.logit_bias.values) == {7: 1.5}


def test_a_documents_task_holds_its_parameters() -> None:
    own = inference_pb2.AnswerType(regex="a+")
    (held,) = make_analysis(["t"], "text", answer=own, seed=1).tasks
    assert (held.answer, held.free, held.parameters.seed) == (own, False, 1)
    (free,) = make_analysis([("t", {"x": "y"})], "text", free=True).tasks
    assert (free.free, free.HasField("answer"), dict(free.fields.values)) == (True, False, {"x": "y"})


def test_a_scores_inputs_share_a_routing_key(server: Server) -> None:
    image = b"\x89PNG"
    assert [each.WhichOneof("input") for each in make_score("t", ["x", image]).inputs] == ["text", "image"]
    with Client(server.address) as client:
        assert [score.label for score in client.score("t", ["x", {"a": "y"}, image], routing_key="u")] == ["u"] * 3
