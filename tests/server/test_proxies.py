"""The tenant and the class that a trusted proxy names in a request's headers: whose word counts, and for what."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2, inference_pb2_grpc

from benchmarks.harness.tenants import tenant, write_tenants
from server.errors import RequestFailedError
from server.tenants import Priority, Tenant, TenantsError, read_tenants
from server.tenants.directory import Tenants
from server.tenants.proxies import FAIRNESS_ID, OBJECTIVE, named_tenant
from tests.faults._certificates import authority, issue
from tests.server.fakes import Service

OBJECTIVES = {"chat": "interactive", "nightly": "batch"}


class Fleet:
    """A server behind a gateway, with a tenant, a stranger and an admin who have keys of their own."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        tenants: dict[str, dict[str, Any]] = {
            "gateway": {"tasks": [], "speaks_for": ["acme*", "root"], "certificates": ["URI:spiffe://cluster/gateway"]},
            "acme": {"tasks": ["one"]},
            "bolt": {},
            "root": {"admin": True},
        }
        self.service = Service.with_tenants(folder, tenants, objectives=OBJECTIVES, **settings)

    async def tasks(self, *headers: tuple[str, str], key: str = "", channel: Any = None) -> set[str] | grpc.StatusCode:
        """The tasks that a caller sees, or the status that it gets."""
        authorization = self.service.access(key).metadata() if key else ()
        try:
            async with channel or grpc.aio.insecure_channel(self.service.address) as open_channel:
                stub = inference_pb2_grpc.InferenceStub(open_channel)
                reply = await stub.ListTasks(inference_pb2.ListTasksRequest(), metadata=(*authorization, *headers))
                return {task.id for task in reply.tasks}
        except grpc.aio.AioRpcError as error:
            code: grpc.StatusCode = error.code()
            return code


async def test_a_proxy_names_the_tenants_that_it_speaks_for(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    async with fleet.service.running():
        assert await fleet.tasks((FAIRNESS_ID, "acme"), key="gateway") == {"one"}
        assert fleet.service.value("mtlora_tenant_requests_total", tenant="acme", status="OK") == 1
        # Without the header, the call belongs to the proxy itself, which may ask no task.
        assert await fleet.tasks(key="gateway") == set()


@pytest.mark.parametrize("name", ["bolt", "root", "nobody", "gateway"])
async def test_a_proxy_names_nobody_else_and_no_admin(name: str, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    async with fleet.service.running():
        assert await fleet.tasks((FAIRNESS_ID, name), key="gateway") is grpc.StatusCode.PERMISSION_DENIED


async def test_strangers_claim_nothing(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    async with fleet.service.running():
        assert await fleet.tasks((FAIRNESS_ID, "acme"), key="bolt") == {"one", "two"}
        assert await fleet.tasks((FAIRNESS_ID, "bolt"), key="acme") == {"one"}
        assert await fleet.tasks((FAIRNESS_ID, "acme")) is grpc.StatusCode.UNAUTHENTICATED
        assert fleet.service.value("mtlora_tenant_requests_total", tenant="bolt", status="OK") == 1


@pytest.mark.parametrize("header", [FAIRNESS_ID, OBJECTIVE])
async def test_a_clients_own_header_that_the_proxy_let_pass_is_refused(header: str, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    async with fleet.service.running():
        twice = await fleet.tasks((header, "acme"), (header, "acme"), key="gateway")
        assert twice is grpc.StatusCode.PERMISSION_DENIED


async def test_a_proxy_is_trusted_by_its_certificate(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    served = issue(ca, tmp_path, "localhost")
    fleet = Fleet(tmp_path, tls_certificate=served.pem, tls_key=served.key, tls_client_ca=ca.pem)

    def channel(name: str, uri: str | None = None) -> Any:
        shown = issue(ca, tmp_path, name, uri=uri)
        credentials = grpc.ssl_channel_credentials(ca.pem.read_bytes(), shown.key.read_bytes(), shown.pem.read_bytes())
        return grpc.aio.secure_channel(fleet.service.address.replace("127.0.0.1", "localhost"), credentials)

    async with fleet.service.running():
        gateway = ("gateway", "spiffe://cluster/gateway")
        assert await fleet.tasks((FAIRNESS_ID, "acme"), channel=channel(*gateway)) == {"one"}
        stranger = await fleet.tasks((FAIRNESS_ID, "acme"), channel=channel("stranger"))
        assert stranger is grpc.StatusCode.UNAUTHENTICATED
        # A key that the proxy passes on decides, whatever the headers say.
        assert await fleet.tasks((FAIRNESS_ID, "acme"), key="bolt", channel=channel(*gateway)) == {"one", "two"}


def test_an_objective_lowers_a_request_and_never_raises_it() -> None:
    proxy = Tenant(id="gateway", api_keys=(), speaks_for=("*",))
    acme = Tenant(id="acme", priority=Priority.STANDARD)
    tenants = Tenants({"acme": acme}, objectives={name: Priority(each) for name, each in OBJECTIVES.items()})

    def priority(*headers: tuple[str, str]) -> Priority:
        found = named_tenant(proxy, tenants, ((FAIRNESS_ID, "acme"), *headers))
        assert found.id == "acme"
        return found.priority

    assert priority() is Priority.STANDARD
    assert priority((OBJECTIVE, "nightly")) is Priority.BATCH
    assert priority((OBJECTIVE, "chat")) is Priority.STANDARD
    assert priority((OBJECTIVE, "unheard-of")) is Priority.STANDARD


LLM_D = ("x-llm-d-inference-fairness-id", "x-llm-d-inference-objective")
HEADERS = st.sampled_from([FAIRNESS_ID, OBJECTIVE, *LLM_D, "authorization", "x-request-id"])


def test_names_of_llm_d_mean_the_same_and_may_come_beside_the_others() -> None:
    proxy = Tenant(id="gateway", api_keys=(), speaks_for=("*",))
    known = {name: Tenant(id=name, priority=Priority.STANDARD) for name in ("acme", "bolt")}
    tenants = Tenants(known, objectives={"nightly": Priority.BATCH})
    fairness_id, objective = LLM_D
    for headers in (
        ((fairness_id, "acme"), (objective, "nightly")),
        ((FAIRNESS_ID, "acme"), (fairness_id, "acme"), (OBJECTIVE, "nightly"), (objective, "nightly")),
    ):
        found = named_tenant(proxy, tenants, headers)
        assert (found.id, found.priority) == ("acme", Priority.BATCH)
    # One of two values may be the client's.
    for headers in (
        ((FAIRNESS_ID, "acme"), (fairness_id, "bolt")),
        ((fairness_id, "acme"), (FAIRNESS_ID, "bolt")),
        ((fairness_id, "acme"), (fairness_id, "acme")),
    ):
        with pytest.raises(RequestFailedError, match="twice") as refused:
            named_tenant(proxy, tenants, headers)
        assert refused.value.code is grpc.StatusCode.PERMISSION_DENIED


@given(st.lists(st.tuples(HEADERS, st.sampled_from(["acme", "root", "", "nightly"]) | st.binary(max_size=8))))
def test_any_headers_give_a_tenant_that_the_proxy_speaks_for_or_a_refusal(headers: list[tuple[str, Any]]) -> None:
    proxy = Tenant(id="gateway", speaks_for=("acme", "root"))
    known = {"acme": Tenant(id="acme"), "root": Tenant(id="root", admin=True)}
    tenants = Tenants(known, objectives={"nightly": Priority.BATCH})
    code = None
    try:
        assert named_tenant(proxy, tenants, headers).id in ("acme", "gateway")
    except RequestFailedError as error:
        code = error.code
    assert code in (None, grpc.StatusCode.PERMISSION_DENIED)


def test_wrong_entries_are_named(tmp_path: Path) -> None:
    _, entry = tenant("a")
    for fields, message in (
        ({"objectives": {"chat": "urgent"}}, "objectives"),
        ({"objectives": {"Not A Name": "batch"}}, "objectives"),
    ):
        with pytest.raises(TenantsError, match=message):
            read_tenants(write_tenants(tmp_path / "tenants.yaml", entry, **fields))
