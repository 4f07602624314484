"""The clients, against a server that answers nothing but what a test needs."""

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from mtlora_pb.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

from mtlora.client import Access, AsyncClient, Client, ServerError


class Server(adapters_pb2_grpc.AdaptersServicer, inference_pb2_grpc.InferenceServicer):
    """Collects each call's API key. Two pages of tasks; a stream fails after its first piece."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.address = ""

    def List(self, request: Any, context: Any) -> Any:
        self._called(context)
        return adapters_pb2.ListAdaptersResponse()

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        self._called(context)
        context.send_initial_metadata(())
        yield adapters_pb2.AdapterEvent(adapter="a")

    def ListTasks(self, request: Any, context: Any) -> Any:
        self._called(context)
        if request.page_token:
            return inference_pb2.ListTasksResponse(tasks=[inference_pb2.Task(id="two")])
        return inference_pb2.ListTasksResponse(tasks=[inference_pb2.Task(id="one")], next_page_token="2")

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        self._called(context)
        yield inference_pb2.GenerateStreamResponse(text="first")
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    def _called(self, context: Any) -> None:
        self.keys.append(dict(context.invocation_metadata()).get("authorization", ""))


@pytest.fixture
def server() -> Iterator[Server]:
    servicer = Server()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    adapters_pb2_grpc.add_AdaptersServicer_to_server(servicer, server)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(0).wait()


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
