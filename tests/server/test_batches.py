"""Many inputs in one call, and several samples of one input: order, statuses, charges, fairness, ends."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from mtlora_pb.v1 import inference_pb2_grpc

from mtlora.client import AsyncClient, BatchAnswer, ServerError, make_batch, make_request
from server.errors import EngineAbortedError, EngineDeadError
from server.job import Delta, GenerationJob
from server.rpc.batch import MAX_BATCH
from server.scheduling.admission import State
from server.scheduling.fair_queue import FairQueue
from tests.server.fakes import FakeEngine, Service
from tests.waiting import eventually

LOW = -50.0


class Echo(FakeEngine):
    """Answers with the prompt's first character. A prompt with ! fails, one with ? waits for `hold`.

    The log-probability of a sample is its seed, so that the highest seed is the best.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hold = asyncio.Event()
        self.error_on_hold: Exception | None = None
        self.begun: list[str] = []

    async def generate(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        text = "".join(map(chr, job.prompt_ids))
        self.jobs.append(job)
        self.begun.append(text[0])
        self.running += 1
        try:
            await asyncio.sleep(0)
            if "!" in text:
                raise EngineAbortedError("abort")
            if "?" in text:
                assert self.hold is not None
                await self.hold.wait()
                if self.error_on_hold:
                    raise self.error_on_hold
            seed = job.sampling.seed or 0
            yield Delta(
                f"{text[0]}{seed or ''}", 2, finish_reason="stop", token_ids=(7, 8), cumulative_logprob=LOW + seed
            )
        finally:
            self.running -= 1


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service(max_in_flight=64, turns=8)
    service.use(Echo())
    async with service.running():
        yield service


def with_tenants(folder: Path, **limits: Any) -> Service:
    """A server with tenant a, with these limits, and tenant b, without any."""
    service = Service.with_tenants(folder, {"a": limits, "b": {}}, max_in_flight=64, turns=8)
    service.use(Echo())
    return service


def outcome(each: BatchAnswer) -> str:
    return each.error.code.name if each.error else each.result().text


async def failure(call: Any) -> ServerError:
    with pytest.raises(ServerError) as raised:
        await call
    return raised.value


MIXED: list[Any] = [
    ("one", "a"),
    ("none", "b"),
    ("two", "c"),
    ("one", " "),
    ("one", "d!"),
    make_request("two", "e", max_new_tokens=0),
    ("one", [{"role": "user", "content": "f"}]),
]
ENDS = ["a", "NOT_FOUND", "c", "INVALID_ARGUMENT", "UNAVAILABLE", "INVALID_ARGUMENT", "f"]


async def test_a_bad_item_harms_no_other(service: Service, client: AsyncClient) -> None:
    answers = await client.generate_all(MIXED)
    assert [outcome(each) for each in answers] == ENDS
    assert [each.index for each in answers] == list(range(7))
    streamed = {each.index: outcome(each) async for each in client.generate_batch(MIXED)}
    assert streamed == dict(enumerate(ENDS))
    errors: list[Any] = [each.error for each in answers]
    assert errors[1].resource == "none"
    assert errors[3].violations == [("text", "found only blanks; allowed: a text")]
    assert errors[5].violations[0][0] == "parameters.max_new_tokens"
    assert errors[4].retry_after_s == 1.0
    with pytest.raises(ServerError, match="NOT_FOUND"):
        answers[1].result()
    summary = answers[0].result().summary
    assert (summary.task_id, summary.adapter_name, summary.completion_tokens) == ("one", "alpha", 2)
    assert answers[2].result().summary.request_id == summary.request_id.removesuffix(".0") + ".2"


async def test_items_come_as_they_end(service: Service, client: AsyncClient) -> None:
    seen: list[str] = []
    async for each in client.generate_batch([("one", "a?"), ("one", "b"), ("two", "c")]):
        seen.append(outcome(each))
        if len(seen) == 2:
            service.engine.hold.set()
    assert sorted(seen[:2]) == ["b", "c"]
    assert seen[2] == "a"


async def test_each_item_is_counted_by_its_task(service: Service, client: AsyncClient) -> None:
    await client.generate_all(MIXED)

    def items(task: str, status: str) -> float:
        return service.value("mtlora_requests_total", method="GenerateBatchItem", task=task, status=status)

    assert [items("one", "OK"), items("two", "OK"), items("unknown", "NOT_FOUND")] == [2, 1, 1]
    assert [items("one", "UNAVAILABLE"), items("one", "INVALID_ARGUMENT")] == [1, 1]
    assert service.value("mtlora_requests_total", method="GenerateBatch", task="", status="OK") == 1
    assert service.value("mtlora_completion_tokens_total", task="one") == 4
    rows = await service.used()
    used = {row[2]: (row[3].requests, row[3].completion_tokens) for row in rows}
    assert used == {"one": (2, 4), "two": (1, 2)}
    assert service.value("mtlora_requests_in_flight") == 0


@pytest.mark.parametrize("timeout", [None, 0.3])
async def test_the_end_of_a_call_ends_its_sequences(
    service: Service, client: AsyncClient, timeout: float | None
) -> None:
    stub = inference_pb2_grpc.InferenceStub(client._channel)
    batch = make_batch([("one", "a"), *[("one", f"{letter}?") for letter in "bcdefghijkl"]])
    call = stub.GenerateBatchStream(batch, timeout=timeout)
    assert (await call.read()).item.response.text == "a"
    await eventually(lambda: service.engine.running == 8)
    if timeout is None:
        call.cancel()
    await eventually(lambda: service.engine.running == 0)
    status = "CANCELLED" if timeout is None else "DEADLINE_EXCEEDED"
    labels = {"method": "GenerateBatchItem", "task": "one", "status": status}
    await eventually(lambda: service.value("mtlora_requests_total", **labels) == 8)
    await eventually(lambda: service.value("mtlora_requests_in_flight") == 0)
    # Three items never started.
    assert len(service.engine.jobs) == 9
    rows = await service.used()
    assert rows[0][3].requests == 9


async def test_usage_counts_items_that_the_client_did_not_read(service: Service, client: AsyncClient) -> None:
    stub = inference_pb2_grpc.InferenceStub(client._channel)
    call = stub.GenerateBatchStream(make_batch([("one", "a"), ("one", "b?"), *[("two", "c")] * 6]))
    await eventually(lambda: service.engine.begun.count("c") == 6 and service.engine.running == 1)
    call.cancel()
    await eventually(lambda: service.value("mtlora_requests_in_flight") == 0)
    rows = await service.used()
    assert {row[2]: (row[3].requests, row[3].completion_tokens) for row in rows} == {"one": (2, 2), "two": (6, 12)}


async def test_a_batch_goes_on_with_the_next_engine(service: Service, client: AsyncClient) -> None:
    """Items that ran on the lost engine fail; items that had not started run on the next one."""
    lost, successor = service.engine, Echo()
    lost.error_on_hold = EngineDeadError()
    successor.prompts, successor.hold = lost.prompts, lost.hold
    asked = asyncio.create_task(client.generate_all([("one", "a?")] * 20))
    await eventually(lambda: lost.running == 8)
    service.use(successor)
    lost.hold.set()
    ends = [outcome(each) for each in await asked]
    assert (ends.count("UNAVAILABLE"), ends.count("a")) == (8, 12)
    assert len(successor.begun) == 12


async def test_a_stop_of_the_server_is_nobodys_usage(service: Service, client: AsyncClient) -> None:
    asked = asyncio.create_task(client.generate_all([("one", "a?"), ("one", "b?")]))
    await eventually(lambda: service.engine.running == 2)
    service.admission.state = State.DRAINING
    service.admission.abort_running()
    assert (await failure(asked)).code is grpc.StatusCode.UNAVAILABLE
    assert service.engine.running == 0
    assert not await service.used()


@pytest.mark.parametrize(
    ("items", "found"),
    [
        ([], "found 0; allowed: 1 to 1024"),
        ([("one", "a")] * (MAX_BATCH + 1), "found 1025; allowed: 1 to 1024"),
        ([make_request("one", "a", n=16, temperature=1.0)] * 65, "found 1040 samples; allowed: 1 to 1024"),
    ],
)
async def test_bounds_the_items_of_a_call(service: Service, client: AsyncClient, items: Any, found: str) -> None:
    error = await failure(client.generate_all(items))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations == [("items", found)]
    assert not service.engine.jobs


async def test_a_batch_is_charged_whole_or_refused_whole(tmp_path: Path) -> None:
    service = with_tenants(tmp_path, requests_per_second=0.01, burst_seconds=1000)
    async with service.running(), service.client("a") as client:
        assert len(await client.generate_all([("one", "a")] * 6)) == 6
        error = await failure(client.generate_all([("one", "b")] * 5))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.quotas == [("tenant:a", "0.01 requests_per_second")]
        assert error.retry_after_s
        # A batch larger than the burst can never be admitted.
        never = await failure(client.generate_all([("one", "c")] * 11))
        assert (never.code, never.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, None)
        assert set(service.engine.begun) == {"a"}


async def test_a_batch_takes_its_places_from_a_tenants_limits(tmp_path: Path) -> None:
    """More items than the tenant may have inside wait outside, and none is refused."""
    service = with_tenants(tmp_path, max_in_flight=2, max_queue=1)
    async with service.running(), service.client("a") as client:
        asked = asyncio.create_task(client.generate_all([("one", "a?")] * 20))
        await eventually(lambda: service.engine.running == 2)
        assert service.value("mtlora_requests_in_flight") == 3
        service.engine.hold.set()
        assert [outcome(each) for each in await asked] == ["a"] * 20


@pytest.mark.parametrize("items", [2, 3])
async def test_a_budget_has_room_for_the_whole_batch_or_refuses_it(tmp_path: Path, items: int) -> None:
    service = with_tenants(tmp_path, daily_requests=3)
    async with service.running(), service.client("a") as client:
        await client.generate("one", "a")
        asked = client.generate_all([("one", "b")] * items)
        if items == 2:
            assert len(await asked) == 2
        else:
            assert (await failure(asked)).quotas == [("tenant:a", "3 daily_requests")]


async def test_tokens_are_reserved_for_every_sample(tmp_path: Path) -> None:
    """Ten prompt tokens and ten new ones: a burst of 80 holds four samples, not five."""
    service = with_tenants(tmp_path, tokens_per_second=0.08, burst_seconds=1000)
    sampled: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 11}
    async with service.running(), service.client("a") as client:
        await client.generate("one", "a", n=4, **sampled)
        assert service.engine.running == 0
        error = await failure(client.generate("one", "b", n=4, **sampled))
        assert error.quotas == [("tenant:a", "0.08 tokens_per_second")]
        assert set(service.engine.begun) == {"a"}


async def test_a_batch_does_not_delay_another_tenants_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = with_tenants(tmp_path)
    engine, queued_at, push = service.engine, list[int](), FairQueue.push

    def noted(queue: Any, line: Any, *arguments: Any, **named: Any) -> None:
        if line[0] == "b":
            queued_at.append(len(engine.begun))
        push(queue, line, *arguments, **named)

    monkeypatch.setattr(FairQueue, "push", noted)
    async with service.running(), service.client("a") as many, service.client("b") as single:
        asked = asyncio.create_task(many.generate_all([("one", "a")] * 1000))
        await eventually(lambda: len(engine.begun) > 40)
        for _ in range(3):
            await single.generate("one", "b")
        assert not asked.done()
        assert len(await asked) == 1000
    # A few others began in between: those of turns that had just come free.
    assert [engine.begun[at:].index("b") <= 8 for at in queued_at] == [True] * 3


async def test_a_queued_batch_leaves_room_for_other_tenants(tmp_path: Path) -> None:
    """The queue holds a few of the batch's items, so others' requests find room and the next turn."""
    service = with_tenants(tmp_path)
    async with service.running(), service.client("a") as many, service.client("b") as single:
        asked = asyncio.create_task(many.generate_all([("one", "a?")] * 1000))
        await eventually(lambda: service.engine.running == 8)
        assert service.scheduler.queued_by_tenant() == {}
        assert service.value("mtlora_requests_in_flight") == 8
        reply = asyncio.create_task(single.generate("one", "b"))
        await eventually(lambda: service.scheduler.queued_by_tenant() == {"b": 1})
        service.engine.hold.set()
        await reply
        # The first turn that came free.
        assert service.engine.begun.index("b") == 8
        assert len(await asked) == 1000


async def test_a_tenants_priorities_order_its_own_requests(service: Service, client: AsyncClient) -> None:
    asked = [asyncio.create_task(client.generate("one", "x?")) for _ in range(8)]
    await eventually(lambda: service.engine.running == 8)
    for count, (text, priority) in enumerate([("l", -1), ("n", 0), ("h", 5), ("m", 0)], 1):
        asked.append(asyncio.create_task(client.generate("one", text, priority=priority)))
        await eventually(lambda count=count: service.front.queued == count)  # type: ignore[misc]
    service.engine.hold.set()
    await asyncio.gather(*asked)
    assert service.engine.begun[8:] == ["h", "n", "m", "l"]


async def test_n_samples_answer_one_request(service: Service, client: AsyncClient) -> None:
    answer = await client.generate("one", "a", n=3, temperature=1.0, seed=5, return_token_ids=True)
    assert [sample.text for sample in answer.samples] == ["a5", "a6", "a7"]
    assert [list(sample.token_ids) for sample in answer.samples] == [[7, 8]] * 3
    assert (answer.text, answer.token_ids) == ("a5", [7, 8])
    assert len({job.sampling.seed for job in service.engine.jobs}) == 3
    summary = answer.summary
    assert (summary.prompt_tokens, summary.completion_tokens) == (3 * len("a\nAnswer:"), 6)
    assert service.value("mtlora_requests_total", method="Generate", task="one", status="OK") == 1
    rows = await service.used()
    assert (rows[0][3].requests, rows[0][3].completion_tokens) == (3, 6)
    # A single answer has no list of samples.
    assert not (await client.generate("one", "a")).samples


async def test_the_likeliest_samples_answer(service: Service, client: AsyncClient) -> None:
    answer = await client.generate("one", "a", n=2, best_of=4, temperature=1.0, seed=1)
    assert [sample.text for sample in answer.samples] == ["a4", "a3"]
    assert [sample.cumulative_logprob for sample in answer.samples] == [LOW + 4, LOW + 3]
    assert answer.summary.completion_tokens == 8
    assert all(job.sampling.more and job.sampling.more.cumulative_logprob for job in service.engine.jobs)
    alone = await client.generate("one", "a", best_of=3, temperature=1.0, seed=1)
    assert (alone.text, list(alone.samples)) == ("a3", [])


async def test_samples_hold_places_and_count_as_requests(tmp_path: Path) -> None:
    service = with_tenants(tmp_path, max_in_flight=2, max_queue=1, requests_per_second=0.01, burst_seconds=800)
    async with service.running(), service.client("a") as client:
        await client.generate("one", "a", n=3, temperature=1.0)
        never = await failure(client.generate("one", "a", n=4, temperature=1.0))
        assert (never.code, never.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, None)
        assert "allow 3 at once" in never.message
        # 8 of a burst, less 3, less the call that was refused: 4 are left.
        await client.generate("one", "a", n=3, temperature=1.0)
        assert (await failure(client.generate("one", "a", n=2, temperature=1.0))).retry_after_s


async def test_a_sample_that_fails_fails_the_request(service: Service, client: AsyncClient) -> None:
    error = await failure(client.generate("one", "a!", n=3, temperature=1.0))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert service.engine.running == 0
    await eventually(lambda: service.value("mtlora_requests_in_flight") == 0)


async def test_streams_give_one_answer_with_its_token_ids(service: Service, client: AsyncClient) -> None:
    for name in ("n", "best_of"):
        with pytest.raises(ServerError) as raised:
            async with aclosing(client.stream("one", "a", temperature=1.0, **{name: 2})) as pieces:
                await anext(pieces)
        assert raised.value.violations == [
            (f"parameters.{name}", "found 2; allowed: 1 in a stream, which gives one answer")
        ]
    pieces = client.stream("one", "a", return_token_ids=True)
    assert [token async for piece in pieces for token in piece.token_ids] == [7, 8]


async def test_each_item_of_a_batch_gets_its_samples(service: Service, client: AsyncClient) -> None:
    items = [make_request("one", letter, n=2, temperature=1.0, seed=1) for letter in "abc"]
    answers = await client.generate_all(items)
    assert [[sample.text for sample in each.result().samples] for each in answers] == [
        [f"{letter}1", f"{letter}2"] for letter in "abc"
    ]


async def test_a_batch_of_a_tenant_without_rights_says_so_for_each_item(tmp_path: Path) -> None:
    service = with_tenants(tmp_path, tasks=["t*"])
    async with service.running(), service.client("a") as client:
        answers = await client.generate_all([("one", "a"), ("two", "b")])
        assert [outcome(each) for each in answers] == ["NOT_FOUND", "b"]
    async with service.running(), AsyncClient(service.address) as stranger:
        assert (await failure(stranger.generate_all([("two", "a")]))).code is grpc.StatusCode.UNAUTHENTICATED
    labels = {"method": "GenerateBatch", "task": "", "status": "UNAUTHENTICATED"}
    assert service.value("mtlora_requests_total", **labels) == 1
