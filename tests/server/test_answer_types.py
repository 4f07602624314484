"""Types of answers over gRPC: what the engine is held to, own types, scores of labels, and what is refused."""

import asyncio
import json
import pickle
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest
from mtlora_pb.v1 import inference_pb2 as pb
from openinference_pb import grpc_predict_v2_pb2 as openinference
from openinference_pb import grpc_predict_v2_pb2_grpc

from mtlora.answer.constraint import read
from mtlora.client import Answer, AsyncClient, ServerError, value_of
from server.errors import EngineDeadError
from server.isolation import Limits, in_child
from server.job import Delta, GenerationJob, ServedTask
from server.rpc import own_types
from tests.server.adapters import entry
from tests.server.fakes import Service
from tests.server.typed import LABEL, TYPED, with_types
from tests.waiting import eventually


@pytest.fixture(scope="module", autouse=True)
def _forkserver() -> None:
    """Its start takes seconds, and a request's type is checked within some."""
    in_child(eval, "[1]", limits=Limits(60))


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made = Service()
    with_types(made)
    async with made.running():
        yield made


async def refused(call: Any) -> ServerError:
    with pytest.raises(ServerError) as raised:
        await call
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    return raised.value


async def test_the_engine_is_held_to_the_tasks_type(service: Service, client: AsyncClient) -> None:
    answer = await client.generate("number", "x")
    constraint = service.engine.jobs[0].sampling.constraint
    assert read(constraint) == entry("number", **TYPED["number"]).constraint()
    assert answer.answer_type == "number"
    free = await client.generate("number", "x", free=True)
    assert service.engine.jobs[1].sampling.constraint is None
    assert (free.answer_type, free.value) == ("", "working")
    await client.generate("worked", "x", without_adapter=True)
    # The bare backbone was not trained to write a marker.
    assert read(service.engine.jobs[2].sampling.constraint).marker is None
    task = await client.task("number")
    assert (task.answer.number.maximum, list((await client.task("label")).allowed_answers)) == (99, LABEL["labels"])


@pytest.mark.parametrize(
    ("asked", "same"),
    [({}, True), ({"step": 1}, True), ({"step": 2}, False), ({"minimum": 10}, False)],
)
async def test_a_tasks_own_type_may_leave_defaults_out(
    client: AsyncClient, asked: dict[str, float], same: bool
) -> None:
    answer = pb.AnswerType(number=pb.NumberType(**{"minimum": 0, "maximum": 99, **asked}))
    if same:
        assert (await client.generate("number", "x", answer=answer)).answer_type == "number"
    else:
        assert "has a type, number" in str(await refused(client.generate("number", "x", answer=answer)))


@pytest.mark.parametrize(
    ("answer_type", "text", "value"),
    [
        ("number", "3.50", Decimal("3.50")),
        ("date %m/%d/%Y", "02/29/2024", date(2024, 2, 29)),
        ("json", '{"a": [1]}', {"a": [1]}),
        ("label", "cat", "cat"),
        ("", "cat", "cat"),
    ],
)
def test_answers_have_values_of_their_types(answer_type: str, text: str, value: object) -> None:
    assert Answer(text, pb.Summary(), answer_type=answer_type).value == value


async def test_samples_and_streams_have_values(service: Service, client: AsyncClient) -> None:
    service.engine.text = " 42 "
    answer = await client.generate("number", "x", n=2, temperature=1.0)
    assert [sample.value for sample in answer.samples] == [Decimal(42)] * 2
    pieces = [piece async for piece in client.stream("number", "x")]
    assert value_of("".join(piece.text for piece in pieces), pieces[-1].answer_type) == Decimal(42)
    free = [piece async for piece in client.stream("number", "x", free=True)]
    assert value_of(free[-1].text, free[-1].answer_type) == " 42 "


async def test_a_request_brings_its_own_type(service: Service, client: AsyncClient) -> None:
    own = pb.AnswerType(json=json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}}))
    for _ in range(2):
        assert (await client.generate("one", "x", answer=own, max_new_tokens=9)).answer_type == "json"
    # Checked and compiled once.
    assert service.engine.compiled == [service.engine.jobs[0].sampling.constraint]
    subset = pb.AnswerType(label=pb.LabelType(labels=["cow", "dog"]))
    await client.generate("label", "x", answer=subset)
    assert read(service.engine.jobs[-1].sampling.constraint).type.labels == ("cow", "dog")  # type: ignore[union-attr]
    error = await refused(client.generate("one", "x", answer=own, max_new_tokens=2))
    assert "max_new_tokens: found 2" in str(error)


async def test_checks_of_one_tenants_types_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits for its type's check holds a place of the server, which has few."""
    release, begun = threading.Event(), list[bytes]()

    def check(_: Any, data: dict[str, Any], *arguments: Any, **named: Any) -> list[bytes]:
        begun.append(data["pattern"])
        release.wait(30)
        return [pickle.dumps((data["pattern"], "regex"))]

    monkeypatch.setattr(own_types, "in_child", check)
    service = Service.with_tenants(tmp_path, {"a": {}, "b": {}}, 64)
    with_types(service)

    def ask(client: AsyncClient, pattern: str) -> Any:
        return client.generate("one", "x", answer=pb.AnswerType(regex=pattern))

    async with service.running(), service.client("a") as a:
        # The same type twice is one check.
        asked = [asyncio.create_task(ask(a, f"a{i % 31}")) for i in range(32)]
        await eventually(lambda: service.value("mtlora_requests_in_flight") == 32 and len(begun) == 1)
        for pattern in ("one more", "a0"):
            with pytest.raises(ServerError, match="RESOURCE_EXHAUSTED: 32 requests of this tenant wait for checks"):
                await ask(a, pattern)
        assert (await a.generate("one", "x")).text == "working"
        async with service.client("b") as b:
            other = asyncio.create_task(ask(b, "b"))
            await eventually(lambda: service.value("mtlora_requests_in_flight") == 33)
            release.set()
            await asyncio.gather(other, *asked)
    # Each is charged for the time that it takes.
    assert begun.index("b") <= 2
    assert service.engine.most_compiling == 1
    assert sorted(begun) == sorted([*(f"a{i}" for i in range(31)), "b"])


_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("label", {"answer": pb.AnswerType(label=pb.LabelType(labels=["cat", "bird"]))}, "answer: task label has labels"),
    ("label", {"answer": pb.AnswerType(regex="cat|cow")}, "answer: task label has labels"),
    ("number", {"answer": pb.AnswerType(regex="[0-9]")}, "answer: task number has a type, number"),
    ("one", {"answer": pb.AnswerType(), "free": False}, "answer: found no type"),
    ("one", {"answer": pb.AnswerType(regex="a"), "free": True}, "free: found together with answer"),
    ("one", {"answer": pb.AnswerType(regex="(a{1000}){1000}")}, "answer: takes more than 10000 states"),
    ("one", {"answer": pb.AnswerType(json="{")}, "answer: json: json: not JSON"),
    ("one", {"answer": pb.AnswerType(grammar='root ::= "a" root?')}, "answer: grammar: grammar: recurses"),
    ("one", {"answer": pb.AnswerType(regex="[^a]")}, "answer: regex: an answer may contain the stop string"),
    (
        "one",
        {"answer": pb.AnswerType(label=pb.LabelType(labels=[str(i) for i in range(100_000)]))},
        "answer.label.labels: found 100000",
    ),
    ("label", {"stop": ["a"]}, "parameters.stop.values: found 'a'"),
    ("label", {"stop_token_ids": [5]}, "parameters.stop_token_ids"),
    ("label", {"banned_tokens": [5]}, "parameters.banned_tokens"),
    ("label", {"min_new_tokens": 5}, "parameters.min_new_tokens"),
]


@pytest.mark.parametrize(("task", "named", "reason"), _REFUSED)
async def test_refuses_contradictions_and_hostile_types(
    client: AsyncClient, task: str, named: dict[str, Any], reason: str
) -> None:
    began = time.process_time()
    assert reason in str(await refused(client.generate(task, "x", **named)))
    # The server's own process compiles nothing.
    assert time.process_time() - began < 5


async def test_scores_every_label_in_one_step(service: Service, client: AsyncClient) -> None:
    scores = await client.score("label", ["a", "b", "c"])
    for score in scores:
        # " c" or " d", and for the former "a" or "o".
        assert score.probabilities == pytest.approx({"cat": 0.731**2, "cow": 0.731 * 0.269, "dog": 0.269}, abs=1e-3)
        assert score.label == "cat"
        assert score.summary is not None
        assert score.summary.completion_tokens == 2
    assert len(service.engine.jobs) == 6
    assert {job.sampling.max_new_tokens for job in service.engine.jobs} == {1}
    # Counted once per input, however many sequences it took.
    assert service.value("mtlora_requests_total", method="ScoreItem", task="label", status="OK") == 3


async def test_scores_after_the_working(service: Service, client: AsyncClient) -> None:
    (score,) = await client.score("worked", ["a"])
    first, *branches = service.engine.jobs
    assert (first.sampling.stop, score.reasoning) == (("\n", "=>"), "working")
    prompts = {"".join(map(chr, job.prompt_ids)) for job in branches}
    assert prompts == {"a\nAnswer: working => ", "a\nAnswer: working => c"}
    assert [job.further for job in service.engine.jobs] == [False, True, True]
    # An answer without working ends by itself.
    service.engine.jobs.clear()
    service.engine.ends_by = 0
    (score,) = await client.score("worked", ["a"])
    assert score.reasoning == ""
    assert {"".join(map(chr, job.prompt_ids)) for job in service.engine.jobs[1:]} == {"a\nAnswer: ", "a\nAnswer: c"}


async def test_a_score_fails_as_its_sequences_do(
    service: Service, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dead(_: GenerationJob) -> AsyncGenerator[Delta, None]:
        raise EngineDeadError
        yield Delta("", 0)

    monkeypatch.setattr(service.engine, "generate", dead)
    (item,) = await client.score("label", ["a"])
    assert item.error is not None
    assert item.error.code is grpc.StatusCode.UNAVAILABLE


async def test_a_working_that_leaves_no_room_for_a_label_is_refused(service: Service, client: AsyncClient) -> None:
    service.engine.text = "w" * 40
    (item,) = await client.score("worked", ["a" * 10])
    assert item.error is not None
    assert item.error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "tokens with the working" in item.error.violations[0][1]


async def test_a_calibrated_score_is_tempered(service: Service, client: AsyncClient) -> None:
    spec = service.servicer.catalog.tasks["label"].spec
    service.serve(ServedTask(spec, "alpha", "1", slot=None, calibration=2.0))
    (plain,) = await client.score("label", ["a"], uncalibrated=True)
    (tempered,) = await client.score("label", ["a"])
    assert 1 / 3 < tempered.probabilities["cat"] < plain.probabilities["cat"]
    assert (await client.task("label")).calibration == 2.0


async def test_each_input_of_a_score_has_its_own_status(client: AsyncClient) -> None:
    good, long, blank = await client.score("label", ["a", "b" * 100, " "])
    assert good.label == "cat"
    for score, reason in ((long, "too long"), (blank, "only blanks")):
        assert score.error is not None
        assert score.error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert reason in str(score.error)
    assert "answers with a number" in str(await refused(client.score("number", ["a"])))
    assert "inputs: found 0" in str(await refused(client.score("label", [])))


@pytest.mark.parametrize("raw", [False, True])
async def test_open_inference_gives_labels_and_probabilities(service: Service, raw: bool) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        model = await stub.ModelMetadata(openinference.ModelMetadataRequest(name="label"))
        assert [(each.name, each.datatype, list(each.shape)) for each in model.outputs] == [
            ("text_output", "BYTES", [-1]),
            ("label", "BYTES", [-1]),
            ("probabilities", "FP32", [-1, 3]),
            ("labels", "BYTES", [-1]),
        ]
        request = openinference.ModelInferRequest(model_name="label")
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[2])
        if raw:
            request.raw_input_contents.append(b"\1\0\0\0a\1\0\0\0b")
        else:
            tensor.contents.bytes_contents.extend([b"a", b"b"])
        for name in ("label", "probabilities", "labels"):
            request.outputs.add(name=name)
        reply = await stub.ModelInfer(request)
        assert [(each.name, list(each.shape)) for each in reply.outputs] == [
            ("label", [2]), ("probabilities", [2, 3]), ("labels", [3]),
        ]  # fmt: skip
        if raw:
            assert reply.raw_output_contents[0] == b"\3\0\0\0cat" * 2
            assert len(reply.raw_output_contents[1]) == 2 * 3 * 4
        else:
            assert list(reply.outputs[2].contents.bytes_contents) == [b"cat", b"cow", b"dog"]
            assert sum(reply.outputs[1].contents.fp32_contents[:3]) == pytest.approx(1)
        request.model_name = "number"
        with pytest.raises(grpc.aio.AioRpcError, match="allowed: text_output"):
            await stub.ModelInfer(request)
