"""The port: certificates that change, and limits of connections."""

import asyncio
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mtlora_pb.v1 import inference_pb2_grpc

from mtlora.client import Access, AsyncClient, MetricsPage, ServerError, make_request
from server.rpc.anonymous import AnonymousCalls, AnonymousInterceptor
from server.rpc.listening import listen_for_probes
from server.rpc.tls import Certificates, TLSError
from server.settings import SettingsError, load_settings
from server.telemetry.metrics import Metrics
from tests.faults._certificates import Issued, authority, issue
from tests.server.fakes import Service
from tests.waiting import eventually


def served_certificate(address: str) -> x509.Certificate:
    host, port = address.split(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), 5) as plain, context.wrap_socket(plain) as wrapped:
        return x509.load_der_x509_certificate(wrapped.getpeercert(True) or b"")


def replace(old: Issued, new: Issued) -> None:
    os.replace(new.pem, old.pem)
    os.replace(new.key, old.key)


async def test_a_new_certificate_serves_the_next_connection(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    first, second, third = (issue(ca, tmp_path, name) for name in ("first", "second", "third"))
    service = Service(tls_certificate=first.pem, tls_key=first.key)
    access = Access(ca=ca.pem)
    async with service.running(), AsyncClient(service.address, access) as old:
        await old.generate("one", "x")
        assert await asyncio.to_thread(served_certificate, service.address) == first.certificate
        replace(first, second)
        assert await asyncio.to_thread(served_certificate, service.address) == second.certificate
        # An open connection stays.
        await old.generate("one", "x")
        # A key of another certificate: the old files stay in use.
        os.replace(third.pem, first.pem)
        assert await asyncio.to_thread(served_certificate, service.address) == second.certificate
        async with AsyncClient(service.address, access) as new:
            await new.generate("one", "x")


async def test_a_client_refuses_an_untrusted_certificate(tmp_path: Path) -> None:
    ca, other = authority(tmp_path), authority(tmp_path, "other")
    server = issue(other, tmp_path, "server")
    service = Service(tls_certificate=server.pem, tls_key=server.key)
    async with service.running(), AsyncClient(service.address, Access(ca=ca.pem), retry=None) as client:
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            await client.generate("one", "x", timeout=5)


def test_the_certificates_expiry_follows_the_file(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    first, second = (issue(ca, tmp_path, name, days=days) for name, days in (("first", 1), ("second", 2)))
    certificates, metrics = Certificates(first.pem, first.key), Metrics()
    metrics.follow_certificate("server.pem", certificates.not_after)

    def shown() -> float | None:
        labels = {"certificate": "server.pem"}
        return metrics.registry.get_sample_value("mtlora_tls_certificate_not_after_seconds", labels)

    assert shown() == first.certificate.not_valid_after_utc.timestamp()
    replace(first, second)
    assert shown() == second.certificate.not_valid_after_utc.timestamp()
    # gRPC still gets it with the next handshake.
    assert certificates._fetch() is not None
    assert certificates._fetch() is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "::", "[::]"])
async def test_every_port_takes_the_same_spellings_of_an_address(host: str) -> None:
    service = Service(host=host, metrics_host=host)
    family = "[::1]" if ":" in host else "127.0.0.1"
    async with service.running():
        interceptor = AnonymousInterceptor(AnonymousCalls(service.settings), service.settings)
        health, bound = await listen_for_probes(service.settings, 0, service.health, interceptor)
        port, close = service.metrics.serve(service.settings.metrics_host, 0)
        try:
            for number in (int(service.address.rpartition(":")[2]), bound):
                async with grpc.aio.insecure_channel(f"{family}:{number}") as channel:
                    stub = health_pb2_grpc.HealthStub(channel)
                    assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == 1
            page = await asyncio.to_thread(MetricsPage.fetch, f"{family}:{port}")
            assert page.samples["mtlora_serving"]
            if host in ("::", "[::]"):
                # Every address of both families.
                await asyncio.to_thread(MetricsPage.fetch, f"127.0.0.1:{port}")
            async with AsyncClient(service.address.replace("[::]", "[::1]")) as client:
                await client.generate("one", "x")
        finally:
            close()
            await health.stop(None)


@pytest.mark.parametrize("host", ["::1:50051", "[::1]:50051", "127.0.0.1:80", "[::1", "1::2::3"])
def test_refuses_what_is_no_address(host: str) -> None:
    for setting in ("host", "metrics_host"):
        with pytest.raises(SettingsError, match=rf"{setting}: found .* allowed: a name, an IPv4 address, or an IPv6"):
            load_settings({"allow_no_tasks": True, setting: host})


def test_refuses_bad_certificate_files(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    good, late = issue(ca, tmp_path, "good"), issue(ca, tmp_path, "late", days=-1)
    other = issue(ca, tmp_path, "other")
    (tmp_path / "empty").write_text("")
    for files, message in (
        ((tmp_path / "none", good.key), "No such file"),
        ((tmp_path / "empty", good.key), "no PEM certificate"),
        ((good.pem, tmp_path / "empty"), "no PEM private key"),
        ((good.pem, other.key), "not the key of the certificate"),
        ((late.pem, late.key), "expired"),
        ((good.pem, good.key, tmp_path / "empty"), "no PEM certificate"),
    ):
        with pytest.raises(TLSError, match=message):
            Certificates(*files)


@pytest.mark.parametrize(
    "given", [{"tls_key": "x"}, {"tls_certificate": "x"}, {"tls_client_ca": "x"}, {"max_connections": 0}]
)
def test_refuses_settings_that_contradict(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"allowed|greater"):
        load_settings({"allow_no_tasks": True, **given})


async def test_limits_connections() -> None:
    async with Service(max_connections=2).running() as service:
        open_ones = [grpc.aio.insecure_channel(service.address, options=_apart(i)) for i in range(3)]
        try:
            for channel in open_ones[:2]:
                await _ask(channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await _ask(open_ones[2])
            assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            # The refused connection keeps trying and would take the first one's place.
            await open_ones[2].close()
            await open_ones[0].close()
            await _connect_anew(service.address)
        finally:
            for channel in open_ones:
                await channel.close()


def _apart(number: int) -> list[tuple[str, int]]:
    """Channels of one process share a connection unless their options differ."""
    return [("grpc.use_local_subchannel_pool", 1), ("test.number", number)]


async def _connect_anew(address: str, attempts: int = 8) -> None:
    """Ask over a new connection, until one is served.

    One that comes while the place is being cleared may be left without an answer; its channel tries again after 20 s.
    """
    for attempt in range(attempts):
        async with grpc.aio.insecure_channel(address, options=_apart(10 + attempt)) as channel:
            try:
                return await _ask(channel)
            except grpc.aio.AioRpcError:
                if attempt == attempts - 1:
                    raise


async def _ask(channel: Any) -> None:
    await inference_pb2_grpc.InferenceStub(channel).Generate(make_request("one", "x"), timeout=5)


async def test_limits_calls_of_a_connection() -> None:
    async with Service(max_concurrent_streams=2).running() as service, AsyncClient(service.address) as client:
        # The client learns the limit when it connects.
        await client.generate("one", "x")
        service.engine.hold = asyncio.Event()
        calls = [asyncio.create_task(client.generate("one", "x")) for _ in range(4)]
        await eventually(lambda: service.engine.running == 2)
        await asyncio.sleep(0.2)
        assert service.engine.running == 2
        service.engine.hold.set()
        # The other calls waited in the client, or were refused: gRPC does either.
        for call in calls:
            try:
                await call
            except ServerError as error:
                assert error.code is grpc.StatusCode.UNAVAILABLE  # noqa: PT017
        assert len(service.engine.jobs) >= 3


async def test_refuses_bytes_that_are_no_message() -> None:
    async with Service().running() as service, grpc.aio.insecure_channel(service.address) as channel:
        for method in ("/mtlora.v1.Inference/Generate", "/inference.GRPCInferenceService/ModelInfer"):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(method)(b"\xff\xff\xff")
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
