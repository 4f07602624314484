"""One server for the tests of this folder. They run in one process, one after another."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.harness.ports import free_port
from mtlora.backbone import identify
from mtlora.client import Client, ServerError
from mtlora.vision.image_input import ImageInput
from server.cli.process import ServerProcess
from tests.mtlora.vision.models import write_model
from tests.server.adapters import entry, write_adapter


@dataclass
class StartingObservations:
    """What a client saw between the opening of the port and the ready line."""

    health: list[int] = field(default_factory=list)
    generate_code: grpc.StatusCode | None = None


@pytest.fixture(scope="package")
def starting() -> StartingObservations:
    return StartingObservations()


# Tasks of images of two sizes, poolings and ways to a square.
SIGHTS = [
    entry("sight", allowed_answers=("near", "far", "between"), image=ImageInput(size=56)),
    entry("view", allowed_answers=("up", "down"), image=ImageInput(size=28, pooling="cls", resize="crop")),
    entry("look", allowed_answers=("in", "out"), image=ImageInput(size=42, pooling="mean", resize="pad")),
]


@pytest.fixture(scope="package")
def vision_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random one."""
    return write_model(tmp_path_factory.mktemp("vision") / "backbone", "dinov2")


@pytest.fixture(scope="package")
def adapters(adapters: Path, vision_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters of texts, and one of images, eyes."""
    folder = tmp_path_factory.mktemp("sighted") / "adapters"
    shutil.copytree(adapters, folder)
    write_adapter(folder / "eyes" / "1", SIGHTS, backbone=identify(vision_backbone))
    return folder


@pytest.fixture(scope="package")
def server(adapters: Path, vision_backbone: Path, starting: StartingObservations) -> Iterator[ServerProcess]:
    port, health_port = free_port(), free_port()
    with ServerProcess(
        adapters=adapters,
        vision_backbone=vision_backbone,
        vision_dtype="float32",
        kv_cache_gib=0.25,
        port=port,
        health_port=health_port,
        max_message_bytes=65536,
        # Tests that remove an adapter wait for a scan.
        adapters_poll_s=0.2,
        # The last stream's, on a machine of any speed.
        grace_period_s=300,
        wait=False,
        # Long enough for two engines on a machine of any speed.
        timeout=600,
    ) as process:
        _observe(f"127.0.0.1:{port}", f"127.0.0.1:{health_port}", process, starting)
        process.wait_ready()
        yield process


@pytest.fixture(scope="package")
def client(server: ServerProcess) -> Iterator[Client]:
    with server.client() as client:
        yield client


def _observe(address: str, probed: str, process: ServerProcess, seen: StartingObservations) -> None:
    with grpc.insecure_channel(probed) as channel, Client(address) as client:
        health = health_pb2_grpc.HealthStub(channel)
        until = time.monotonic() + 60
        while process.process.poll() is None and time.monotonic() < until:
            try:
                reply = health.Check(health_pb2.HealthCheckRequest(service="mtlora.v1.Inference"), timeout=1)
            except grpc.RpcError:
                time.sleep(0.2)
                continue
            seen.health.append(reply.status)
            try:
                client.generate("echo", "too early", timeout=1)
            except ServerError as error:
                seen.generate_code = error.code
            return
