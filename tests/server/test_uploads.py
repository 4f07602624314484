"""Checkpoints that come over gRPC into the folder of adapters, over a registry without an engine."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mtlora_pb.v1 import adapters_pb2 as pb
from mtlora_pb.v1 import adapters_pb2_grpc

from mtlora.cli import main
from mtlora.client import AsyncClient, Client, ServerError
from mtlora.client.errors import server_errors
from mtlora.client.upload import Upload
from server import cli
from server.registry.storage import Storage
from server.registry.uploads import Uploads
from tests.server.fakes import Service
from tests.server.home import Home, write
from tests.servicers import serving_here
from tests.waiting import eventually

MAX_BYTES = 1 << 20


@pytest.fixture
async def service(home: Home) -> AsyncIterator[Service]:
    await home.open()
    home.follow()
    service = Service()
    service.adapters.registry = home.registry
    service.adapters.uploads = uploads(home)
    async with service.running():
        yield service


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield adapters_pb2_grpc.AdaptersStub(channel)


def uploads(home: Home, root: Path | None = None, **limits: Any) -> Uploads:
    async def verify(folder: Path, found: Any) -> None:
        home.spool.release((await home.verifier.verify(folder, found)).content)

    limits = {"max_bytes": MAX_BYTES, "max_uploads": 2, "max_chunk_bytes": 700} | limits
    return Uploads(root or home.root, verify, Storage(), **limits)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    write(tmp_path / "made", "x", "y")
    return tmp_path / "made"


def begin(made: Path, adapter: str = "a", **changed: Any) -> pb.UploadAdapterRequest:
    message = Upload(made, adapter).begin()
    for name, value in changed.items():
        setattr(message.begin, name, value)
    return message


async def converse(service: Service, *requests: pb.UploadAdapterRequest) -> list[pb.UploadAdapterResponse]:
    """Every reply to these messages, all sent at once. Raises ServerError.

    Over grpc's blocking calls: where a server refuses while a client writes, grpc.aio may say INTERNAL
    (https://github.com/grpc/grpc/issues/36066).
    """

    def ask() -> list[pb.UploadAdapterResponse]:
        with grpc.insecure_channel(service.address) as channel, server_errors():
            return list(adapters_pb2_grpc.AdaptersStub(channel).Upload(iter(requests)))

    return await asyncio.to_thread(ask)


async def failure(service: Service, *requests: pb.UploadAdapterRequest) -> ServerError:
    with pytest.raises(ServerError) as raised:
        await converse(service, *requests)
    return raised.value


def unfinished(home: Home) -> list[str]:
    folder = home.root / ".uploads"
    return sorted(each.name for each in folder.iterdir()) if folder.exists() else []


async def test_what_is_uploaded_serves(service: Service, home: Home, made: Path) -> None:
    async with AsyncClient(service.address) as client:
        assert await client.upload_adapter(made, "a") == "1"
        await home.until_serving("x", "a/1")
        write(made, "x", seed=1)
        assert await client.upload_adapter(made, "a") == "2"
        await home.until_serving("x", "a/2")
        # The same content is there already.
        assert await client.upload_adapter(made, "a") == "2"
        assert sorted(each.name for each in (home.root / "a").iterdir()) == ["1", "2"]
        assert (home.root / "a" / "2" / "adapter.json").stat().st_mode & 0o777 == 0o644
        found = await client.download_manifest("a")
        assert (found.version, found.content) == ("2", hashlib.sha256(found.manifest).hexdigest())
        assert found.manifest == (made / "adapter.json").read_bytes()
        assert (await client.download_manifest("a", "1")).version == "1"
    assert unfinished(home) == []

    def blocking() -> str:
        with Client(service.address) as client:
            return client.upload_adapter(str(made), "b")

    assert await asyncio.to_thread(blocking) == "1"


def parts(made: Path, cuts: list[int], adapter: str = "a") -> Iterator[pb.UploadAdapterRequest]:
    """The chunks between cuts."""
    data = (made / "adapter.json").read_bytes() + (made / "adapter.safetensors").read_bytes()
    bounds = [0, *sorted({min(cut, len(data)) for cut in cuts} - {0, len(data)}), len(data)]
    for start, end in pairwise(bounds):
        yield pb.UploadAdapterRequest(chunk=pb.UploadChunk(offset=start, data=data[start:end]))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 9000), max_size=6), lost=st.integers(0, 6))
async def test_goes_on_after_a_cut_anywhere(
    service: Service, home: Home, tmp_path: Path, cuts: list[int], lost: int
) -> None:
    """The connection breaks after some messages; another call, of another client, asks where to go on."""
    number = len(list(tmp_path.glob("made-*")))
    made = tmp_path / f"made-{number}"
    write(made, f"t{number}", seed=number)
    name = f"a{number}"
    chunks = list(parts(made, cuts))
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = adapters_pb2_grpc.AdaptersStub(channel)
        call = stub.Upload()
        await call.write(begin(made, name))
        assert (await call.read()).received == 0
        for chunk in chunks[: min(lost, len(chunks) - 1)]:
            await call.write(chunk)
        call.cancel()
    async with AsyncClient(service.address) as client:
        assert await client.upload_adapter(made, name) == "1"
    for file in ("adapter.json", "adapter.safetensors"):
        assert (home.root / name / "1" / file).read_bytes() == (made / file).read_bytes()


async def test_goes_on_after_a_restart_of_the_server(service: Service, home: Home, made: Path) -> None:
    first, *_ = parts(made, [100])
    await failure(service, begin(made), first)
    service.adapters.uploads = uploads(home)
    replies = await converse(service, begin(made), *list(parts(made, [100]))[1:])
    assert [(reply.received, reply.version) for reply in replies] == [(100, ""), (Upload(made, "a").bytes, "1")]


async def test_a_refusal_while_the_client_writes_is_not_lost(tmp_path: Path) -> None:
    class Refusing(adapters_pb2_grpc.AdaptersServicer):
        async def Upload(self, requests: Any, context: Any) -> AsyncIterator[pb.UploadAdapterResponse]:
            await anext(requests)
            yield pb.UploadAdapterResponse(max_chunk_bytes=64 << 10)
            await anext(requests)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    (tmp_path / "adapter.json").write_text("{}")
    (tmp_path / "adapter.safetensors").write_bytes(bytes(8 << 20))
    async with (
        serving_here(Refusing(), adapters_pb2_grpc.add_AdaptersServicer_to_server) as (address, _),
        AsyncClient(address) as client,
    ):
        for _ in range(10):
            with pytest.raises(ServerError, match="RESOURCE_EXHAUSTED: full"):
                await client.upload_adapter(tmp_path, "a")


async def test_a_cancelled_upload_ends_its_call(service: Service, home: Home, made: Path) -> None:
    waiting, ended = asyncio.Event(), asyncio.Event()

    async def verify(*_: Any) -> None:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    service.adapters.uploads = Uploads(
        home.root, verify, Storage(), max_bytes=MAX_BYTES, max_uploads=2, max_chunk_bytes=700
    )
    async with AsyncClient(service.address) as client:
        upload = asyncio.create_task(client.upload_adapter(made, "a", timeout=60))
        await waiting.wait()
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        async with asyncio.timeout(10):
            await ended.wait()


async def test_a_later_call_takes_over(service: Service, home: Home, made: Path, stub: Any) -> None:
    """The server learns of a cut connection late."""
    first, second, third = parts(made, [100, 200])
    old = stub.Upload()
    await old.write(begin(made))
    await old.read()
    await old.write(first)
    await eventually(lambda: unfinished(home) != [] and any(home.root.glob(".uploads/*/adapter.json")))
    new = stub.Upload()
    await new.write(begin(made))
    assert (await new.read()).received == 100
    await old.write(second)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await old.read()
    assert raised.value.code() is grpc.StatusCode.ABORTED
    for chunk in (second, third):
        await new.write(chunk)
    assert (await new.read()).version == "1"


CHUNK = pb.UploadAdapterRequest(chunk=pb.UploadChunk(offset=0, data=b"x"))
LONG = "1 to 1048576 (max_adapter_mib)"


@pytest.mark.parametrize(
    ("requests", "field", "found"),
    [
        (lambda made: [CHUNK], "begin", "found none in the first message"),
        (lambda made: [pb.UploadAdapterRequest()], "begin", "found none in the first message"),
        (lambda made: [begin(made), begin(made)], "chunk", "found none in a message after the first"),
        (lambda made: [begin(made)], "chunk", "found the end after 0 of "),
        (lambda made: [begin(made, "../b")], "begin.adapter", "found '../b'"),
        (lambda made: [begin(made, "")], "begin.adapter", "found ''"),
        (lambda made: [begin(made, ".uploads")], "begin.adapter", "found '.uploads'"),
        (lambda made: [begin(made, "a/b")], "begin.adapter", "found 'a/b'"),
        (lambda made: [begin(made, "a\0b")], "begin.adapter", "found 'a"),
        (lambda made: [begin(made, content="../" * 22)], "begin.content", "allowed: a sha256"),
        (lambda made: [begin(made, content="A" * 64)], "begin.content", "allowed: a sha256"),
        (lambda made: [begin(made, manifest_bytes=0)], "begin.manifest_bytes", f"found 0; allowed: {LONG}"),
        (lambda made: [begin(made, tensors_bytes=2**63)], "begin.tensors_bytes", f"allowed: {LONG}"),
        (lambda made: [begin(made, tensors_bytes=MAX_BYTES)], "begin", "allowed: up to 1048576"),
        (
            lambda made: [begin(made), pb.UploadAdapterRequest(chunk=pb.UploadChunk(offset=7, data=b"x"))],
            "chunk.offset",
            "found 7; allowed: 0",
        ),
        (
            lambda made: [begin(made), pb.UploadAdapterRequest(chunk=pb.UploadChunk(offset=0))],
            "chunk.data",
            "found 0 bytes",
        ),
        (
            lambda made: [
                begin(made, manifest_bytes=2, tensors_bytes=2),
                pb.UploadAdapterRequest(chunk=pb.UploadChunk(offset=0, data=b"12345")),
            ],
            "chunk.data",
            "found 5 bytes; allowed: 1 to 4",
        ),
        (lambda made: [begin(made, content="0" * 64), *parts(made, [])], "begin.content", "found a manifest of sha256"),
    ],
)
async def test_names_what_is_wrong(
    service: Service, home: Home, made: Path, requests: Callable[[Path], Any], field: str, found: str
) -> None:
    error = await failure(service, *requests(made))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0][0] == field
    assert found in error.violations[0][1]
    assert [each.name for each in home.root.iterdir() if each.name != ".uploads"] == []


async def test_what_does_not_verify_is_refused_and_forgotten(service: Service, home: Home, made: Path) -> None:
    manifest = json.loads((made / "adapter.json").read_bytes())
    (made / "adapter.json").write_text(json.dumps(manifest | {"tensors_sha256": "0" * 64}))
    error = await failure(service, begin(made), *parts(made, [50]))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "not verified" in error.message
    assert "sha256: expected 0000" in error.message
    assert unfinished(home) == []
    assert not (home.root / "a").exists()


async def test_bounds_unfinished_uploads(service: Service, home: Home, made: Path) -> None:
    first, *_ = parts(made, [100])
    for adapter in "ab":
        await failure(service, begin(made, adapter), first)
    error = await failure(service, begin(made, "c"), first)
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 uploads are unfinished" in error.message
    # One that exists goes on, and those of yesterday make room.
    assert (await converse(service, begin(made, "a"), *list(parts(made, [100]))[1:]))[-1].version == "1"
    old = time.time() - 90_000
    os.utime(next((home.root / ".uploads").glob("b--*")), (old, old))
    await failure(service, begin(made, "c"), first)
    assert [name[0] for name in unfinished(home)] == ["c"]


@pytest.mark.parametrize("why", ["read-only", "none", "off", "full"])
async def test_says_why_there_is_no_place(
    service: Service, home: Home, made: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = {"read-only": 30, "full": 28}.get(why, 0)
    if number:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "mkdir", refuse)
    elif why == "none":
        service.adapters.uploads._root = None
    else:
        service.adapters.uploads = uploads(home, max_uploads=0)
    error = await failure(service, begin(made), *parts(made, []))
    if why == "full":
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_s
    else:
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    said = {
        "read-only": "cannot be written: Read-only",
        "none": "no folder",
        "off": "uploads are off",
        "full": "No space",
    }
    assert said[why] in error.message


async def test_download_of_a_missing_manifest_is_not_found(service: Service, home: Home, made: Path) -> None:
    async with AsyncClient(service.address) as client:
        for arguments in (("nobody",), ("a", "9")):
            with pytest.raises(ServerError, match="NOT_FOUND"):
                await client.download_manifest(*arguments)
        with pytest.raises(ServerError, match="INVALID_ARGUMENT"):
            await client.download_manifest("")


async def test_only_admins_upload_and_each_upload_is_written_down(home: Home, made: Path, tmp_path: Path) -> None:
    await home.open()
    tenants = {"operator": {"admin": True}, "other": {}}
    service = Service.with_tenants(tmp_path, tenants, audit_log=str(tmp_path / "audit"))
    service.adapters.registry, service.adapters.uploads = home.registry, uploads(home)
    async with service.running():
        async with service.client("other") as client:
            for call in (client.upload_adapter(made, "a"), client.download_manifest("a")):
                with pytest.raises(ServerError, match="PERMISSION_DENIED"):
                    await call
        assert unfinished(home) == []
        async with service.client("operator") as client:
            await client.upload_adapter(made, "a")
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    mine = [line for line in lines if line["method"].endswith("Upload") and line["tenant"] == "operator"]
    assert [line["stage"] for line in mine] == ["received", "completed"]
    assert mine[0]["request"]["begin"]["adapter"] == "a"
    assert (mine[1]["status"], mine[1]["version"]) == ("OK", "1")


async def test_a_stream_that_stops_midway_is_ended(home: Home, made: Path) -> None:
    await home.open()
    service = Service(request_timeout_s=0.2)
    service.adapters.registry, service.adapters.uploads = home.registry, uploads(home)
    async with service.running(), grpc.aio.insecure_channel(service.address) as channel:
        call = adapters_pb2_grpc.AdaptersStub(channel).Upload()
        await call.write(begin(made))
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_command_publishes_to_a_server(
    service: Service, home: Home, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(main, ["publish", str(made), "a", "--to", service.address]) == 0
    assert capsys.readouterr().out == "a/1\n"
    await home.until_serving("x", "a/1")
    shown = ["adapters", "--address", service.address, "manifest", "a"]
    assert await asyncio.to_thread(cli.main, shown) == 0
    assert [task["id"] for task in json.loads(capsys.readouterr().out)["tasks"]] == ["x", "y"]
    assert await asyncio.to_thread(main, ["publish", str(made), "../a", "--to", service.address]) == 2
    assert "begin.adapter" in capsys.readouterr().err
    (made / "adapter.safetensors").write_bytes(b"garbage")
    assert await asyncio.to_thread(main, ["publish", str(made), "a", "--to", service.address]) == 2
    assert "adapter.safetensors" in capsys.readouterr().err
