"""Tenants over gRPC, with a fake engine: who gets in, what they see, and what a changed file changes."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtlora_pb.v1 import adapters_pb2, inference_pb2
from openinference_pb import grpc_predict_v2_pb2

from mtlora.client import Access, AsyncClient, ServerError, make_request
from server.telemetry.logs import JsonFormatter
from server.tenants import Directory, TenantsError, read_tenants
from server.tenants.authentication import Authenticator
from server.tenants.keys import checked_hash, hash_key, key_id_of, new_key, verify
from tests.faults._certificates import authority, issue
from tests.faults._tenants import tenant, write_tenants
from tests.server.fakes import Service

CONTRACTS = [
    inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    adapters_pb2.DESCRIPTOR.services_by_name["Adapters"],
    grpc_predict_v2_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
]
PROBES = {"/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady"}


def test_a_new_key_matches_its_own_hash_alone() -> None:
    key, key_id, hashed = new_key()
    assert key_id_of(key) == key_id
    assert key not in hashed
    assert verify(key, hashed)
    assert not verify(key + "x", hashed)
    assert hash_key(key) != hashed
    assert key_id_of("Bearer nonsense") is None


@given(st.text(max_size=80) | st.from_regex(r"scrypt\$ln=\d{1,3},r=\d{1,3},p=\d\$[A-Za-z0-9+/=]*\$[A-Za-z0-9+/=]*"))
def test_a_malformed_hash_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"allowed|base64"):
        checked_hash(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tenants: [", "not a readable YAML file"),
        ("tenants: []", "tenants: .*at least 1"),
        ("tenants: [{id: a}]", "neither api_keys nor certificates"),
        ("tenants: [{id: a/b, certificates: [CN=a]}]", "tenants.0.id"),
        ("tenants: [{id: a, certificates: [CN=a], wieght: 2}]", "wieght"),
        ("tenants: [{id: a, certificates: [CN=a], weight: 0}]", "weight"),
        ("tenants: [{id: a, certificates: [CN=a], priority: high}]", "priority"),
        ("tenants: [{id: a, certificates: [CN=a]}, {id: a, certificates: [CN=b]}]", "tenant id 'a'.*already"),
        ("tenants: [{id: a, certificates: [CN=a]}, {id: b, certificates: [CN=a]}]", "certificate 'CN=a'.*a's already"),
        ("tenants: [{id: a, api_keys: [{id: 12345678, hash: secret}]}]", "api_keys.0"),
    ],
)
def test_bad_files_name_the_entry(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(content)
    with pytest.raises(TenantsError, match=f"(?s){message}"):
        read_tenants(path)


def test_a_bad_file_keeps_the_old_tenants(tmp_path: Path) -> None:
    failures, changes = list[int](), list[Any]()
    _, a = tenant("a")
    path = write_tenants(tmp_path / "tenants.yaml", a)
    directory = Directory(path, on_change=changes.append, on_failure=lambda: failures.append(1))
    old = directory.current
    for damage in (lambda: path.write_text("tenants: 7"), path.unlink):
        damage()
        directory.reload_if_changed()
        directory.reload_if_changed()
        assert directory.current is old
    assert (len(failures), changes) == (2, [])
    write_tenants(path, a, tenant("b")[1])
    directory.reload_if_changed()
    assert set(directory.current.by_id) == {"a", "b"}
    assert changes == [directory.current]


async def test_a_key_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counting(key: str, hashed: str) -> bool:
        calls.append(key)
        return verify(key, hashed)

    monkeypatch.setattr("server.tenants.authentication.verify", counting)
    key, a = tenant("a")
    authenticator = Authenticator(Directory(write_tenants(tmp_path / "tenants.yaml", a)))
    metadata = [("authorization", f"Bearer {key}")]
    found = await asyncio.gather(*(authenticator.tenant(metadata, dict) for _ in range(20)))
    found.append(await authenticator.tenant(metadata, dict))
    assert {each.id for each in found} == {"a"}
    assert calls == [key]


class Two:
    """A server with tenants a, which may ask `one`, and b, which may ask everything."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        self.path = folder / "tenants.yaml"
        self.key_a, self.entry_a = tenant("a", tasks=["one"], **fields)
        self.key_b, self.entry_b = tenant("b", tasks=["*"])
        write_tenants(self.path, self.entry_a, self.entry_b)
        self.service = Service(tenants=self.path)

    def client(self, key: str | None) -> AsyncClient:
        return AsyncClient(self.service.address, Access(api_key=key))


async def refusal(client: AsyncClient, task_id: str = "one", **parameters: Any) -> ServerError:
    with pytest.raises(ServerError) as raised:
        await client.generate(task_id, "x", **parameters)
    return raised.value


async def test_wrong_keys_are_unauthenticated(tmp_path: Path) -> None:
    two = Two(tmp_path)
    async with two.service.running():
        for key in (None, "nonsense", two.key_a[:-1] + "-", new_key()[0]):
            async with two.client(key) as client:
                assert (await refusal(client)).code is grpc.StatusCode.UNAUTHENTICATED
        for key in (two.key_a, two.key_b):
            async with two.client(key) as client:
                assert (await client.generate("one", "x")).text == "ab"
    assert two.service.value("mtlora_tenant_requests_total", tenant="a", status="OK") == 1
    tokens = [two.service.value("mtlora_tenant_tokens_total", tenant="a", kind=k) for k in ("prompt", "completion")]
    assert tokens == [len("x\nAnswer:"), 2]


@pytest.mark.parametrize(
    "method", [method for service in CONTRACTS for method in service.methods], ids=lambda method: method.name
)
async def test_every_method_but_probes_needs_a_key(tmp_path: Path, method: Any) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    async with Two(tmp_path).service.running() as service, grpc.aio.insecure_channel(service.address) as channel:
        call = (channel.unary_stream if method.server_streaming else channel.unary_unary)(path)(b"")
        assert (await call.code() is grpc.StatusCode.UNAUTHENTICATED) == (path not in PROBES)


async def test_a_forbidden_task_looks_like_an_unknown_one(tmp_path: Path) -> None:
    two = Two(tmp_path)
    async with two.service.running(), two.client(two.key_a) as a, two.client(two.key_b) as b:
        # `two` is served, `tow` is not. For tenant a, the errors differ in the id alone.
        errors = [await refusal(a, task_id) for task_id in ("two", "tow")]
        said = [(e.code, e.message.replace(e.resource or "?", "ID"), e.violations, e.quotas) for e in errors]
        assert said[0] == said[1]
        assert said[0][0] is grpc.StatusCode.NOT_FOUND
        assert (await b.generate("two", "x")).summary.task_id == "two"
        assert "near: two" in (await refusal(b, "tow")).message
        listing = inference_pb2.ListTasksRequest()
        tasks = [list((await client._stub.ListTasks(listing, metadata=client._metadata)).tasks) for client in (a, b)]
        assert [[task.id for task in each] for each in tasks] == [["one"], ["one", "two"]]
    assert two.service.value("mtlora_requests_total", method="Generate", task="two", status="NOT_FOUND") == 0
    assert two.service.value("mtlora_requests_total", method="Generate", task="unknown", status="NOT_FOUND") == 3


async def test_a_revoked_key_is_refused_after_the_reload(tmp_path: Path) -> None:
    two = Two(tmp_path)
    async with two.service.running(), two.client(two.key_a) as a, two.client(two.key_b) as b:
        await a.generate("one", "x")
        key, entry = tenant("a", tasks=["one", "two"])
        write_tenants(two.path, entry, two.entry_b)
        two.service.directory.reload_if_changed()
        assert (await refusal(a)).code is grpc.StatusCode.UNAUTHENTICATED
        await b.generate("one", "x")
        async with two.client(key) as fresh:
            await fresh.generate("two", "x")


async def test_a_quota_refusal_names_the_quota_and_when_to_retry(tmp_path: Path) -> None:
    two = Two(tmp_path, requests_per_second=0.5, burst_seconds=2)
    async with two.service.running(), two.client(two.key_a) as a, two.client(two.key_b) as b:
        await a.generate("one", "x")
        error = await refusal(a)
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.quotas == [("tenant:a", "0.5 requests_per_second")]
        assert error.retry_after_s == pytest.approx(2, abs=0.5)
        for _ in range(5):
            await b.generate("one", "x")


async def test_each_tenant_has_its_own_salt_for_the_prefix_cache(tmp_path: Path) -> None:
    two = Two(tmp_path)
    async with two.service.running(), two.client(two.key_a) as a, two.client(two.key_b) as b:
        for client in (a, b):
            await client.generate("one", "x")
        write_tenants(two.path, two.entry_a, two.entry_b, share_prefix_cache=True)
        two.service.directory.reload_if_changed()
        await a.generate("one", "x")
    assert [job.cache_salt for job in two.service.engine.jobs] == ["a", "b", None]


async def test_without_a_file_every_caller_is_the_open_tenant() -> None:
    async with Service().running() as service, AsyncClient(service.address) as client:
        await client.generate("one", "x")
    assert service.engine.jobs[0].cache_salt is None
    assert service.value("mtlora_tenant_requests_total", tenant="open", status="OK") == 1


async def test_neither_keys_nor_texts_reach_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger("mtlora.server")
    monkeypatch.setattr(root, "propagate", True)
    monkeypatch.setattr(root, "level", logging.INFO)
    root.manager._clear_cache()  # type: ignore[attr-defined]
    two = Two(tmp_path)
    async with two.service.running(), two.client(two.key_a) as a, two.client(two.key_b) as b:
        await a.generate("one", "confidential")
        # An exception's message may contain the text that a tenant sent.
        two.service.engine.error = RuntimeError("could not do 'confidential'")
        assert (await refusal(b)).code is grpc.StatusCode.INTERNAL
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert [line["tenant"] for line in lines if line["message"] == "request"] == ["a", "b"]
    (internal,) = [line for line in lines if line["message"] == "internal error"]
    assert internal["error"] == "RuntimeError"
    assert any("fakes.py" in where for where in internal["where"])
    written = json.dumps(lines)
    assert "confidential" not in written
    assert two.key_a[-20:] not in written


async def test_client_certificates_name_tenants(tmp_path: Path) -> None:
    ca, other_ca = authority(tmp_path), authority(tmp_path, "elsewhere")
    server = issue(ca, tmp_path, "server")
    a = issue(ca, tmp_path, "client-a", uri="spiffe://x/a")
    b = issue(ca, tmp_path, "client-b")
    stranger, expired = issue(ca, tmp_path, "stranger"), issue(ca, tmp_path, "expired", days=-1)
    forged = issue(other_ca, tmp_path, "forged")
    entries = [
        {"id": "a", "certificates": ["URI:spiffe://x/a"], "tasks": ["one"]},
        {"id": "b", "certificates": ["CN=client-b"]},
        {"id": "late", "certificates": ["CN=expired"]},
    ]
    path = write_tenants(tmp_path / "tenants.yaml", *entries)
    service = Service(tenants=path, tls_certificate=server.pem, tls_key=server.key, tls_client_ca=ca.pem)

    async def ask(who: Any, task_id: str) -> grpc.StatusCode:
        access = Access(ca=ca.pem, certificate=who and who.pem, key=who and who.key)
        async with AsyncClient(service.address, access) as client:
            try:
                await client.generate(task_id, "x", timeout=5)
            except ServerError as error:
                return error.code
            return grpc.StatusCode.OK

    async with service.running():
        assert await ask(a, "one") is grpc.StatusCode.OK
        assert await ask(a, "two") is grpc.StatusCode.NOT_FOUND
        assert await ask(b, "two") is grpc.StatusCode.OK
        assert await ask(stranger, "one") is grpc.StatusCode.UNAUTHENTICATED
        # The handshake refuses these.
        for refused in (expired, forged, None):
            assert await ask(refused, "one") is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_that_expires_during_a_connection_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = authority(tmp_path)
    server, a = issue(ca, tmp_path, "server"), issue(ca, tmp_path, "client-a")
    path = write_tenants(tmp_path / "tenants.yaml", {"id": "a", "certificates": ["CN=client-a"]})
    service = Service(tenants=path, tls_certificate=server.pem, tls_key=server.key, tls_client_ca=ca.pem)
    access = Access(ca=ca.pem, certificate=a.pem, key=a.key)
    async with service.running(), AsyncClient(service.address, access) as client:
        await client.generate("one", "x")
        later = a.certificate.not_valid_after_utc.timestamp() + 1
        monkeypatch.setattr("server.tenants.authentication.time.time", lambda: later)
        assert (await refusal(client)).code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_slow_reader_holds_up_itself_alone_and_is_ended(tmp_path: Path) -> None:
    from mtlora_pb.v1 import inference_pb2_grpc

    from server.job import Delta

    service = Service(turns=1, slow_reader_s=1.0)
    service.engine.deltas = [Delta("x" * 200_000, 1) for _ in range(20)] + [Delta("", 1, finish_reason="stop")]
    async with service.running(), AsyncClient(service.address) as quick:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(service.address, options=options) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(make_request("one", "x"))
            await call.read()
            # The only slot is free again, although nobody reads the stream.
            assert (await asyncio.wait_for(quick.generate("one", "y"), 5)).text
            await asyncio.sleep(1.5)
            assert service.value("mtlora_requests_in_flight") == 0
            name = "mtlora_requests_total"
            assert service.value(name, method="GenerateStream", task="one", status="RESOURCE_EXHAUSTED") == 1
            # The client gets the status when it reads on.
            with pytest.raises(grpc.aio.AioRpcError):
                await _read_on(call)
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "taken for 1 s" in await call.details()


async def _read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
