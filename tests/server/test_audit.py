"""The audit log: a line on file before a change, one before its status, none lost; and who a refused caller is."""

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from mtlora_pb.v1 import adapters_pb2 as pb
from mtlora_pb.v1 import adapters_pb2_grpc
from openinference_pb import grpc_predict_v2_pb2 as oi
from openinference_pb import grpc_predict_v2_pb2_grpc

from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.client import Access, AsyncClient, ServerError
from server.accounting import AuditError, AuditLog
from server.telemetry.metrics import Metrics
from server.tenants import TenantsError, read_tenants
from tests.server.fakes import FakeRegistry, Service
from tests.server.helpers import code_of


class Audited:
    """A server with an audit log, a tenant and an admin."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "audit.jsonl"
        self.service = Service.with_tenants(folder, {"a": {}, "operator": {"admin": True}}, audit_log=str(self.path))
        self.keys = self.service.keys

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    async def call(self, rpc: Callable[[Any], Any], request: Any, key: str | None) -> grpc.StatusCode:
        """The status of a call; `rpc` gives it from a channel."""
        metadata = (("authorization", f"Bearer {key}"), ("x-request-id", "the-call")) if key else ()
        async with grpc.aio.insecure_channel(self.service.address) as channel:
            return await code_of(rpc(channel)(request, metadata=metadata))

    async def change(self, name: str | None = "operator", model: str = "one") -> grpc.StatusCode:
        """Load a model through the Open Inference Protocol; `name`: whose key, or a key itself."""
        return await self.call(
            lambda channel: grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel).RepositoryModelLoad,
            oi.RepositoryModelLoadRequest(model_name=model),
            self.keys.get(name, name) if name else None,
        )


@asynccontextmanager
async def audited(folder: Path) -> AsyncIterator[Audited]:
    made = Audited(folder)
    async with made.service.running():
        yield made
    made.service.usage.close()


async def test_a_change_is_on_file_before_it_is_made_and_before_its_status(tmp_path: Path) -> None:
    async with audited(tmp_path) as here:
        before: list[list[dict[str, Any]]] = []

        class Noting(FakeRegistry):
            async def load(self, name: str) -> None:
                before.append(here.lines())
                await super().load(name)

        here.service.adapters.registry = cast(Any, Noting())
        assert await here.change() is grpc.StatusCode.OK
        received, completed = here.lines()
        assert before == [[received]]
        assert (received["stage"], completed["stage"]) == ("received", "completed")
        for line in (received, completed):
            assert line["peer"].startswith("ipv4:127.0.0.1:")
            assert line["time"].endswith("Z")
            assert {name: line[name] for name in ("tenant", "request_id", "method", "request")} == {
                "tenant": "operator",
                "request_id": "the-call",
                "method": "inference.GRPCInferenceService/RepositoryModelLoad",
                "request": {"model_name": "one"},
            }
        assert completed["status"] == "OK"
        # Asking is not audited.
        async with here.service.client("a") as client:
            await client.generate("one", "x")
        assert len(here.lines()) == 2


async def test_reads_and_refused_calls_get_one_line(tmp_path: Path) -> None:
    async with audited(tmp_path) as here:
        stub = adapters_pb2_grpc.AdaptersStub
        wrong = "mtk_0000000000000000_wrong"
        assert await here.call(lambda channel: stub(channel).List, pb.ListAdaptersRequest(), here.keys["a"]) is (
            grpc.StatusCode.PERMISSION_DENIED
        )
        load = pb.LoadAdapterRequest(adapter="mine", version="3")
        for key in (None, wrong):
            assert await here.call(lambda channel: stub(channel).Load, load, key) is grpc.StatusCode.UNAUTHENTICATED
        listed, *refused = here.lines()
        assert (listed["stage"], listed["tenant"], listed["status"]) == ("completed", "a", "PERMISSION_DENIED")
        assert listed["reason"] == "tenant a is not an admin"
        for line in refused:
            assert (line["stage"], line["tenant"], line["status"]) == (
                "completed",
                "unauthenticated",
                "UNAUTHENTICATED",
            )
            assert wrong not in json.dumps(line)
        # A refused change was requested, so it has a line, but nothing was received for execution.
        assert await here.call(lambda channel: stub(channel).Load, load, here.keys["a"]) is (
            grpc.StatusCode.PERMISSION_DENIED
        )
        assert [line["stage"] for line in here.lines()[3:]] == ["completed"]
        assert here.lines()[-1]["request"] == {"adapter": "mine", "version": "3"}
        long = pb.SetAdapterWeightsRequest(adapter="mine", weights={f"{i:0200}": 1 for i in range(4000)})
        await here.call(lambda channel: stub(channel).SetWeights, long, here.keys["a"])
        assert len(json.dumps(here.lines()[-1])) < 8192


async def test_nothing_changes_while_the_log_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes the first bytes of a line and then no more."""
    async with audited(tmp_path) as here:
        await here.change(model="one")
        write, room = os.write, [20]

        def full(file: int, data: bytes) -> int:
            if file != here.service.audit._file:
                return write(file, data)
            if not room[0]:
                raise OSError(errno.ENOSPC, "no space left")
            written = write(file, data[: room[0]])
            room[0] -= written
            return written

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            for _ in range(2):
                assert await here.change(model="two") is grpc.StatusCode.UNAVAILABLE
        assert here.service.registry.asked == [("load", "alpha")]
        assert here.service.value("mtlora_accounting_failures_total", log="audit") == 4
        assert await here.change(model="three") is grpc.StatusCode.OK
        # The torn line stands alone.
        *whole, torn, received, completed = here.path.read_text().splitlines()
        assert len(torn) == 20
        shown = [json.loads(line)["request"]["model_name"] for line in (*whole, received, completed)]
        assert shown == ["one", "one", "three", "three"]


async def test_a_change_keeps_its_status_if_only_its_second_line_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with audited(tmp_path) as here:
        write = os.write

        def fails_later(file: int, data: bytes) -> int:
            if b'"completed"' in data:
                raise OSError(errno.EIO, "input/output error")
            return write(file, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fails_later)
            assert await here.change() is grpc.StatusCode.OK
        assert [line["stage"] for line in here.lines()] == ["received"]


async def test_a_renamed_file_is_opened_anew(tmp_path: Path) -> None:
    async with audited(tmp_path) as here:
        await here.change(model="one")
        here.path.rename(tmp_path / "audit.1")
        await here.change(model="two")
        here.path.unlink()
        await here.change(model="three")
        assert [line["request"]["model_name"] for line in here.lines()] == ["three"] * 2
        old = (tmp_path / "audit.1").read_text().splitlines()
        assert [json.loads(line)["request"]["model_name"] for line in old] == ["one"] * 2


async def test_concurrent_calls_write_whole_lines(tmp_path: Path) -> None:
    async with audited(tmp_path) as here:
        await asyncio.gather(*(here.change(model=f"m{number}" + "x" * 500) for number in range(50)))
        lines = here.lines()
        assert len(lines) == 100
        assert {line["request"]["model_name"][:-200].rstrip("x…") for line in lines} == {f"m{n}" for n in range(50)}


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"audit_log: .*none/audit"):
        AuditLog(str(tmp_path / "none" / "audit"), Metrics())


async def test_refused_callers_are_unauthenticated_in_logs_and_metrics(
    tmp_path: Path, server_log: pytest.LogCaptureFixture
) -> None:
    async with audited(tmp_path) as here, AsyncClient(here.service.address, Access("mtk_00000000_x")) as client:
        with pytest.raises(ServerError, match="UNAUTHENTICATED"):
            await client.generate("one", "x")
        (fields,) = [record.fields for record in server_log.records if record.message == "request"]  # type: ignore[attr-defined]
        assert (fields["tenant"], fields["status"]) == ("unauthenticated", "UNAUTHENTICATED")
        labels = {"tenant": "unauthenticated", "status": "UNAUTHENTICATED"}
        assert here.service.value("mtlora_tenant_requests_total", **labels) == 1
        assert not here.service.value("mtlora_tenant_requests_total", tenant="open", status="UNAUTHENTICATED")


def test_no_tenant_may_be_called_unauthenticated(tmp_path: Path) -> None:
    path = write_tenants(tmp_path / "tenants.yaml", tenant("unauthenticated")[1])
    with pytest.raises(TenantsError, match="tenant id 'unauthenticated' is reserved"):
        read_tenants(path)
