"""What callers hold open: without a key, with headers alone, with streams of health and reflection."""

import asyncio
import contextlib
import difflib
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc
from openinference_pb import grpc_predict_v2_pb2 as open_pb
from openinference_pb import grpc_predict_v2_pb2_grpc

from server.errors import task_not_found
from server.job import ServedTask
from server.registry.catalog import Catalog
from server.rpc import anonymous, interceptor
from server.rpc.anonymous import peer_of
from server.rpc.pieces import in_pieces
from tests import http2
from tests.server.adapters import entry
from tests.server.fakes import Service
from tests.waiting import eventually

GENERATE = "/mtlora.v1.Inference/Generate"
STREAM = "/mtlora.v1.Inference/GenerateStream"
WATCH = "/grpc.health.v1.Health/Watch"
CHECK = "/grpc.health.v1.Health/Check"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
LIVE = "/inference.GRPCInferenceService/ServerLive"


def half_open(channel: Any, path: str, metadata: Any = None) -> Any:
    """A call that sends its headers and nothing more."""
    return channel.stream_stream(path)(metadata=metadata)


@pytest.mark.slow
@pytest.mark.parametrize("path", [GENERATE, STREAM])
async def test_a_call_without_a_key_ends_before_its_message(tmp_path: Path, path: str) -> None:
    """More of them than gRPC lets wait by default; a tenant's calls among them are answered."""
    async with Service.with_tenants(tmp_path, {"a": {}}).running() as service, contextlib.AsyncExitStack() as stack:
        # Connections of their own: one carries 1024 calls.
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(
                    service.address, options=[("grpc.use_local_subchannel_pool", 1), ("test.number", number)]
                )
            )
            for number in range(3)
        ]
        client = await stack.enter_async_context(service.client("a"))
        for channel in (*channels, client._channel):
            await channel.channel_ready()
        calls = [half_open(channel, path) for _ in range(800) for channel in channels]
        async with asyncio.timeout(60):
            assert (await client.generate("one", "x")).text == "ab"
            assert {await call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}


@pytest.mark.parametrize("path", [GENERATE, STREAM])
async def test_a_tenants_call_without_a_message_ends(tmp_path: Path, path: str) -> None:
    async with (
        Service.with_tenants(tmp_path, {"a": {}}, request_timeout_s=0.3).running() as service,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        call = half_open(channel, path, service.access("a").metadata())
        async with asyncio.timeout(10):
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no message" in await call.details()
        empty = half_open(channel, path, service.access("a").metadata())
        await empty.done_writing()
        assert await empty.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_tenant_holds_so_many_calls_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "_MESSAGES_UNDER_WAY", 0)
    async with (
        Service.with_tenants(tmp_path, {"a": {}}, request_timeout_s=60, max_num_seqs=1).running() as service,
        service.client("a") as client,
    ):
        calls = [half_open(client._channel, GENERATE, service.access("a").metadata()) for _ in range(9)]
        codes = [asyncio.ensure_future(call.code()) for call in calls]
        (refused,), _ = await asyncio.wait(codes, return_when=asyncio.FIRST_COMPLETED)
        assert await refused is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()
        await eventually(
            lambda: service.value("mtlora_requests_total", method="Generate", task="", status="CANCELLED") == 8
        )
        await client.generate("one", "x")


@pytest.mark.slow
async def test_one_peer_holds_so_many_calls_without_a_key(tmp_path: Path) -> None:
    async with (
        Service.with_tenants(tmp_path, {"a": {}}, max_anonymous_calls=8).running() as service,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch
        held = [watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        assert [(await call.read()).status for call in held] == [1, 1, 1]
        held += [half_open(channel, path) for path in (WATCH, CHECK, REFLECT, LIVE, CHECK)]
        # They may reach the server in another order.
        await eventually(lambda: service.anonymous._open.total() == 8)
        for path in (WATCH, CHECK, REFLECT, LIVE):
            refused = half_open(channel, path)
            async with asyncio.timeout(5):
                assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # Calls of a tenant at the same address do not count as anonymous.
        async with service.client("a") as client:
            await client.generate("one", "x")
        for call in held:
            call.cancel()
        await eventually(lambda: not service.anonymous._open)
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def test_half_open_calls_without_a_key_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anonymous, "_REFLECTION_S", 0.3)
    async with (
        Service.with_tenants(tmp_path, {"a": {}}, request_timeout_s=0.3).running() as service,
        grpc.aio.insecure_channel(service.address) as channel,
    ):
        calls = [half_open(channel, path) for path in (WATCH, CHECK, REFLECT)]
        async with asyncio.timeout(10):
            assert {await call.code() for call in calls} == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.slow
async def test_a_watch_ends_with_its_connection() -> None:
    age: dict[str, Any] = {"max_connection_age_s": 1, "max_connection_age_grace_s": 1}
    async with Service(**age).running() as service, grpc.aio.insecure_channel(service.address) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await call.read()
        async with asyncio.timeout(10):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE


def unread(path: str, message: bytes) -> bytes:
    """The frames of a call whose client takes no byte of the answers."""
    initial_window_size = (4).to_bytes(2, "big") + bytes(4)
    data = b"\0" + len(message).to_bytes(4, "big") + message
    return (
        http2.PREFACE
        + http2.frame(http2.SETTINGS, 0, 0, initial_window_size)
        + http2.call_headers(1, path)
        + http2.frame(http2.DATA, http2.END_STREAM, 1, data)
    )


async def test_a_watcher_that_takes_no_message_holds_up_nobody() -> None:
    async with Service(slow_reader_s=0.5).running() as service:
        host, _, port = service.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(unread(WATCH, b""))
        await eventually(lambda: len(service.anonymous._open) == 1)
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            service.health.set(serving=False)
            async with grpc.aio.insecure_channel(service.address) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                service.health.set(serving=True)
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                watch.cancel()
            await eventually(lambda: not service.anonymous._open)
        writer.close()


async def test_health_names_what_it_does_not_know() -> None:
    async with Service().running() as service, grpc.aio.insecure_channel(service.address) as channel:
        stub, unknown = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest(service="x")
        with pytest.raises(
            grpc.aio.AioRpcError, match=r"service: found 'x'; allowed: an empty name, mtlora\.v1\.Inference"
        ):
            await stub.Check(unknown)
        assert (await stub.Watch(unknown).read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_reflection_can_be_switched_off() -> None:
    for on in (True, False):
        async with Service(reflection=on).running() as service, grpc.aio.insecure_channel(service.address) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.done_writing()
            assert (await call.code() is grpc.StatusCode.UNIMPLEMENTED) is not on


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("ipv4:10.0.0.1:5000", "10.0.0.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5000", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::/64"),
        ("unix:", ""),
    ],
)
def test_a_peer_is_an_address_or_a_network(name: str, peer: str) -> None:
    assert peer_of(name) == peer


async def test_every_call_counts_against_the_rate(tmp_path: Path) -> None:
    made = Service.with_tenants(tmp_path, {"a": {"requests_per_second": 0.001, "burst_seconds": 3000}})
    async with made.running() as service, grpc.aio.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        models = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = service.access("a").metadata()
        await stub.ListTasks(pb.ListTasksRequest(), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetTask(pb.GetTaskRequest(task_id="no"), metadata=metadata)
        await models.RepositoryIndex(open_pb.RepositoryIndexRequest(), metadata=metadata)
        for ask, request in (
            (stub.ListTasks, pb.ListTasksRequest()),
            (stub.GetTask, pb.GetTaskRequest(task_id="no")),
            (models.RepositoryIndex, open_pb.RepositoryIndexRequest()),
            (models.ServerMetadata, open_pb.ServerMetadataRequest()),
            (stub.Generate, pb.GenerateRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=r"0.001 requests_per_second"):
                await ask(request, metadata=metadata)


async def test_many_tasks_are_listed_and_near_ones_found(tmp_path: Path) -> None:
    ids = [f"team_{number:05}_long_name_of_a_task" for number in range(20_000)]
    task = entry("one")
    catalog = Catalog(MappingProxyType({each: ServedTask(task, "alpha", "1", slot=None) for each in ids}))
    async with Service.with_tenants(tmp_path, {"a": {"tasks": ["team_*", "*_other"]}}).running() as service:
        service.servicer.catalog = catalog
        async with service.client("a") as client:
            models = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(client._channel)
            metadata = service.access("a").metadata()
            index = await models.RepositoryIndex(open_pb.RepositoryIndexRequest(), metadata=metadata)
            assert [each.name for each in index.models] == ids
            page = await client._stub.ListTasks(pb.ListTasksRequest(page_size=3), metadata=metadata)
            assert len(page.tasks) == 3
            with pytest.raises(grpc.aio.AioRpcError, match="team_00777_long_name_of_a_task"):
                await client._stub.GetTask(
                    pb.GetTaskRequest(task_id="team_00777_long_name_of_a_tusk"), metadata=metadata
                )


def test_few_ids_are_compared_with_one_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    compare = difflib.get_close_matches

    def close(word: str, ids: Any, **named: Any) -> list[str]:
        compared.extend(ids)
        return compare(word, ids, **named)

    monkeypatch.setattr(difflib, "get_close_matches", close)
    task = ServedTask(entry("one"), "alpha", "1", slot=None)
    catalog = Catalog(MappingProxyType({f"team_{number:05}_task": task for number in range(20_000)}))
    failure = task_not_found("team_00777_tusk", catalog.near("team_00777_tusk"))
    assert "near: team_00777_task" in failure.message
    assert len(compared) <= 10


async def test_a_long_list_lets_others_run() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(other())
    assert [each async for each in in_pieces(slow(10))] == list(range(10))
    running.cancel()
    assert turns >= 5


def slow(items: int) -> Iterator[int]:
    for item in range(items):
        time.sleep(0.003)
        yield item
