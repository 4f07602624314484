"""The Adapters service over a registry that has no engine: statuses, permissions, and what each call answers."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from mtlora_pb.v1 import adapters_pb2 as pb
from mtlora_pb.v1 import adapters_pb2_grpc

from mtlora.client import Client, ServerError
from server.accounting import AuditLog, Usage
from server.cli import adapters as adapters_cli
from server.registry.version import Stage
from server.rpc.adapters_service import AdaptersServicer
from server.rpc.anonymous import AnonymousCalls
from server.rpc.interceptor import CallInterceptor
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.tenants import Tenant
from tests.server.front import Front
from tests.server.home import Home, write
from tests.waiting import eventually


@dataclass
class Service:
    client: Client
    home: Home
    refused: set[str]

    async def call(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return await asyncio.to_thread(method, *arguments, **named)


@pytest.fixture
async def service(home: Home) -> AsyncIterator[Service]:
    for number in (1, 2):
        write(home.root / "a" / str(number), "x", "y", seed=number)
    await home.open()
    home.follow()
    refused: set[str] = set()

    async def authenticate(_: Any, __: Any) -> Tenant:
        return Tenant(id="a", admin=not refused)

    metrics = Metrics()
    servicer = AdaptersServicer(Front(metrics=metrics).admission)
    servicer.registry = home.registry
    usage, audit = Usage(None, metrics), AuditLog(None, metrics)
    settings = Settings(allow_no_tasks=True)
    interceptor = CallInterceptor(
        settings, metrics, authenticate, lambda _: None, AnonymousCalls(settings), usage=usage, audit=audit
    )
    server = grpc.aio.server(interceptors=[interceptor])
    adapters_pb2_grpc.add_AdaptersServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with Client(f"127.0.0.1:{port}") as client:
        yield Service(client, home, refused)
    await server.stop(0)


async def test_adapters_are_loaded_pinned_unloaded_and_rolled_back(service: Service) -> None:
    client = service.client
    assert (await service.call(client.load_adapter, "a", "1")).version == "1"
    assert service.home.serving() == {"x": "a/1", "y": "a/1"}
    await service.call(client.pin_adapter, "a")
    (listed,) = await service.call(client.adapters)
    assert listed.pinned
    shown = [(each.version, each.stage, each.resident, each.tasks) for each in listed.versions]
    assert shown[0] == ("1", pb.ADAPTER_STAGE_SERVING, True, 2)
    assert shown[1][:2] == ("2", pb.ADAPTER_STAGE_VERIFIED)
    await service.call(client.pin_adapter, "a", pinned=False)
    await service.call(client.unload_adapter, "a")
    assert service.home.serving() == {}
    assert (await service.call(client.load_adapter, "a")).version == "2"
    assert (await service.call(client.rollback_adapter, "a")).version == "1"


async def test_an_earlier_version_is_listed_once_when_it_is_a_canary(service: Service) -> None:
    # Loaded and replaced, it is kept for a rollback; the weights make it serve too.
    await service.call(service.client.load_adapter, "a", "1")
    await service.call(service.client.load_adapter, "a", "2")
    await service.call(service.client.set_adapter_weights, {"1": 90, "2": 10}, adapter="a")
    (listed,) = await service.call(service.client.adapters)
    serving = pb.ADAPTER_STAGE_SERVING
    assert [(each.version, each.stage) for each in listed.versions] == [("2", serving), ("1", serving)]
    await service.call(service.client.set_adapter_weights, {}, adapter="a")
    (listed,) = await service.call(service.client.adapters)
    assert [(each.version, each.stage) for each in listed.versions] == [
        ("2", serving),
        ("1", pb.ADAPTER_STAGE_VERIFIED),
    ]


async def test_weights_of_a_task_come_before_those_of_its_adapter(service: Service) -> None:
    await service.call(service.client.set_adapter_weights, {"1": 30, "2": 70, "9": 0}, adapter="a")
    await service.call(service.client.set_adapter_weights, {"1": 1}, task="y")
    (listed,) = await service.call(service.client.adapters)
    splits = {split.task: dict(split.weights) for split in listed.splits}
    assert splits == {"": {"1": 30, "2": 70}, "y": {"1": 1}}
    assert service.home.tables[-1].choose(service.home.tables[-1].tasks["y"], b"").adapter_version == "1"


async def test_watching_sees_everything_from_the_call_on(service: Service) -> None:
    events = await service.call(service.client.watch_adapters)
    seen: list[Any] = []
    reading = threading.Thread(target=lambda: seen.extend(next(events) for _ in range(5)))
    reading.start()
    write(service.home.root / "b" / "1", "z")
    await service.call(reading.join, 10)
    assert [each.stage for each in seen] == [
        pb.ADAPTER_STAGE_FOUND,
        pb.ADAPTER_STAGE_VERIFIED,
        pb.ADAPTER_STAGE_LOADED,
        pb.ADAPTER_STAGE_WARMED,
        pb.ADAPTER_STAGE_SERVING,
    ]
    assert {(each.adapter, each.version) for each in seen} == {("b", "1")}
    events.close()


async def test_every_call_asks_for_permission(service: Service) -> None:
    service.refused.add("everyone")
    client = service.client
    for call in (
        lambda: client.load_adapter("a"),
        lambda: client.unload_adapter("a"),
        lambda: client.rollback_adapter("a"),
        lambda: client.pin_adapter("a"),
        lambda: client.pin_adapter("a", pinned=False),
        lambda: client.set_adapter_weights({"1": 1}, adapter="a"),
        lambda: client.adapters(),
        lambda: next(client.watch_adapters()),
    ):
        with pytest.raises(ServerError) as raised:
            await service.call(call)
        assert raised.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert service.home.serving()["x"] == "a/2"


@pytest.mark.slow
async def test_a_refused_version_says_why(service: Service) -> None:
    write(service.home.root / "a" / "3", "x", seed=3)
    (service.home.root / "a" / "3" / "adapter.safetensors").write_bytes(b"garbage")
    with pytest.raises(ServerError) as raised:
        await service.call(service.client.load_adapter, "a", "3")
    assert raised.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "not verified" in raised.value.message
    assert service.home.serving()["x"] == "a/2"
    await eventually(lambda: service.home.registry.records["a"].found["3"].stage is Stage.FAILED)


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        (lambda client: client.load_adapter("delta"), grpc.StatusCode.NOT_FOUND, "no adapter 'delta'; allowed: a"),
        (lambda client: client.load_adapter("a", "7"), grpc.StatusCode.NOT_FOUND, "there are 1"),
        (
            # From 2 to 1, and no further.
            lambda client: (client.rollback_adapter("a"), client.rollback_adapter("a")),
            grpc.StatusCode.FAILED_PRECONDITION,
            "nothing served before",
        ),
        (lambda client: client.load_adapter(""), grpc.StatusCode.INVALID_ARGUMENT, "found none"),
        (
            lambda client: client.set_adapter_weights({"1": 0}, adapter="a"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "found only 0",
        ),
        (
            lambda client: client.set_adapter_weights({"1": 10**6}, adapter="a"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "0 to 10000",
        ),
        (lambda client: client.set_adapter_weights({"1": 1}, task="nope"), grpc.StatusCode.NOT_FOUND, "no task"),
    ],
)
async def test_rejects_wrong_calls(service: Service, call: Any, code: grpc.StatusCode, said: str) -> None:
    with pytest.raises(ServerError) as raised:
        await asyncio.to_thread(call, service.client)
    assert raised.value.code is code
    assert said in raised.value.message


async def test_the_table_of_the_command_shows_stages_and_weights(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    await service.call(service.client.set_adapter_weights, {"1": 30, "2": 70}, adapter="a")
    await service.call(adapters_cli._print_table, await service.call(service.client.adapters))
    shown = capsys.readouterr().out
    assert "serving" in shown
    assert "1=30, 2=70" in shown


def test_parses_weights_on_the_command_line() -> None:
    assert adapters_cli.parse_weights(["3=90", "v4=10"]) == {"3": 90, "v4": 10}
    for wrong in ("3", "=4", "3=", "3=-1", "3:4"):
        with pytest.raises(ValueError, match="VERSION=WEIGHT"):
            adapters_cli.parse_weights([wrong])
