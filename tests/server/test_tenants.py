"""Tenants over gRPC, with a fake engine: who gets in, what they see, and what a changed file changes."""

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mtlora_pb.v1 import adapters_pb2, inference_pb2
from openinference_pb import grpc_predict_v2_pb2

from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.client import Access, AsyncClient, ServerError
from server.cli import new_key as new_key_cli
from server.errors import RequestFailedError
from server.isolation import ChildEndedError, ChildError, Limits, in_child
from server.telemetry.logs import JsonFormatter
from server.tenants import Directory, TenantsError, read_tenants
from server.tenants.authentication import Authenticator
from server.tenants.config import ApiKey
from server.tenants.directory import Tenants
from server.tenants.keys import checked_hash, hash_key, new_key
from tests.faults._certificates import authority, issue
from tests.server.fakes import Service
from tests.server.helpers import code_of
from tests.waiting import eventually

CONTRACTS = [
    inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    adapters_pb2.DESCRIPTOR.services_by_name["Adapters"],
    grpc_predict_v2_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
]
PROBES = {"/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady"}


def test_a_new_key_matches_its_own_hash_alone() -> None:
    key, key_id, hashed = new_key()
    entry = ApiKey(id=key_id, hash=hashed)
    assert key_id in key
    assert key not in hashed
    assert entry.matches(key)
    assert not entry.matches(key + "x")
    assert not entry.matches(new_key()[0])


@given(st.text(max_size=80) | st.from_regex(r"(scrypt|sha256)\$[0-9A-Fa-f]{62,65}"))
def test_a_malformed_hash_is_refused(text: str) -> None:
    assume(not re.fullmatch(r"sha256\$[0-9a-f]{64}", text))
    with pytest.raises(ValueError, match=r"allowed: sha256\$DIGEST, as `mtlora-server new-key` prints"):
        checked_hash(text)


def test_yaml_reads_the_ids_of_new_keys_as_texts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Random hexadecimal digits that are a number: an integer, an octal one, a float.
    numbers = ["8950764481373181", "0123456712345671", "12345678901234e5", "1234567890123e10"]
    draw = secrets.token_hex
    monkeypatch.setattr("server.tenants.keys.secrets.token_hex", lambda size: numbers.pop() if numbers else draw(size))
    for _ in range(1000):
        new_key_cli.run(argparse.Namespace())
        printed = capsys.readouterr()
        (entry,) = yaml.safe_load(printed.out)
        key = printed.err.split()[-1]
        assert entry == {"id": key.split("_")[1], "hash": hash_key(key)}


def test_guesses_at_a_key_cost_its_owner_nothing(tmp_path: Path) -> None:
    """After a restart, while strangers who know the key's id try secrets."""
    key, a = tenant("a")
    authenticator = Authenticator(Directory(write_tenants(tmp_path / "tenants.yaml", a)))

    async def ask(sent: str) -> str:
        return (await authenticator.tenant([("authorization", f"Bearer {sent}")], dict)).id

    async def attack() -> list[Any]:
        guesses = [key[:-43] + secrets.token_urlsafe(32) for _ in range(500)]
        return await asyncio.gather(*map(ask, guesses), ask(key), return_exceptions=True)

    *refused, owner = asyncio.run(attack())
    assert owner == "a"
    assert {error.code for error in refused} == {grpc.StatusCode.UNAUTHENTICATED}


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
        ("tenants: [{id: a, certificates: [CN=a]}, {id: a, certificates: [CN=b]}]", "tenant id 'a': found twice"),
        (
            "tenants: [{id: a, certificates: [CN=a]}, {id: b, certificates: [CN=a]}]",
            "certificate 'CN=a': found twice, in tenants a and b",
        ),
        ("tenants: [{id: a, api_keys: [{id: 12345678, hash: secret}]}]", "api_keys.0"),
    ],
)
def test_bad_files_name_the_entry(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(content)
    with pytest.raises(TenantsError, match=f"(?s){message}"):
        read_tenants(path)


async def test_a_bad_file_keeps_the_old_tenants(tmp_path: Path) -> None:
    failures, changes = list[int](), list[Any]()
    _, a = tenant("a")
    path = write_tenants(tmp_path / "tenants.yaml", a)
    directory = Directory(path, on_change=changes.append, on_failure=lambda: failures.append(1))
    old = directory.current
    for damage in (lambda: path.write_text("tenants: 7"), path.unlink):
        damage()
        await directory.reload_if_changed()
        await directory.reload_if_changed()
        assert directory.current is old
    assert (len(failures), changes) == (2, [])
    write_tenants(path, a, tenant("b")[1])
    await directory.reload_if_changed()
    assert set(directory.current.by_id) == {"a", "b"}
    assert changes == [directory.current]


# Each level names the one below it nine times.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
BROKEN = [
    "tenants: [{id: a, certificates: [CN=a], expires: 2026-02-30}]",
    "tenants: [{id: a, api_keys: [{id: k1234567, hash: x, expires: 2026-02-30}]}]",
    "tenants: !!timestamp 2026-02-30",
    "tenants: !!timestamp x",
    "tenants: !!int x",
    "tenants: !!float 1e",
    "tenants: !!python/object/apply:os.getpid []",
    "tenants: !!set [a]",
    "tenants: !!binary é",
    "!!bool x: 1",
    "? [a]\n: 1",
    "a: *b",
    "&a [*a]",
    "tenants: &a [*a]",
    "[" * 100_000,
    "{" * 3_000 + "}" * 3_000,
    f"{BOMB}tenants: *a11",
    "tenants: [{id: a, certificates: [CN=a], weight: " + "9" * 5_000 + "}]",
    "\x00",
]


@pytest.mark.slow
@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
async def test_no_file_ends_the_watch(tmp_path: Path, content: str) -> None:
    failures = list[int]()
    a, b = tenant("a")[1], tenant("b")[1]
    path = write_tenants(tmp_path / "tenants.yaml", a, b)
    directory = Directory(path, on_failure=lambda: failures.append(1))
    watching = asyncio.create_task(directory.watch(0.01))
    try:
        path.write_text(content)
        await eventually(lambda: bool(failures), 30)
        assert set(directory.current.by_id) == {"a", "b"}
        # Revokes the key.
        write_tenants(path, b)
        await eventually(lambda: set(directory.current.by_id) == {"b"}, 30)
    finally:
        watching.cancel()


YAML_PIECES = [
    "tenants", "id", "expires", "api_keys", ": ", "- ", "\n", "  ", "[", "]", "{", "}", ",", "&a ", "*a", "<<",
    "!!int ", "!!timestamp ", "!!binary ", "!!omap ", "!!float ",
    "? ", "| ", "2026-02-30", "1e400", "0x", "1:99", "~", "'", '"',
]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.lists(st.sampled_from(YAML_PIECES), max_size=30).map(lambda p: "".join(p).encode()))
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_bytes(content)
    with contextlib.suppress(TenantsError):
        read_tenants(path)


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_reloading_never_raises(tmp_path: Path, content: bytes) -> None:
    path = write_tenants(tmp_path / "tenants.yaml", tenant("a")[1])
    directory = Directory(path)
    old = directory.current
    path.write_bytes(content)
    asyncio.run(directory.reload_if_changed())
    assert directory.current is old


def _dies(path: Path) -> Iterator[Any]:
    os._exit(7)
    yield


def _hangs(path: Path) -> Iterator[Any]:
    time.sleep(600)
    yield


@pytest.mark.parametrize(("work", "message"), [(_dies, "exit status 7"), (_hangs, r"not done within 0\.5 s")])
async def test_a_child_that_dies_or_hangs_raises(tmp_path: Path, work: Any, message: str) -> None:
    with pytest.raises(ChildError, match=message):
        await asyncio.to_thread(in_child, work, tmp_path, limits=Limits(0.5 if work is _hangs else 30))


async def test_a_reader_that_died_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is right, and a key may have been revoked in it."""
    failures, outcomes = list[int](), [ChildEndedError("no process for it"), None]

    async def read(*arguments: Any) -> Tenants:
        if outcome := outcomes.pop(0):
            raise outcome
        return read_tenants(*arguments)

    monkeypatch.setattr("server.tenants.directory.read_tenants_aside", read)
    path = write_tenants(tmp_path / "tenants.yaml", tenant("a")[1], tenant("b")[1])
    directory = Directory(path, on_failure=lambda: failures.append(1))
    write_tenants(path, tenant("a")[1])
    await directory.reload_if_changed()
    assert (set(directory.current.by_id), failures) == ({"a", "b"}, [1])
    await directory.reload_if_changed()
    assert set(directory.current.by_id) == {"a"}


@pytest.mark.slow
async def test_the_loop_stands_still_for_no_part_of_a_reload(tmp_path: Path) -> None:
    """Measured in processor time of the loop's thread, which does not depend on the machine's load."""
    path = write_tenants(tmp_path / "tenants.yaml", *(tenant(f"t{number}")[1] for number in range(3000)))
    directory = Directory(path)
    # So long takes the loop in one piece if it reads the file itself.
    began = time.thread_time()
    read_tenants(path)
    whole = time.thread_time() - began
    longest, turn = 0.0, 0.0

    async def measure() -> None:
        nonlocal longest, turn
        turn = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, turn = max(longest, now - turn), now

    measuring = asyncio.create_task(measure())
    try:
        os.utime(path)
        old = directory.current
        await directory.reload_if_changed()
    finally:
        measuring.cancel()
    assert directory.current is not old
    assert longest < whole / 5


async def test_an_expired_key_is_unauthenticated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, entry = tenant("a")
    entry["api_keys"][0]["expires"] = "2026-12-31"
    later = {**entry["api_keys"][0], "expires": "2999-01-01T00:00:00+01:00"}
    path = write_tenants(tmp_path / "tenants.yaml", entry)
    authenticator = Authenticator(Directory(path))
    metadata = [("authorization", f"Bearer {key}")]
    end = datetime(2027, 1, 1, tzinfo=UTC).timestamp()
    monkeypatch.setattr("server.tenants.config.time.time", lambda: end - 1)
    assert (await authenticator.tenant(metadata, dict)).id == "a"
    monkeypatch.setattr("server.tenants.config.time.time", lambda: end)
    with pytest.raises(RequestFailedError, match="the API key has expired") as raised:
        await authenticator.tenant(metadata, dict)
    assert raised.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert ApiKey.model_validate(later).expires == datetime(2998, 12, 31, 23, tzinfo=UTC)


@pytest.mark.parametrize("expires", ["2026-02-30", "2026-12-31T10:00:00", "tomorrow", "1e9", "9999-12-32", "2026"])
def test_an_expiry_is_a_date_or_a_moment_with_a_zone(tmp_path: Path, expires: str) -> None:
    _, entry = tenant("a")
    entry["api_keys"][0]["expires"] = expires
    path = write_tenants(tmp_path / "tenants.yaml", entry)
    with pytest.raises(TenantsError, match=r"tenants\.0\.api_keys\.0\.expires: .*allowed: a date such as"):
        read_tenants(path)


def two_tenants(folder: Path, **fields: Any) -> Service:
    """A server with tenants a, which may ask `one`, and b, which may ask everything."""
    return Service.with_tenants(folder, {"a": {"tasks": ["one"], **fields}, "b": {"tasks": ["*"]}})


async def refusal(client: AsyncClient, task_id: str = "one", **parameters: Any) -> ServerError:
    with pytest.raises(ServerError) as raised:
        await client.generate(task_id, "x", **parameters)
    return raised.value


async def test_wrong_keys_are_unauthenticated(tmp_path: Path) -> None:
    two = two_tenants(tmp_path)
    async with two.running():
        for key in (None, "nonsense", two.keys["a"][:-1] + "-", new_key()[0]):
            async with AsyncClient(two.address, Access(key), retry=None) as client:
                assert (await refusal(client)).code is grpc.StatusCode.UNAUTHENTICATED
        for key in (two.keys["a"], two.keys["b"]):
            async with AsyncClient(two.address, Access(key), retry=None) as client:
                assert (await client.generate("one", "x")).text == "ab"
    assert two.value("mtlora_tenant_requests_total", tenant="a", status="OK") == 1
    tokens = [two.value("mtlora_tenant_tokens_total", tenant="a", kind=k) for k in ("prompt", "completion")]
    assert tokens == [len("x\nAnswer:"), 2]


@pytest.mark.parametrize(
    "method", [method for service in CONTRACTS for method in service.methods], ids=lambda method: method.name
)
async def test_every_method_but_probes_needs_a_key(tmp_path: Path, method: Any) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    async with two_tenants(tmp_path).running() as service, grpc.aio.insecure_channel(service.address) as channel:
        call = (channel.unary_stream if method.server_streaming else channel.unary_unary)(path)(b"")
        assert (await call.code() is grpc.StatusCode.UNAUTHENTICATED) == (path not in PROBES)


async def test_a_forbidden_task_looks_like_an_unknown_one(tmp_path: Path) -> None:
    two = two_tenants(tmp_path)
    async with two.running(), two.client("a") as a, two.client("b") as b:
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
    assert two.value("mtlora_requests_total", method="Generate", task="two", status="NOT_FOUND") == 0
    assert two.value("mtlora_requests_total", method="Generate", task="unknown", status="NOT_FOUND") == 3


async def test_a_revoked_key_is_refused_after_the_reload(tmp_path: Path) -> None:
    two = two_tenants(tmp_path)
    async with two.running(), two.client("a") as a, two.client("b") as b:
        await a.generate("one", "x")
        key, entry = tenant("a", tasks=["one", "two"])
        write_tenants(tmp_path / "tenants.yaml", entry, two.entries["b"])
        await two.directory.reload_if_changed()
        assert (await refusal(a)).code is grpc.StatusCode.UNAUTHENTICATED
        await b.generate("one", "x")
        async with AsyncClient(two.address, Access(key), retry=None) as fresh:
            await fresh.generate("two", "x")


async def test_a_quota_refusal_names_the_quota_and_when_to_retry(tmp_path: Path) -> None:
    two = two_tenants(tmp_path, requests_per_second=0.5, burst_seconds=2)
    async with two.running(), two.client("a") as a, two.client("b") as b:
        await a.generate("one", "x")
        error = await refusal(a)
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.quotas == [("tenant:a", "0.5 requests_per_second")]
        assert error.retry_after_s == pytest.approx(2, abs=0.5)
        for _ in range(5):
            await b.generate("one", "x")


async def test_each_tenant_has_its_own_salt_for_the_prefix_cache(tmp_path: Path) -> None:
    two = two_tenants(tmp_path)
    async with two.running(), two.client("a") as a, two.client("b") as b:
        for client in (a, b):
            await client.generate("one", "x")
        write_tenants(tmp_path / "tenants.yaml", two.entries["a"], two.entries["b"], share_prefix_cache=True)
        await two.directory.reload_if_changed()
        await a.generate("one", "x")
    assert [job.cache_salt for job in two.engine.jobs] == ["a", "b", None]


async def test_without_a_file_every_caller_is_the_open_tenant() -> None:
    async with Service().running() as service, AsyncClient(service.address) as client:
        await client.generate("one", "x")
    assert service.engine.jobs[0].cache_salt is None
    assert service.value("mtlora_tenant_requests_total", tenant="open", status="OK") == 1


async def test_neither_keys_nor_texts_reach_the_log(tmp_path: Path, server_log: pytest.LogCaptureFixture) -> None:
    two = two_tenants(tmp_path)
    async with two.running(), two.client("a") as a, two.client("b") as b:
        await a.generate("one", "confidential")
        # An exception's message may contain the text that a tenant sent.
        two.engine.error = RuntimeError("could not do 'confidential'")
        assert (await refusal(b)).code is grpc.StatusCode.INTERNAL
    lines = [json.loads(JsonFormatter().format(record)) for record in server_log.records]
    assert [line["tenant"] for line in lines if line["message"] == "request"] == ["a", "b"]
    (internal,) = [line for line in lines if line["message"] == "internal error"]
    assert internal["error"] == "RuntimeError"
    assert any("fakes.py" in where for where in internal["where"])
    written = json.dumps(lines)
    assert "confidential" not in written
    assert two.keys["a"][-20:] not in written


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
        async with AsyncClient(service.address, access, retry=None) as client:
            return await code_of(client.generate(task_id, "x", timeout=5))

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
