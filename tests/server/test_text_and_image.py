"""Texts with an image through the real servicer, around fake engines: prompts, refusals, quotas, samples, ends."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from openinference_pb import grpc_predict_v2_pb2 as oip
from openinference_pb import grpc_predict_v2_pb2_grpc
from PIL import Image

from mtlora.client import AsyncClient, Client, ServerError
from mtlora.client.messages import make_request
from server.cli import main
from server.errors import EngineDeadError
from server.rpc.inference_service import _routing_key
from tests.mtlora.vision.pictures import bomb, encoded
from tests.server.fakes import FakeEngine, Service
from tests.server.pictures import FakeVisionEngine, described_task, with_pictures
from tests.waiting import eventually

RED, GREEN = (encoded(Image.new("RGB", (9, 7), colour)) for colour in ("red", "lime"))
PLACEHOLDER = 299


def prompt(text: str, at: int = 0) -> tuple[int, ...]:
    """One token a character, with a soft token's place."""
    return (*map(ord, text[:at]), PLACEHOLDER, *map(ord, text[at:]))


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service(max_in_flight=16, turns=8)
    with_pictures(service, described_task("ask"), described_task("look", "See {{image}}{image}.", adapter="looks"))
    async with service.running():
        yield service


def engines(service: Service) -> tuple[FakeEngine, FakeVisionEngine]:
    vision: Any = service.servicer.classifier.running().engine
    return service.engine, vision


async def test_the_images_soft_tokens_stand_in_the_prompt(service: Service, client: AsyncClient) -> None:
    text, images = engines(service)
    red = await client.generate("ask", "What", image=RED)
    await client.generate("ask", {"input": "What"}, image=np.full((3, 28, 28), 0.25, np.float32))
    pieces = [piece async for piece in client.stream("look", image=GREEN)]

    assert (red.text, red.summary.adapter_name, red.summary.prompt_tokens) == ("ab", "words", 7)
    assert pieces[-1].summary.prompt_tokens == len("See {image}.") + 1
    first, grey, look = text.jobs
    assert first.prompt_ids == grey.prompt_ids == prompt(" What?")
    assert look.prompt_ids == prompt("See {image}.", 11)
    for job, at, colours in ((first, 0, (1, 0, 0)), (grey, 0, (0.25,) * 3), (look, 11, (0, 1, 0))):
        assert job.soft is not None
        assert job.soft.at == at
        np.testing.assert_allclose(job.soft.rows_SD, 1 + np.tile(colours, (1, 4)), atol=1e-6)
    # By the bare backbone of vision.
    assert images.slots == [None] * 3


async def test_batches_and_samples_look_once_an_item(service: Service, client: AsyncClient) -> None:
    text, images = engines(service)
    items = [make_request("ask", "a", image=RED), ("one", "x"), make_request("ask", "b", image=b"junk"),
             make_request("ask", "c"), make_request("look", image=GREEN)]  # fmt: skip
    answers = await client.generate_all(items)
    assert [each.error.code.name if each.error else "" for each in answers] == [
        "", "", "INVALID_ARGUMENT", "INVALID_ARGUMENT", "",
    ]  # fmt: skip
    assert [job.soft is not None for job in text.jobs].count(True) == 2
    assert len(images.slots) == 2

    sampled = await client.generate("ask", "a", image=RED, n=3, temperature=1.0)
    assert len(sampled.samples) == 3
    assert len(images.slots) == 3
    seen = [job.soft for job in text.jobs[-3:]]
    assert seen[0] is seen[1] is seen[2] is not None


async def test_the_backbone_alone_reads_the_text_alone(service: Service, client: AsyncClient) -> None:
    text, images = engines(service)
    for image in (None, RED):
        await client.generate("ask", "What", image=image, without_adapter=True)
    assert [job.prompt_ids for job in text.jobs] == [tuple(map(ord, " What?"))] * 2
    assert not images.slots
    assert all(job.soft is None for job in text.jobs)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no image": ({"task_id": "ask", "input": "x"}, "image", "found none; allowed: an image, which task ask takes"),
    "an image of a text task": (
        {"task_id": "one", "input": "x", "image": RED}, "image", "found one; allowed: none, as task one takes no image"
    ),
    "no bytes": ({"task_id": "ask", "input": "x", "image": b""}, "image.encoded", "found no bytes"),
    "bomb": ({"task_id": "ask", "input": "x", "image": bomb()}, "image.encoded", "found 50000 x 50000 pixels"),
    "truncated": ({"task_id": "ask", "input": "x", "image": RED[:40]}, "image.encoded", "cannot be decoded"),
    "another size": (
        {"task_id": "ask", "input": "x", "image": np.zeros((3, 14, 14), np.float32)}, "image.tensor.shape",
        "allowed: [3, 28, 28]",
    ),
    "no text": ({"task_id": "ask", "image": RED}, "input", "found none"),
    "blank": ({"task_id": "ask", "input": " ", "image": RED}, "text", "only blanks"),
    "a text too many": ({"task_id": "look", "input": "x", "image": RED}, "text", "task look takes only an image"),
    "another field": (
        {"task_id": "ask", "input": {"input": "x", "image": "y"}, "image": RED}, "fields.values[image]", "unknown"
    ),
    "chat": (
        {"task_id": "ask", "input": [{"role": "user", "content": "x"}], "image": RED}, "chat", "allowed: text or fields"
    ),
    "too long": ({"task_id": "ask", "input": "x" * 61, "image": RED}, "text", "prompt is too long"),
    "prompt_logprobs": (
        {"task_id": "ask", "input": "x", "image": RED, "prompt_logprobs": 1}, "parameters.prompt_logprobs",
        "allowed: 0, as the prompt has an image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_wrong_requests_name_their_field(service: Service, client: AsyncClient, case: str) -> None:
    arguments, field, message = REFUSED[case]
    with pytest.raises(ServerError) as refused:
        await client.generate(**arguments)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in dict(refused.value.violations)[field]
    text, images = engines(service)
    assert not text.jobs
    assert not images.slots
    assert (await client.generate("ask", "x", image=RED)).text == "ab"


async def test_other_calls_say_which_tasks_they_take(service: Service, client: AsyncClient) -> None:
    with_pictures(service, described_task("ask", allowed_answers=("yes", "no")))
    with pytest.raises(ServerError, match="task ask takes text and an image"):
        await client.score("ask", ["x"])
    with pytest.raises(ServerError, match="'ask', a task of texts"):
        await client.classify("ask", [RED])
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="a task of text and image"):
            await stub.ModelInfer(oip.ModelInferRequest(model_name="ask"))


async def test_tasks_say_what_they_take(client: AsyncClient) -> None:
    tasks = {task.id: task for task in await client.tasks()}
    assert tasks["ask"].picture.size == 28
    assert list(tasks["ask"].fields) == ["input"]
    assert not tasks["look"].fields
    assert [task.id for task in tasks.values() if task.HasField("picture")] == ["ask", "look"]


async def test_quotas_and_usage_count_soft_tokens_as_tokens_of_the_prompt(tmp_path: Path) -> None:
    limits = {"tokens_per_second": 0.02, "burst_seconds": 2500}
    service = Service.with_tenants(tmp_path, {"a": limits, "root": {"admin": True}}, max_in_flight=4)
    with_pictures(service, described_task("ask", max_new_tokens=8))
    async with service.running(), service.client("a") as client:
        # 50 tokens in the bucket: 7 of the prompt and 2 of the answer a request, 15 set aside before.
        for _ in range(4):
            assert (await client.generate("ask", "What", image=RED)).summary.prompt_tokens == 7
        with pytest.raises(ServerError) as refused:
            await client.generate("ask", "What", image=RED)
        assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with service.running(), service.client("root") as admin:
        (row,) = [each async for each in await admin.usage(by="total")]
        assert (row.requests, row.prompt_tokens, row.completion_tokens) == (4, 28, 8)


async def test_a_lost_engine_of_images_leaves_texts_alone(service: Service, client: AsyncClient) -> None:
    text, images = engines(service)
    images.error = EngineDeadError()
    with pytest.raises(ServerError) as lost:
        await client.generate("ask", "x", image=RED)
    assert lost.value.code is grpc.StatusCode.UNAVAILABLE
    assert not text.jobs
    assert (await client.generate("one", "x")).text == "ab"
    images.error = None
    service.servicer.classifier.backend = None
    with pytest.raises(ServerError) as none:
        await client.generate("ask", "x", image=RED)
    assert none.value.code is grpc.StatusCode.UNAVAILABLE


async def test_a_cancelled_call_leaves_no_image_behind(service: Service, client: AsyncClient) -> None:
    text, images = engines(service)
    images.hold = asyncio.Event()
    call = asyncio.create_task(client.generate("ask", "x", image=RED))
    await eventually(lambda: images.running == 1)
    call.cancel()
    await eventually(lambda: images.running == 0 and service.front.running == 0)
    assert not text.jobs
    images.hold.set()
    assert (await client.generate("ask", "x", image=RED)).text == "ab"


async def test_not_finite_states_end_their_request_alone(service: Service, client: AsyncClient) -> None:
    _, images = engines(service)
    encode = images.encode

    async def nothing(*arguments: Any) -> Any:
        return np.nan * await encode(*arguments)

    images.encode = nothing  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="aborted this request"):
        await client.generate("ask", "x", image=RED)
    assert (await client.generate("one", "x")).text == "ab"


async def test_the_command_asks_with_an_image(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(RED)

    async def ask(*words: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(main, ["ask", *words, "--address", service.address])
        out = capsys.readouterr()
        return status, out.out, out.err

    assert await ask("ask", "What", "--image", str(file)) == (0, "ab\n", "")
    assert await ask("ask", "What", "--image", str(file), "--stream") == (0, " ab \n", "")
    assert await ask("look", "--image", str(file)) == (0, "ab\n", "")
    status, out, _ = await ask("colour", "--image", str(file))
    assert (status, out.splitlines()[0]) == (0, "red\t1.000")
    for words, message in (
        (("ask", "What", "--image", str(tmp_path / "absent")), "No such file"),
        (("ask", "What", "--image", str(file), "--image", str(file)), "give --image once"),
        (("one", "What", "--image", str(file)), "takes no image"),
    ):
        status, _, err = await ask(*words)
        assert status
        assert message in err


def test_the_routing_key_covers_the_image() -> None:
    red, green = (make_request("look", image=image) for image in (RED, GREEN))
    assert _routing_key(red) != _routing_key(green)
    assert _routing_key(make_request("one", "x")) == b"x"


async def test_the_blocking_client_sends_an_image(service: Service) -> None:
    with Client(service.address) as blocking:
        answer = await asyncio.to_thread(blocking.generate, "look", image=RED)
    assert (answer.text, answer.summary.prompt_tokens) == ("ab", len("See {image}.") + 1)
