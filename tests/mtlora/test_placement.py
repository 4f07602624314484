"""Where calls go by adapter and by document: the order of servers, and a client of several servers."""

import asyncio
import math
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from mtlora.client import AsyncClient, Placement, Retry, ServerError
from mtlora.client.placement import Keys, Rendezvous, resolve
from tests.servicers import serving_here

SERVERS = [f"10.0.0.{index}:50051" for index in range(20)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.text(max_size=8), st.integers(1, 10), st.data())
def test_a_call_goes_to_a_usable_server_within_the_bound(
    in_flight: list[int], key: str, floor: int, data: st.DataObject
) -> None:
    servers = range(len(in_flight))
    usable = data.draw(st.sets(st.sampled_from(list(servers))))
    chosen = Rendezvous(SERVERS[: len(in_flight)], slack=2, floor=floor).choose(key, in_flight, usable)
    allowed = usable or set(servers)
    assert chosen in allowed
    bound = max(floor, 2 * (sum(in_flight[each] for each in allowed) + 1) / len(allowed))
    assert in_flight[chosen] + 1 <= bound or in_flight[chosen] == min(in_flight[each] for each in allowed)


@given(st.sampled_from(SERVERS))
def test_a_server_that_leaves_moves_its_own_keys_alone(gone: str) -> None:
    left = [server for server in SERVERS if server != gone]
    before, after = Rendezvous(SERVERS), Rendezvous(left)
    for number in range(300):
        first = SERVERS[before.choose(f"adapter-{number}", [0] * 20)]
        assert first == gone or left[after.choose(f"adapter-{number}", [0] * 19)] == first


@given(st.integers(1, 20), st.sets(st.text(max_size=6), max_size=60))
def test_known_keys_are_dealt_out_evenly_and_the_same_in_any_order(number: int, keys: set[str]) -> None:
    first, second = Rendezvous(SERVERS[:number]), Rendezvous(SERVERS[:number])
    first.deal_out(sorted(keys))
    second.deal_out(sorted(keys, reverse=True))
    homes = {key: first.choose(key, [0] * number) for key in keys}
    assert homes == {key: second.choose(key, [0] * number) for key in keys}
    assert max(Counter(homes.values()).values(), default=0) <= math.ceil(1.05 * len(keys) / number)
    for key in keys:
        assert sorted(first.order(key)) == list(range(number))


def test_a_new_key_moves_few_others() -> None:
    keys = [f"adapter-{number}" for number in range(1000)]
    before, after = Rendezvous(SERVERS), Rendezvous(SERVERS)
    before.deal_out(keys)
    after.deal_out([*keys, "another"])
    assert sum(before.order(key)[0] != after.order(key)[0] for key in keys) < 30


def test_images_go_where_their_first_tasks_adapter_is() -> None:
    keys = Keys(learn_s=60.0, clock=lambda: 100.0)
    request = pb.ClassifyRequest(task_ids=["sight", "view"])
    assert keys.unknown(request)
    assert keys.key(request) == "sight"
    reply = pb.ClassifyResponse()
    for task_id, adapter in (("sight", "eyes"), ("view", "")):
        reply.results.add(task_id=task_id).summary.adapter_name = adapter
    keys.note(request, "sight", reply)
    assert not keys.unknown(request)
    assert (keys.key(request), keys.key(pb.ClassifyRequest(task_ids=["view"]))) == ("eyes", "view")
    assert keys.key(pb.ClassifyRequest()) == ""


def test_keys_spread_evenly_and_a_busy_servers_go_to_one_other() -> None:
    rendezvous = Rendezvous(SERVERS[:4], floor=4)
    homes = Counter(rendezvous.choose(f"adapter-{number}", [0] * 4) for number in range(1000))
    assert min(homes.values()) > 200
    home = rendezvous.choose("a", [0] * 4)
    busy = [0] * 4
    busy[home] = 4
    assert {rendezvous.choose("a", busy) for _ in range(10)} == {rendezvous.order("a")[1]}


def test_resolve_gives_the_servers_of_a_target() -> None:
    assert resolve("ipv4:10.0.0.2:1,10.0.0.1:1") == ("10.0.0.1:1", "10.0.0.2:1")
    assert resolve("ipv6:[::1]:1,[::2]:1") == ("[::1]:1", "[::2]:1")
    for name in ("127.0.0.1:7", "dns:///127.0.0.1:7", "dns:127.0.0.1:7", "dns://8.8.8.8/127.0.0.1:7"):
        assert resolve(name) == ("127.0.0.1:7",)
    assert resolve("[::1]:7") == ("[::1]:7",)
    with pytest.raises(socket.gaierror):
        resolve("no.such.host.invalid:1")


@given(st.text(max_size=20), st.text(max_size=20))
def test_a_documents_key_is_the_one_that_its_text_had(document: str, document_id: str) -> None:
    keys = Keys(10.0)
    with_text = pb.AnalyzeRequest(document=document)
    keys.note(with_text, keys.key(with_text), pb.AnalyzeResponse(document_id=document_id))
    if document_id:
        assert keys.key(pb.AnalyzeRequest(document_id=document_id)) == keys.key(with_text)


class Server(inference_pb2_grpc.InferenceServicer):
    """Ten adapters with two tasks each. Counts the calls of each task and the documents of each call."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.listed = 0
        self.hold: asyncio.Event | None = None

    async def ListTasks(self, request: Any, context: Any) -> Any:
        self.listed += 1
        return pb.ListTasksResponse(tasks=[pb.Task(id=f"t{i}", adapter_name=f"a{i // 2}") for i in range(20)])

    async def Generate(self, request: Any, context: Any) -> Any:
        self.asked[request.task_id] += 1
        if self.hold:
            await self.hold.wait()
        adapter = "a0" if request.task_id == "late" else f"a{int(request.task_id[1:]) // 2}"
        return pb.GenerateResponse(text="x", summary=pb.Summary(adapter_name=adapter))

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked[request.task_id] += 1
        yield pb.GenerateStreamResponse(text="x")
        if self.hold:
            await self.hold.wait()

    async def Analyze(self, request: Any, context: Any) -> Any:
        self.asked[request.document or request.document_id] += 1
        return pb.AnalyzeResponse(document_id=f"id of {request.document}")


@asynccontextmanager
async def three(**by: Any) -> AsyncIterator[tuple[list[Server], list[Any], AsyncClient]]:
    async with AsyncExitStack() as stack:
        servers, running, addresses = [Server() for _ in range(3)], [], []
        for server in servers:
            served = serving_here(server, inference_pb2_grpc.add_InferenceServicer_to_server)
            address, at = await stack.enter_async_context(served)
            addresses.append(address)
            running.append(at)
        address = "ipv4:" + ",".join(addresses)
        client = AsyncClient(address, placement=Placement(**by), retry=Retry(first_s=0.01))
        yield servers, running, await stack.enter_async_context(client)


async def test_an_adapters_calls_meet_on_one_server() -> None:
    async with three() as (servers, _, client):
        for _ in range(3):
            await asyncio.gather(*(client.generate(f"t{number}", "x") for number in range(0, 20, 4)))
            await asyncio.gather(*(client.generate(f"t{number + 1}", "x") for number in range(0, 20, 4)))
        assert sum(server.listed for server in servers) == 1
    for adapter in range(0, 10, 2):
        tasks = {f"t{2 * adapter}", f"t{2 * adapter + 1}"}
        counts = [sum(server.asked[task] for task in tasks) for server in servers]
        assert sorted(counts) == [0, 0, 6]


async def test_a_popular_adapter_spreads_and_its_streams_count_until_they_end() -> None:
    async with three(floor=2, slack=1.25) as (servers, _, client):
        for server in servers:
            server.hold = asyncio.Event()
        streams = [client.stream("t0", "x") for _ in range(6)]
        assert [(await anext(each)).text for each in streams] == ["x"] * 6
        assert [server.asked["t0"] for server in servers] == [2, 2, 2]
        for each in streams:
            await each.aclose()
        assert client._placed is not None
        assert [server.in_flight for server in client._placed._servers.values()] == [0, 0, 0]


async def test_a_new_task_is_looked_up_once_and_learnt_from_its_answers() -> None:
    async with three(learn_s=0.0) as (servers, _, client):
        for _ in range(3):
            await client.generate("late", "x")
        await client.generate("t0", "x")
        # The first call is placed by task id; its answer teaches the client adapter a0.
        home = next(server for server in servers if server.asked["t0"])
        assert home.asked["late"] >= 2
        assert sum(server.listed for server in servers) == 1


async def test_a_document_goes_where_it_was_read() -> None:
    async with three() as (servers, _, client):
        for number in range(9):
            await client.analyze_all(["t0"], f"document {number}")
            await client.analyze_all(["t0"], document_id=f"id of document {number}")
        assert sum(bool(server.asked) for server in servers) > 1
        for server in servers:
            for number in range(9):
                assert server.asked[f"document {number}"] == server.asked[f"id of document {number}"]


async def test_calls_leave_a_server_that_is_gone() -> None:
    async with three() as (servers, running, client):
        await client.generate("t0", "x")
        home = next(index for index, server in enumerate(servers) if server.asked["t0"])
        await running[home].stop(0)
        for _ in range(5):
            await client.generate("t0", "x", timeout=10)
        assert servers[home].asked["t0"] == 1
        (other,) = (server for server in servers if server.asked["t0"] == 5)
        assert other is not servers[home]


@pytest.mark.slow
async def test_without_any_server_a_call_is_unavailable() -> None:
    async with three() as (_, running, client):
        for each in running:
            await each.stop(0)
        with pytest.raises(ServerError) as raised:
            await client.generate("t0", "x")
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE
