"""Mutated images: the server must answer each with a label or a clear status, without slowing a neighbour."""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from benchmarks.harness.adapters import write_random_adapter
from benchmarks.harness.asking import closed_loop
from benchmarks.harness.native_server import native_server
from benchmarks.harness.percentile import p99
from benchmarks.harness.processes import resident_bytes
from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.backbone import identify, resolve
from mtlora.checkpoint.format import TaskEntry
from mtlora.client import Access, AsyncClient, Client, ServerError, make_classification
from mtlora.client.images import make_image
from mtlora.vision.image_input import ImageInput
from tests.faults._load import p99_name
from tests.faults.scenario import Options, Row
from tests.mtlora.vision.pictures import SVG, animated, bomb, encoded, jpeg_bomb, many_scans, photograph, webp_bomb

ORDER = 105
# Most steps that the neighbour may wait: the step that runs when its image arrives, and the step that computes it.
STEPS_GOAL = 2.0
_STEP = 16
_CALLS, _IMAGES = 4, 8
_SIZE = 112
_PROPER = {"OK", "INVALID_ARGUMENT"}


def run(options: Options) -> Row:
    """20,000 images (short: 1,000), while a neighbour asks one after the other."""
    count = 20_000 if options.full else 1_000
    backbone = resolve("vision")
    tasks = [_task(row, labels) for row, labels in enumerate((2, 5, 20))]
    write_random_adapter(options.folder / "adapters" / "eyes" / "1", identify(backbone), tasks)
    (key, entry), (own_key, own_entry) = tenant("hostile"), tenant("neighbour")
    with native_server(
        backbone="none", vision_backbone=backbone, adapters=options.folder / "adapters",
        tenants=write_tenants(options.folder / "tenants.yaml", entry, own_entry), log_level="warning",
        vision_max_num_seqs=_STEP,
    ) as server:  # fmt: skip
        mutator = Mutator(options.seed, [task.id for task in tasks])
        neighbour = Neighbour(server.address, Access(own_key), tasks[1].id)
        alone, steps = neighbour.ask_for(10.0), neighbour.ask_for(10.0, images=_STEP)
        # Warm up until pools have their size. These images are checked, but not counted among the 20,000.
        warm_up = asyncio.run(_send(server.address, key, mutator, max(200, count // 20)))
        before = resident_bytes(server.process.pid)
        statuses, beside = asyncio.run(_beside(server.address, key, mutator, count, neighbour))
        growth = resident_bytes(server.process.pid) / before - 1
        alive = server.process.poll() is None
    statuses += warm_up
    improper = {name: n for name, n in statuses.items() if name not in _PROPER}
    step_s, worst = statistics.median(steps), p99_name(beside)
    waited = p99(beside) / step_s
    shown = ", ".join(f"{name} {n}" for name, n in statuses.most_common())
    return Row(
        "mutated images",
        f"each a label or INVALID_ARGUMENT, RSS within 5 %, a neighbour always right and its {worst} <= {STEPS_GOAL} "
        f"steps of {_STEP} images",
        f"{sum(statuses.values())} images ({shown}), RSS {growth:+.1%}, neighbour {len(beside)} images, "
        f"{neighbour.wrong} wrong, {worst} {1e3 * p99(beside):.0f} ms = {waited:.2f} steps of {1e3 * step_s:.0f} ms; "
        f"alone {1e3 * p99(alone):.0f} ms",
        met=alive and not improper and not neighbour.wrong and growth <= 0.05 and waited <= STEPS_GOAL,
    )


def _task(row: int, labels: int) -> TaskEntry:
    return TaskEntry(
        id=f"sight-{row}",
        description="An image's label.",
        allowed_answers=tuple(f"label-{i}" for i in range(labels)),
        image=ImageInput(size=_SIZE),
        bias_index=row,
    )


class Neighbour:
    """A tenant that asks about images whose labels are known. wrong: how many got another label, or no answer."""

    def __init__(self, address: str, access: Access, task: str) -> None:
        self._address, self._access, self._task = address, access, task
        self._image = encoded(photograph(300, 200), "JPEG")
        with Client(address, access, retry=None) as client:
            self._label = client.classify(task, [self._image])[0].label
        self.wrong = 0

    def ask_for(self, seconds: float, images: int = 1) -> list[float]:
        """Seconds of each answer to a call of so many images."""
        until = time.monotonic() + seconds
        return asyncio.run(self.ask_until(lambda: time.monotonic() >= until, images))

    async def ask_until(self, done: Any, images: int = 1) -> list[float]:
        """Ask until `done()`; gives the seconds of each answer."""
        taken = []
        async with AsyncClient(self._address, self._access, retry=None) as client:
            while not done():
                began = time.monotonic()
                try:
                    found = await client.classify(self._task, [self._image] * images, timeout=60)
                    self.wrong += any(each.label != self._label for each in found)
                except ServerError:
                    self.wrong += 1
                taken.append(time.monotonic() - began)
        return taken


class Mutator:
    """Makes requests of images: good ones, bad ones, and damaged ones of both."""

    def __init__(self, seed: int, task_ids: list[str]) -> None:
        self._rng = random.Random(seed)
        self._task_ids = task_ids
        self._seeds = list(_seeds())

    def request(self) -> pb.ClassifyRequest:
        rng = self._rng
        images = [self._damaged(rng.choice(self._seeds)) for _ in range(_IMAGES)]
        request = make_classification(rng.choice(self._task_ids), images)
        if rng.random() < 0.2:
            request.images[0].CopyFrom(self._tensor())
        return request

    def _damaged(self, data: bytes) -> bytes:
        rng, damaged = self._rng, bytearray(data)
        for _ in range(rng.choice((0, 1, 1, 2, 5, 20))):
            if not damaged:
                break
            # Damage mostly headers, which affect more code than pixels.
            at = rng.randrange(min(64, len(damaged)) if rng.random() < 0.3 else len(damaged))
            match rng.randrange(4):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    del damaged[at : at + rng.randint(1, 30)]
                case 2:
                    damaged[at:at] = rng.randbytes(rng.randint(1, 30))
                case _:
                    del damaged[at + rng.randrange(64) :]
        return bytes(damaged)

    def _tensor(self) -> pb.Image:
        rng = self._rng
        image = make_image(np.zeros((3, _SIZE, _SIZE), np.float32))
        match rng.randrange(4):
            case 0:
                image.tensor.shape[rng.randrange(3)] = rng.choice((0, 1, 2**32 - 1))
            case 1:
                image.tensor.data = image.tensor.data[: -rng.randint(1, 100)]
            case 2:
                at = 4 * rng.randrange(3 * _SIZE * _SIZE)
                odd = np.float32(rng.choice((np.nan, np.inf, -np.inf, 3e38))).tobytes()
                image.tensor.data = image.tensor.data[:at] + odd + image.tensor.data[at + 4 :]
        return image


def _seeds() -> Iterator[bytes]:
    image = photograph(60, 40)
    for kind in ("PNG", "JPEG", "WEBP"):
        yield encoded(image, kind)
        yield encoded(image, kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    for mode in ("P", "L", "1", "LA", "RGBA"):
        yield encoded(image.convert(mode))
    yield encoded(image, "JPEG", progressive=True)
    yield encoded(image.convert("CMYK"), "JPEG")
    yield encoded(image.convert("I;16"))
    yield encoded(photograph(1200, 900), "JPEG")
    yield from (animated("PNG"), animated("WEBP"), bomb(), jpeg_bomb(), webp_bomb(), many_scans(200), SVG, b"a text")


async def _beside(
    address: str, key: str, mutator: Mutator, count: int, neighbour: Neighbour
) -> tuple[Counter[str], list[float]]:
    sending = asyncio.create_task(_send(address, key, mutator, count))
    taken = await neighbour.ask_until(sending.done)
    return await sending, taken


async def _send(address: str, key: str, mutator: Mutator, count: int) -> Counter[str]:
    """Number of images by the status of each."""
    statuses: Counter[str] = Counter()
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def send(_: int) -> None:
            try:
                metadata = (("authorization", f"Bearer {key}"),)
                reply = await stub.Classify(mutator.request(), metadata=metadata, timeout=120)
            except grpc.aio.AioRpcError as error:
                statuses[f"call {error.code().name}"] += _IMAGES
                return
            statuses.update(names[each.status.code] for each in reply.results)

        await closed_loop(range(count // _IMAGES), _CALLS, send)
    return statuses
