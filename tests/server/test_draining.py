"""A server that ends: its clients go elsewhere, what runs finishes, the rest gets a status."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mtlora_pb.v1 import inference_pb2_grpc

from benchmarks.harness.ports import free_port
from deploy import manifests
from mtlora.client import AsyncClient, ServerError, make_request
from tests.server.fakes import Service
from tests.waiting import eventually

SHIPPED = (manifests.FOLDER / "kubernetes" / "base" / "service-config.json").read_text()


def address(services: list[Service]) -> str:
    return "ipv4:" + ",".join(service.address for service in services)


@pytest.mark.slow
@pytest.mark.parametrize("client", ["mtlora.client", "shipped service config"])
async def test_no_call_fails_while_servers_are_restarted_in_turn(client: str) -> None:
    ports = [free_port(), free_port()]
    delay = 0.3 if client == "shipped service config" else 0.0
    ends: Counter[str] = Counter()

    async def ask() -> None:
        if client == "mtlora.client":
            await asking.generate("one", "x")
        else:
            await stub.Generate(make_request("one", "x"), wait_for_ready=True)

    async def work() -> None:
        while not stopping:
            try:
                await ask()
                ends["OK"] += 1
            except (grpc.aio.AioRpcError, ServerError) as error:
                ends[str(error)] += 1
            # The servers share this loop.
            await asyncio.sleep(0.01)

    async with AsyncExitStack() as stack:
        lives, services = [], []
        for port in ports:
            services.append(Service(32, port=port, drain_delay_s=delay))
            lives.append(AsyncExitStack())
            await lives[-1].enter_async_context(services[-1].running())
        asking = await stack.enter_async_context(AsyncClient(address(services)))
        options = [("grpc.service_config", SHIPPED)]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address(services), options=options))
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        stopping = False
        workers = [asyncio.create_task(work()) for _ in range(16)]
        for number in range(4):
            place = number % 2
            # Both serve, and get calls.
            for service in services:
                service.engine.jobs.clear()
            await eventually(lambda: all(len(service.engine.jobs) > 20 for service in services), 30)
            await services[place].drain()
            await lives[place].aclose()
            services[place] = Service(32, port=ports[place], drain_delay_s=delay)
            await lives[place].enter_async_context(services[place].running())
        stopping = True
        await asyncio.gather(*workers)
        for life in lives:
            await life.aclose()
    assert list(ends) == ["OK"]


@pytest.mark.slow
async def test_a_channel_leaves_a_server_that_drains() -> None:
    """Once health says not serving, calls are still answered; then the connection ends, and what runs finishes."""
    service = Service(drain_delay_s=0.5)
    async with service.running(), AsyncClient(service.address, retry=None) as client:
        watch = health_pb2_grpc.HealthStub(client._channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        service.engine.hold = asyncio.Event()
        running = asyncio.create_task(client.generate("one", "x"))
        await eventually(lambda: service.engine.running == 1)
        draining = asyncio.create_task(service.drain())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        late = asyncio.create_task(client.generate("one", "x"))
        await eventually(lambda: service.engine.running == 2)

        def left() -> bool:
            return client._channel.get_state() is not grpc.ChannelConnectivity.READY

        await eventually(left)
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            await client.generate("one", "x", timeout=5)
        service.engine.hold.set()
        assert (await running).text == (await late).text == "ab"
        await draining


async def test_what_outlasts_the_grace_period_is_aborted() -> None:
    service = Service(drain_delay_s=0, grace_period_s=0.2)
    async with service.running(), AsyncClient(service.address) as client:
        service.engine.hold = asyncio.Event()
        stream = inference_pb2_grpc.InferenceStub(client._channel).GenerateStream(make_request("one", "x"))
        await stream.read()
        unary = asyncio.create_task(client.generate("one", "x"))
        await eventually(lambda: service.engine.running == 2)
        async with asyncio.timeout(5):
            await service.drain()
            with pytest.raises(ServerError, match="UNAVAILABLE: the server stopped before the answer was complete"):
                await unary
            assert await stream.code() is grpc.StatusCode.UNAVAILABLE
        assert service.engine.running == 0


@pytest.mark.slow
async def test_old_connections_are_told_to_go() -> None:
    async with Service(max_connection_age_s=1).running() as service, AsyncClient(service.address) as client:
        states: list[Any] = []

        async def follow() -> None:
            while True:
                states.append(state := client._channel.get_state(try_to_connect=True))
                await client._channel.wait_for_state_change(state)

        following = asyncio.create_task(follow())
        await client.generate("one", "x")
        async with asyncio.timeout(10):
            while states.count(grpc.ChannelConnectivity.READY) < 2:
                await client.generate("one", "x")
        following.cancel()
