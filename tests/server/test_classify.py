"""Images through the real servicer, around a fake engine: labels, hostile images, quotas, fairness, ends."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc
from openinference_pb import grpc_predict_v2_pb2 as oip
from openinference_pb import grpc_predict_v2_pb2_grpc
from PIL import Image

from mtlora.client import AsyncClient, Classification, ServerError
from mtlora.suite.base import Example
from mtlora.vision.images import ImageLimits
from server.cli import main
from server.cli.demo_vision import ask_all
from server.errors import EngineDeadError
from server.job import Lane
from server.rpc import pictures
from server.rpc.classify import MAX_CLASSIFIED
from server.rpc.pictures import Decoding
from server.scheduling.admission import State
from server.tenants import Tenant
from tests.mtlora.vision.pictures import SVG, animated, bomb, encoded, jpeg_bomb, many_scans, photograph, webp_bomb
from tests.server.fakes import Service
from tests.server.pictures import COLOURS, picture_task, with_pictures
from tests.waiting import eventually

RED, GREEN, BLUE = (encoded(Image.new("RGB", (9, 7), colour)) for colour in ("red", "lime", "blue"))
POSITIONS = 5


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service(max_in_flight=64, turns=8)
    with_pictures(service)
    async with service.running():
        yield service


def labels(found: list[Classification]) -> list[str]:
    return [each.label for each in found]


async def test_images_get_labels_probabilities_version_and_timings(client: AsyncClient) -> None:
    red, green = await client.classify("colour", [RED, GREEN])

    assert (red.label, green.label) == ("red", "green")
    assert (red.image, green.image) == (0, 1)
    assert next(iter(red.probabilities)) == "red"
    assert set(red.probabilities) == set(COLOURS)
    assert sum(red.probabilities.values()) == pytest.approx(1)
    assert red.probabilities["red"] == pytest.approx(1 / (1 + 2 * np.exp(-10)), rel=1e-5)
    assert red.summary is not None
    assert (red.summary.task_id, red.summary.adapter_name, red.summary.adapter_version) == ("colour", "sights", "1")
    assert red.summary.prompt_tokens == POSITIONS
    assert red.summary.timings.total.ToNanoseconds() >= red.summary.timings.queue.ToNanoseconds() > 0


async def test_several_tasks_answer_each_image(client: AsyncClient) -> None:
    found = await client.classify(["colour", "tint"], [BLUE, RED])

    assert [(each.image, each.task_id, each.label) for each in found] == [
        (0, "colour", "blue"),
        (0, "tint", "blue"),
        (1, "colour", "red"),
        (1, "tint", "red"),
    ]


async def test_tasks_that_prepare_alike_decode_once(
    service: Service, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int | None] = []
    decode = pictures.decode

    def counted(data: bytes, limits: Any, *, size: int | None) -> Any:
        sizes.append(size)
        return decode(data, limits, size=size)

    monkeypatch.setattr(pictures, "decode", counted)
    with_pictures(service, picture_task("large", size=56, adapter="large"))
    await client.classify(["colour", "tint", "large"], [RED])
    assert sorted(sizes) == [28, 56]


async def test_a_prepared_tensor_is_taken_as_it_is(client: AsyncClient) -> None:
    pixels_CSS = np.zeros((3, 28, 28), np.float32)
    pixels_CSS[1] = 0.9
    (found,) = await client.classify("colour", [pixels_CSS])
    assert found.label == "green"


async def test_score_takes_images_and_calibration_tempers(service: Service, client: AsyncClient) -> None:
    with_pictures(service, picture_task("tempered", adapter="t", calibration=5.0))
    scored = await client.score("colour", [RED, b"junk", GREEN])
    assert [each.label for each in scored] == ["red", "", "green"]
    assert scored[1].error is not None
    (tempered,) = await client.classify("tempered", [RED])
    (plain,) = await client.classify("tempered", [RED], uncalibrated=True)
    assert tempered.probabilities["red"] == pytest.approx(1 / (1 + 2 * np.exp(-2)), rel=1e-5)
    assert plain.probabilities["red"] == pytest.approx(1 / (1 + 2 * np.exp(-10)), rel=1e-5)


def nan_tensor() -> Any:
    pixels_CSS = np.zeros((3, 28, 28), np.float32)
    pixels_CSS[2, 3, 4] = np.nan
    return pixels_CSS


HOSTILE: dict[str, tuple[Any, str]] = {
    "truncated JPEG": (encoded(photograph(), "JPEG")[:-300], "images[0].encoded: found a JPEG that cannot be decoded"),
    "bomb": (bomb(), "found 50000 x 50000 pixels; allowed: 1 to 25000000"),
    "JPEG bomb": (jpeg_bomb(), "found 65535 x 65535 pixels"),
    "WebP bomb": (webp_bomb(), "found 16384 x 16384 pixels"),
    "many scans": (many_scans(300), "scans"),
    "animated PNG": (animated("PNG"), "found 2 frames; allowed: 1"),
    "animated WebP": (animated("WEBP"), "an animated WebP; allowed: 1 frame"),
    "GIF": (encoded(photograph(), "GIF"), "found a GIF; allowed: PNG, JPEG, WebP"),
    "SVG": (SVG, "found an SVG; allowed: PNG, JPEG, WebP"),
    "text": (b"What is in this picture?", "found bytes of an unknown format"),
    "no bytes": (b"", "found no bytes"),
    "tensor of wrong shape": (
        np.zeros((3, 14, 28), np.float32),
        "tensor.shape: found [3, 14, 28]; allowed: [3, 28, 28]",
    ),
    "tensor with NaN": (nan_tensor(), "tensor.data: found other values than allowed; allowed: finite ones"),
    "infinite tensor": (np.full((3, 28, 28), np.inf, np.float32), "tensor.data"),
    "huge tensor": (np.full((3, 28, 28), 1e30, np.float32), "tensor.data"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_image_gets_a_clear_status_and_harms_no_other(client: AsyncClient, name: str) -> None:
    image, reason = HOSTILE[name]

    bad, good = await client.classify("colour", [image, RED])

    assert good.label == "red"
    assert bad.error is not None
    assert bad.error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert reason in str(bad.error)
    assert bad.error.violations


@pytest.mark.parametrize(
    "image",
    [
        encoded(Image.new("RGB", (20, 20), "red").convert("CMYK"), "JPEG"),
        encoded(Image.new("P", (20, 20), 1)),
        encoded(Image.new("I;16", (20, 20), 40_000)),
        encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 90))),
    ],
    ids=["CMYK", "palette", "16 bits", "alpha"],
)
async def test_odd_colours_are_taken(client: AsyncClient, image: bytes) -> None:
    (found,) = await client.classify("colour", [image])
    assert found.error is None


async def test_orientation_is_honoured(service: Service, client: AsyncClient) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    two = Image.new("RGB", (30, 10), "red")
    two.paste("lime", (0, 0, 30, 4))
    plain, turned = encoded(two), encoded(two, exif=exif.tobytes())
    engine: Any = service.servicer.classifier.running().engine
    seen: list[Any] = []
    engine.embed = lambda pixels_CSS: seen.append(pixels_CSS) or pixels_CSS
    for image in (plain, turned):
        await client.classify("colour", [image])
    upright_CSS, turned_CSS = seen
    assert np.allclose(turned_CSS, np.rot90(upright_CSS, -1, (1, 2)), atol=0.05)
    assert not np.allclose(turned_CSS, upright_CSS, atol=0.05)


async def test_texts_for_images_and_images_for_texts_are_refused(client: AsyncClient) -> None:
    for work, reason in (
        (client.generate("colour", "What is it?"), "'colour', a task of images; allowed: tasks of texts"),
        (client.classify("one", [RED]), "task_ids[0]: found 'one', a task of texts; allowed: tasks of images"),
        (client.score("colour", ["What is it?"]), "inputs[0]: found text; allowed: image"),
        (client.classify("colour", []), "found 1 task_ids and 0 images; allowed: tasks times images, 1 to 256"),
        (client.classify("colour", [RED] * (MAX_CLASSIFIED + 1)), "found 1 task_ids and 257 images"),
    ):
        with pytest.raises(ServerError) as caught:
            await work
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert reason in str(caught.value)
    (answer,) = await client.generate_all([("colour", "What is it?")])
    assert answer.error is not None
    assert "a task of images" in str(answer.error)
    with pytest.raises(ServerError) as caught:
        await client.classify("colours", [RED])
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert "near: colour" in str(caught.value)


async def test_a_task_says_how_its_images_are_prepared(client: AsyncClient) -> None:
    task = await client.task("colour")
    assert (task.image.size, task.image.resize, list(task.image.std)) == (28, "squash", [1.0] * 3)
    assert list(task.allowed_answers) == list(COLOURS)
    assert not (await client.task("one")).HasField("image")


async def test_usage_and_metrics_count_images(service: Service, client: AsyncClient) -> None:
    await client.classify(["colour", "tint"], [RED, b"junk"])
    assert service.value("mtlora_requests_total", method="ClassifyItem", task="colour", status="OK") == 1
    assert service.value("mtlora_requests_total", method="ClassifyItem", task="tint", status="INVALID_ARGUMENT") == 1
    assert service.value("mtlora_prompt_tokens_total", task="colour") == POSITIONS
    # The item that failed was not decoded: its header tells.
    assert service.value("mtlora_image_decode_seconds_count") == 2


async def test_quotas_come_before_any_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"tokens_per_second": 20, "burst_seconds": 1}
    service = Service.with_tenants(tmp_path, {"a": limits, "b": {}}, max_in_flight=64)
    with_pictures(service)
    decoded: list[int] = []
    decode = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *a, **b: decoded.append(1) or decode(*a, **b))
    async with service.running(), service.client("a") as client:
        # Five positions an image: the first call empties the bucket.
        assert labels(await client.classify("colour", [RED] * 5)) == ["red"] * 5
        with pytest.raises(ServerError, match="tokens_per_second") as caught:
            await client.classify("colour", [RED])
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(decoded) == 5
        async with service.client("b") as other:
            assert labels(await other.classify("colour", [RED])) == ["red"]


async def test_a_tenants_flood_of_images_does_not_keep_texts_waiting(tmp_path: Path) -> None:
    """Each engine has turns of its own."""
    service = Service.with_tenants(tmp_path, {"a": {}, "b": {}}, max_in_flight=4)
    engine = with_pictures(service)
    engine.hold = asyncio.Event()
    async with service.running(), service.client("a") as flooding, service.client("b") as writing:
        flood = [asyncio.create_task(flooding.classify("colour", [RED])) for _ in range(5)]
        await eventually(lambda: engine.running == 4)
        assert (await writing.generate("one", "x", timeout=5)).text == "ab"
        engine.hold.set()
        done = await asyncio.gather(*flood, return_exceptions=True)
        assert any(isinstance(each, list) for each in done)


async def test_images_are_charged_by_their_positions(tmp_path: Path) -> None:
    service = Service.with_tenants(tmp_path, {"a": {}}, max_in_flight=4)
    service.servicer.classifier._position_cost = 0.5
    with_pictures(service)
    async with service.running(), service.client("a") as client:
        await client.classify("colour", [RED, GREEN])
        assert service.value("mtlora_tenant_service_total", tenant="a") == pytest.approx(2 * POSITIONS * 0.5)


async def test_a_lost_engine_of_images_leaves_texts_alone_and_the_reverse(
    service: Service, client: AsyncClient
) -> None:
    engine: Any = service.servicer.classifier.running().engine
    engine.error = EngineDeadError()
    (dead,) = await client.classify("colour", [RED])
    assert dead.error is not None
    assert dead.error.code is grpc.StatusCode.UNAVAILABLE
    service.admission.lost.add(Lane.IMAGES)
    with pytest.raises(ServerError) as caught:
        await client.classify("colour", [RED])
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert (await client.generate("one", "x")).text == "ab"
    engine.error = None
    service.admission.lost = {Lane.TEXT}
    assert labels(await client.classify("colour", [RED])) == ["red"]
    with pytest.raises(ServerError) as caught:
        await client.generate("one", "x")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    service.admission.state = State.DRAINING
    with pytest.raises(ServerError, match="draining"):
        await client.classify("colour", [RED])


async def test_a_cancelled_call_leaves_nothing(service: Service, client: AsyncClient) -> None:
    engine: Any = service.servicer.classifier.running().engine
    engine.hold = asyncio.Event()
    with pytest.raises(ServerError) as caught:
        await client.classify("colour", [RED] * 3, timeout=0.5)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: engine.running == 0 and service.front.running == 0)
    engine.hold = None
    assert labels(await client.classify("colour", [RED])) == ["red"]


async def test_images_in_decoding_have_no_more_pixels_than_the_largest() -> None:
    decoding, tenant = Decoding(ImageLimits(max_pixels=10), threads=4), Tenant(id="one")
    going: list[int] = []
    ended: list[int] = []
    most, go_on = 0, threading.Event()

    def work(pixels: int) -> None:
        nonlocal most
        going.append(pixels)
        most = max(most, sum(going))
        go_on.wait(60)
        going.remove(pixels)
        ended.append(pixels)

    def begun(pixels: int) -> asyncio.Task[Any]:
        return asyncio.create_task(decoding.run(tenant, pixels, pixels, partial(work, pixels)))

    calls = [begun(3)]
    await eventually(lambda: going == [3])
    # One that is larger than all may be comes too, alone; smaller ones do not pass it.
    calls.append(begun(12))
    await eventually(decoding._next.locked)
    calls += [begun(pixels) for pixels in (3, 3, 3, 3, 1)]
    await asyncio.sleep(0.05)
    assert going == [3]
    go_on.set()
    await asyncio.gather(*calls)
    assert ended[:2] == [3, 12]
    assert sorted(ended) == [1, 3, 3, 3, 3, 3, 12]
    assert most == 12


def test_threads_that_decode_follow_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    found = []
    for quota in (None, 2.0, 0.5, 9.0):
        monkeypatch.setattr(pictures, "cpu_cores", lambda quota=quota: quota)
        found.append(pictures.decoding_threads())
    assert found == [8, 1, 1, 4]


async def test_an_image_is_read_once_for_all_items_of_a_split_task(
    service: Service, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = service.servicer.catalog
    split = ((1, catalog.tasks["colour"]), (1, catalog.tasks["colour"]))
    service.servicer.catalog = replace(catalog, splits={"colour": split})
    read = []
    blake2b = hashlib.blake2b

    def counted(data: bytes = b"", **named: Any) -> Any:
        read.append(len(data) >= len(RED))
        return blake2b(data, **named)

    monkeypatch.setattr(hashlib, "blake2b", counted)
    assert labels(await client.classify(["colour"] * 8, [RED])) == ["red"] * 8
    assert sum(read) == 1


async def test_the_event_loop_goes_on_while_images_are_decoded(
    service: Service, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def slow(*arguments: Any, **named: Any) -> Any:
        go.wait(10)
        return np.zeros((9, 9, 3), np.uint8)

    monkeypatch.setattr(pictures, "decode", slow)
    flood = asyncio.create_task(client.classify("colour", [RED] * 10))
    await asyncio.sleep(0.05)
    assert (await client.generate("one", "x", timeout=5)).text == "ab"
    go.set()
    assert len(await flood) == 10


@pytest.mark.parametrize("raw", [False, True])
async def test_open_inference_takes_images(service: Service, raw: bool) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = await stub.ModelMetadata(oip.ModelMetadataRequest(name="colour"))
        assert [tensor.name for tensor in metadata.inputs] == ["image"]
        assert [tensor.name for tensor in metadata.outputs] == ["label", "probabilities", "labels"]

        request = oip.ModelInferRequest(model_name="colour")
        tensor = request.inputs.add(name="image", datatype="BYTES", shape=[2])
        if raw:
            parts = [len(each).to_bytes(4, "little") + each for each in (RED, BLUE)]
            request.raw_input_contents.append(b"".join(parts))
        else:
            tensor.contents.bytes_contents.extend([RED, BLUE])
        assert await answers(stub, request) == ["red", "blue"]

        request = oip.ModelInferRequest(model_name="colour")
        tensor = request.inputs.add(name="image", datatype="FP32", shape=[2, 3, 28, 28])
        pixels_NCSS = np.zeros((2, 3, 28, 28), "<f4")
        pixels_NCSS[0, 2] = pixels_NCSS[1, 1] = 0.5
        if raw:
            request.raw_input_contents.append(pixels_NCSS.tobytes())
        else:
            tensor.contents.fp32_contents.extend(pixels_NCSS.ravel().tolist())
        assert await answers(stub, request) == ["blue", "green"]

        tensor.shape[:] = [2, 3, 28, 14]
        await refused(stub, request, "inputs[0]: found")
        tensor.shape[:] = [4, 3, 28, 14]
        await refused(stub, request, "tensor.shape: found [3, 28, 14]; allowed: [3, 28, 28]")
        request.parameters["max_tokens"].int64_param = 3
        await refused(stub, request, "parameters[max_tokens]: unknown")


async def answers(stub: Any, request: Any) -> list[str]:
    response = await stub.ModelInfer(request)
    assert response.parameters["prompt_tokens"].int64_param == 2 * POSITIONS
    # All outputs, because the request names none.
    assert [each.name for each in response.outputs] == ["label", "probabilities", "labels"]
    assert [list(each.shape) for each in response.outputs] == [[2], [2, 3], [3]]
    if response.raw_output_contents:
        found, data = [], response.raw_output_contents[0]
        while data:
            size = int.from_bytes(data[:4], "little")
            found.append(data[4 : 4 + size].decode())
            data = data[4 + size :]
        return found
    return [each.decode() for each in response.outputs[0].contents.bytes_contents]


async def refused(stub: Any, request: Any, reason: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason in (caught.value.details() or "")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    image=st.one_of(
        st.builds(lambda data: pb.Image(encoded=data), st.binary(max_size=64)),
        st.builds(
            lambda shape, data: pb.Image(tensor=pb.ImageTensor(shape=shape, data=data)),
            st.lists(st.sampled_from([0, 1, 3, 28, 2**32 - 1]), max_size=5),
            st.sampled_from([b"", b"\0" * 12, b"\0" * (12 * 28 * 28), b"\xff" * (12 * 28 * 28)]),
        ),
        st.just(pb.Image()),
    )
)
async def test_any_image_has_an_answer_or_a_status(service: Service, image: pb.Image) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        reply = await stub.Classify(pb.ClassifyRequest(task_ids=["colour"], images=[image]))
    (found,) = reply.results
    assert found.label or found.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_ask_prints_labels_of_files(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "bad.png").write_bytes(SVG)

    async def ask(*names: str) -> int:
        images = [part for name in names for part in ("--image", str(tmp_path / name))]
        return await asyncio.to_thread(main, ["ask", "colour", *images, "--address", service.address])

    assert await ask("red.png") == 0
    assert capsys.readouterr().out.splitlines()[0] == "red\t1.000"
    assert await ask("red.png", "bad.png") == 1
    shown = capsys.readouterr()
    assert "red.png:\nred\t1.000" in shown.out
    assert "bad.png: INVALID_ARGUMENT" in shown.err
    assert "an SVG" in shown.err
    assert await ask("absent.png") == 2
    assert "absent.png: No such file" in capsys.readouterr().err


async def test_the_demo_asks_every_image_in_order(service: Service) -> None:
    examples = [
        Example("colour" if i % 3 else "tint", str(i), label, image=image)
        for i, (label, image) in enumerate([("red", RED), ("green", GREEN), ("red", b"junk")] * 8)
    ]
    asked = await ask_all(service.address, examples)
    assert [each.example for each in asked] == examples
    assert [each.correct for each in asked] == [True, True, False] * 8
    assert all("INVALID_ARGUMENT" in each.error for each in asked[2::3])


async def test_an_image_above_the_limit_of_messages_names_the_setting() -> None:
    service = Service(max_message_bytes=4096)
    with_pictures(service)
    async with service.running(), AsyncClient(service.address, retry=None) as client:
        with pytest.raises(
            ServerError, match=r"RESOURCE_EXHAUSTED: .*; the server's max_message_bytes allows no larger"
        ):
            await client.classify("colour", [bytes(5000)])
