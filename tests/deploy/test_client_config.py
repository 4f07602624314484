"""The clients' service config balances calls and avoids servers that refuse."""

import asyncio
import json

import grpc
import pytest
from mtlora_pb.v1 import inference_pb2, inference_pb2_grpc

from deploy import manifests
from server.scheduling.admission import State
from tests.server.fakes import Service
from tests.waiting import eventually

CONFIG = (manifests.FOLDER / "kubernetes" / "base" / "service-config.json").read_text()


def target(*addresses: str) -> str:
    return "ipv4:" + ",".join(addresses)


def channel(*services: Service) -> grpc.aio.Channel:
    options = [("grpc.service_config", CONFIG), ("grpc.enable_retries", 1)]
    return grpc.aio.insecure_channel(target(*(service.address for service in services)), options=options)


def test_names_existing_services() -> None:
    config = json.loads(CONFIG)
    service = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
    assert config["methodConfig"][0]["name"] == [{"service": service}]
    assert config["healthCheckConfig"]["serviceName"] == service
    assert config["retryThrottling"] == {"maxTokens": 100, "tokenRatio": 0.1}


async def test_balances_calls_over_servers() -> None:
    async with Service().running() as first, Service().running() as second, channel(first, second) as open_channel:
        stub = inference_pb2_grpc.InferenceStub(open_channel)
        for _ in range(8):
            await stub.Generate(inference_pb2.GenerateRequest(task_id="one", text="x"), wait_for_ready=True)
        # The second connection may open a call or two after the first.
        await eventually(lambda: bool(first.engine.jobs))
        assert min(len(first.engine.jobs), len(second.engine.jobs)) >= 2


@pytest.mark.slow
async def test_retries_unavailable_on_another_server() -> None:
    async with Service().running() as good, Service().running() as draining, channel(good, draining) as open_channel:
        draining.admission.state = State.DRAINING
        stub = inference_pb2_grpc.InferenceStub(open_channel)
        for _ in range(6):
            reply = await stub.Generate(inference_pb2.GenerateRequest(task_id="one", text="x"), wait_for_ready=True)
            assert reply.text
        assert len(good.engine.jobs) == 6


async def test_gives_up_retries_where_all_servers_refuse() -> None:
    """Retries must not add three calls to each that overloads the servers."""
    calls = 60
    async with Service().running() as service, channel(service) as open_channel:
        service.admission.state = State.DRAINING
        stub = inference_pb2_grpc.InferenceStub(open_channel)
        request = inference_pb2.GenerateRequest(task_id="one", text="x")
        await asyncio.gather(*(stub.Generate(request) for _ in range(calls)), return_exceptions=True)
        asked = service.value("mtlora_requests_total", method="Generate", task="one", status="UNAVAILABLE")
    # The tokens allow 49 retries.
    assert asked == calls + 49
