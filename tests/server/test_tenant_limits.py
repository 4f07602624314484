"""What one tenant may ask and hold: tokenizing, batches, long answers, shares of a fleet's quotas."""

import asyncio
import threading
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import pytest
from openinference_pb import grpc_predict_v2_pb2 as pb
from openinference_pb import grpc_predict_v2_pb2_grpc

from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.client import ServerError, make_request
from mtlora.prompt import PromptEncoder
from server.errors import RequestFailedError
from server.job import Lane, ServedTask
from server.registry.catalog import Catalog
from server.rpc.validation import PromptLimits, Received, validate
from server.tenants import OPEN_TENANT, Tenant, TenantsError, read_tenants
from tests.server.adapters import entry
from tests.server.fakes import FakeTokenizer, Service
from tests.server.front import Front
from tests.server.helpers import code_of
from tests.waiting import eventually

# Above this, inputs are tokenized beside the event loop.
LARGE = 9000


class Gate(FakeTokenizer):
    """Holds up large texts until it opens; records their first characters."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.seen: list[str] = []

    def __call__(self, text: str, **given: Any) -> dict[str, list[int]]:
        if len(text) > LARGE:
            self.open.wait(10)
            self.seen.append(text[0])
        return super().__call__(text[:20], **given)


class Limited:
    """A server with tenant a, with these limits, and tenant b, without any."""

    def __init__(self, folder: Path, turns: int = 8, **limits: Any) -> None:
        self.service = Service.with_tenants(folder, {"a": limits, "b": {}}, max_in_flight=500, turns=turns)
        self.gate = Gate()
        self.service.engine.prompts = PromptEncoder(self.gate)

    async def infer(self, *texts: str, **parameters: int) -> ServerError | pb.ModelInferResponse:
        """What a batch of tenant a's ends in."""
        request = pb.ModelInferRequest(model_name="one")
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
        tensor.contents.bytes_contents.extend(text.encode() for text in texts)
        for name, value in parameters.items():
            request.parameters[name].int64_param = value
        async with grpc.aio.insecure_channel(self.service.address) as channel:
            stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                return await stub.ModelInfer(request, metadata=self.service.access("a").metadata())
            except grpc.aio.AioRpcError as error:
                return ServerError(error)


async def test_tokenizing_is_bounded_and_fair_among_tenants(tmp_path: Path) -> None:
    limited = Limited(tmp_path, max_in_flight=2, max_queue=4)
    async with limited.service.running(), limited.service.client("a") as a, limited.service.client("b") as b:
        flood = [asyncio.create_task(code_of(a.generate("one", "a" * LARGE))) for _ in range(60)]
        await eventually(lambda: sum(each.done() for each in flood) == 54)
        assert {each.result() for each in flood if each.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        others = [asyncio.create_task(code_of(b.generate("one", "b" * LARGE))) for _ in range(3)]
        await eventually(lambda: limited.service.value("mtlora_requests_in_flight") == 9)
        # Small inputs do not wait for large ones.
        assert await code_of(b.generate("one", "b")) is grpc.StatusCode.OK
        limited.gate.open.set()
        assert set(await asyncio.gather(*others)) == {grpc.StatusCode.OK}
        assert (await asyncio.gather(*flood)).count(grpc.StatusCode.OK) == 6
    assert "".join(limited.gate.seen).startswith(("aababab", "ababab"))


async def test_a_document_is_tokenized_once_its_call_has_a_place(tmp_path: Path) -> None:
    limited = Limited(tmp_path, max_in_flight=2, max_queue=4)
    spec = entry("who", document_template="D:{document}", template="?", max_new_tokens=4)
    task = ServedTask(spec, "alpha", "1", slot=None, activation="task")
    limited.service.servicer.catalog = Catalog(MappingProxyType({"who": task}))
    async with limited.service.running(), limited.service.client("a") as a:
        flood = [asyncio.create_task(code_of(a.analyze_all(["who"], "a" * LARGE))) for _ in range(20)]
        await eventually(lambda: sum(each.done() for each in flood) == 14)
        assert {each.result() for each in flood if each.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert limited.service.value("mtlora_requests_in_flight") == 6
        limited.gate.open.set()
        assert (await asyncio.gather(*flood)).count(grpc.StatusCode.OK) == 6


async def test_refuses_what_cannot_fit_before_tokenizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Limited(tmp_path)
    monkeypatch.setattr(limited.service.engine.prompts, "_most_bytes_per_token", 10)
    async with limited.service.running(), limited.service.client("a") as a:
        with pytest.raises(ServerError) as raised:
            await a.generate("one", "a" * LARGE)
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "found at least 901 tokens" in raised.value.violations[0][1]
    assert not limited.gate.seen


@pytest.mark.parametrize(
    ("limits", "largest"),
    [
        ({"requests_per_second": 1, "burst_seconds": 3}, 3),
        ({"max_queue": 2}, 6),
        ({"max_in_flight": 1, "max_queue": 1}, 2),
    ],
)
async def test_a_batch_that_never_fits_starts_nothing(tmp_path: Path, limits: dict[str, float], largest: int) -> None:
    limited = Limited(tmp_path, turns=4, **limits)
    async with limited.service.running():
        error = await limited.infer(*"x" * (largest + 1))
        assert isinstance(error, ServerError)
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_s is None
        assert f"allow {largest} at once" in error.message
        assert not limited.service.engine.jobs
    limited = Limited(tmp_path, turns=4, **limits)
    async with limited.service.running():
        assert isinstance(await limited.infer(*"x" * largest), pb.ModelInferResponse)


async def test_a_batch_beyond_what_is_left_starts_nothing(tmp_path: Path) -> None:
    limited = Limited(tmp_path, requests_per_second=0.1, burst_seconds=50)
    async with limited.service.running():
        await limited.infer("x", "y")
        jobs = list(limited.service.engine.jobs)
        error = await limited.infer(*"vwxyz")
        assert isinstance(error, ServerError)
        assert error.quotas == [("tenant:a", "0.1 requests_per_second")]
        assert error.retry_after_s
        assert limited.service.engine.jobs == jobs
        assert limited.service.value("mtlora_requests_in_flight") == 0


async def test_a_batch_reserves_its_tokens_whole(tmp_path: Path) -> None:
    """Each element may take 20 tokens of 50: two fit, three need a full bucket, and each takes 11 in the end."""
    limited = Limited(tmp_path, tokens_per_second=0.02, burst_seconds=2500)
    async with limited.service.running():
        assert isinstance(await limited.infer(*"xy", max_tokens=11), pb.ModelInferResponse)
        jobs = list(limited.service.engine.jobs)
        error = await limited.infer(*"xyz", max_tokens=11)
        assert isinstance(error, ServerError)
        assert error.quotas == [("tenant:a", "0.02 tokens_per_second")]
        assert limited.service.engine.jobs == jobs
        assert isinstance(await limited.infer("x", max_tokens=11), pb.ModelInferResponse)


@pytest.mark.parametrize("stream", [False, True])
async def test_long_answers_are_paid_for_before_they_begin(tmp_path: Path, stream: bool) -> None:
    """A burst holds one long answer: of 20 at the same time one begins, and the tenant is not locked out after."""
    limited = Limited(tmp_path, turns=32, tokens_per_second=0.02, burst_seconds=2000)
    service = limited.service
    service.engine.hold = asyncio.Event()
    async with service.running(), limited.service.client("a") as a:

        async def ask() -> None:
            if stream:
                async for _ in a.stream("one", "x", max_new_tokens=30):
                    pass
            else:
                await a.generate("one", "x", max_new_tokens=30)

        asked = [asyncio.create_task(code_of(ask())) for _ in range(20)]
        await eventually(lambda: sum(each.done() for each in asked) == 19)
        assert service.engine.running == 1
        service.engine.hold.set()
        codes = await asyncio.gather(*asked)
        assert codes.count(grpc.StatusCode.OK) == 1
        service.engine.hold = None
        assert await code_of(a.generate("one", "x", max_new_tokens=19)) is grpc.StatusCode.OK


async def test_a_cancelled_call_returns_its_places_and_tokens(tmp_path: Path) -> None:
    limited = Limited(tmp_path, tokens_per_second=0.04, burst_seconds=2500, max_in_flight=1, max_queue=0)
    service = limited.service
    service.engine.hold = asyncio.Event()
    async with service.running(), limited.service.client("a") as a:
        for _ in range(3):
            asked = asyncio.create_task(a.generate("one", "x", max_new_tokens=50))
            await eventually(lambda: service.engine.running == 1)
            asked.cancel()
            await eventually(lambda: service.value("mtlora_requests_in_flight") == 0)
        service.engine.hold.set()
        assert (await a.generate("one", "x", max_new_tokens=50)).text == "ab"


def test_a_tenants_caps_are_violations() -> None:
    task = ServedTask(entry("one", max_new_tokens=200), "a", "1", slot=None)
    capped = Tenant(id="a", max_new_tokens=16, max_stop_characters=6)
    limits, prompts = PromptLimits(max_model_len=128, vocab_size=300), PromptEncoder(FakeTokenizer())

    def check(**parameters: Any) -> Any:
        return validate(Received(make_request("one", "x", **parameters), task, capped), prompts, limits)

    violations = check(max_new_tokens=17, stop=["abcd", "efg"])
    assert [(each.field, each.description) for each in violations] == [
        ("parameters.max_new_tokens", "found 17; allowed: 1 to 16, the tenant's max_new_tokens"),
        ("parameters.stop.values", "found 7 characters in all; allowed: up to 6, the tenant's max_stop_characters"),
    ]
    made = check(max_new_tokens=16, stop=["abc", "def"])
    assert (made.sampling.max_new_tokens, made.sampling.stop) == (16, ("abc", "def"))
    # The task's own default is cut.
    assert check().sampling.max_new_tokens == 16


def test_quotas_of_a_fleet_are_divided_by_its_replicas(tmp_path: Path) -> None:
    _, limited = tenant(
        "a", requests_per_second=9, tokens_per_second=3000, max_in_flight=7, max_queue=0, weight=2, daily_tokens=10
    )
    path = write_tenants(tmp_path / "tenants.yaml", limited, tenant("b")[1], quotas="fleet")
    shares = read_tenants(path, 3).by_id
    a, b = shares["a"], shares["b"]
    assert (a.requests_per_second, a.tokens_per_second, a.max_in_flight, a.max_queue) == (3, 1000, 3, 0)
    assert (a.weight, a.daily_tokens, a.monthly_tokens, b.requests_per_second) == (2, 4, None, None)
    with pytest.raises(TenantsError, match="quotas: found fleet without the setting replicas"):
        read_tenants(path)
    write_tenants(path, limited)
    assert read_tenants(path, 3).by_id["a"].max_in_flight == 7
    write_tenants(path, limited, quotas="all")
    with pytest.raises(TenantsError, match=r"(?s)quotas.*replica.*fleet"):
        read_tenants(path, 3)


async def test_one_tenant_leaves_places_to_others() -> None:
    """Also where its requests wait in no line of the scheduler."""
    admission = Front(16, max_in_flight=16, spare=2).admission
    a, b = (Tenant(id=name) for name in "ab")
    with ExitStack() as held:
        held.enter_context(admission.admit(a, 14, 14))
        with pytest.raises(RequestFailedError, match="14 requests of this tenant are in flight"):
            held.enter_context(admission.admit(a))
        held.enter_context(admission.admit(a, 14, 14, Lane.IMAGES))
        held.enter_context(admission.admit(b, 2, 2))
        with pytest.raises(RequestFailedError, match="16 requests are in flight"):
            held.enter_context(admission.admit(b))
    with admission.admit(a, 14, 14), admission.admit(b):
        pass
    with admission.admit(OPEN_TENANT, 16, 16):
        pass
