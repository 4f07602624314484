"""The parts of `make bench-vision` that need a server: images through gRPC, and texts with images beside them.

The adapters are random, with 25 tasks. The client runs on the same cores: its time counts against the server.
"""

import asyncio
import io
import itertools
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.harness.adapters import random_image_tasks, random_tasks, write_random_adapter
from benchmarks.harness.asking import closed_loop
from benchmarks.harness.native_server import native_server
from benchmarks.harness.percentile import p99
from benchmarks.harness.processes import cpu_seconds
from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.backbone import identify
from mtlora.cli.output import print_table
from mtlora.client import Access, AsyncClient
from server.cli.process import ServerProcess

TASKS = 25
_IMAGES = 16
# Photographs of 2 megapixels, about 200 kB each.
_WIDTH, _HEIGHT, _QUALITY = 1600, 1200, 85
_WORDS = ("river", "near", "our", "town", "quiet", "and", "when", "seven", "children", "saw", "a", "green", "boat")
TEXTS_IN_FLIGHT, IMAGES_IN_FLIGHT = 4, 32
_TEXTS, _NEW_TOKENS = 64, 8
P99_GOAL = 2.2


def photographs(count: int) -> list[bytes]:
    """JPEGs of 2 megapixels and about 200 kB: soft shapes of several sizes, and a little noise."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        pixels_HWC = 128 + 2 * rng.standard_normal((_HEIGHT, _WIDTH, 3), dtype=np.float32)
        for cells, strength in ((4, 40), (16, 20), (64, 10), (256, 5)):
            shapes = strength * rng.standard_normal((cells, cells, 3), dtype=np.float32)
            for colour in range(3):
                layer = Image.fromarray(shapes[..., colour]).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
                pixels_HWC[..., colour] += np.asarray(layer)
        file = io.BytesIO()
        Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
        made.append(file.getvalue())
    return made


def tensors(count: int, size: int) -> list[Any]:
    """Random images as a task's preparation would make them, [3, size, size]."""
    return list(np.random.default_rng(0).standard_normal((count, 3, size, size), dtype=np.float32))


@dataclass
class Served:
    """Images through a server, `batch` calls of one image in flight. front_s: processor time of the server's process.

    That process decodes and speaks gRPC; the engine's are its children.
    """

    name: str
    server: ServerProcess
    batch: int
    contents: Sequence[Any]
    front_s: list[float] = field(default_factory=list)

    def seconds(self, images: int, size: int) -> float:
        """Seconds for `images` images. The first calls, which open the connection, do not count. Raises ServerError."""
        return asyncio.run(self._ask(images))

    async def _ask(self, images: int) -> float:
        async with AsyncClient(self.server.address, retry=None) as client:
            ask = classifying(client, self.contents)
            await closed_loop(range(self.batch), self.batch, ask)
            began, before = time.perf_counter(), cpu_seconds(self.server.process.pid)
            await closed_loop(range(images), self.batch, ask)
            self.front_s.append((cpu_seconds(self.server.process.pid) - before) / images)
            return time.perf_counter() - began


def classifying(client: AsyncClient, contents: Sequence[Any]) -> Callable[[int], Awaitable[None]]:
    """Asks about one image by one task, each in turn. Raises ServerError."""

    async def ask(number: int) -> None:
        (found,) = await client.classify(f"task-{number % TASKS}", [contents[number % len(contents)]])
        if found.error:
            raise found.error

    return ask


@contextmanager
def image_server(backbone: Path, folder: Path, size: int, dtype: str, *, engines: int = 1) -> Iterator[ServerProcess]:
    """A server of images alone. It may be halted for as long as something else is measured."""
    write_random_adapter(folder / "adapters" / "eyes" / "1", identify(backbone), random_image_tasks(TASKS, size=size))
    with native_server(
        backbone="none", vision_backbone=backbone, vision_dtype=dtype, vision_max_size=size, engine_hang_s=3600,
        vision_data_parallel_size=engines, adapters=folder / "adapters", log_level="warning",
    ) as server:  # fmt: skip
        yield server


def print_front(served: Sequence[Served]) -> None:
    """Print the processor time per image of the server's own process."""
    each = ", ".join(f"{case.name} {case.batch}: {1e3 * statistics.median(case.front_s):.1f}" for case in served)
    print(f"processor time of the server's process, ms an image: {each}", flush=True)


@dataclass
class TextTimes:
    """Times of one tenant's texts. text_s, images_s: processor time of the two engines. images: answered meanwhile."""

    seconds: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    text_s: float = 0.0
    images_s: float = 0.0
    images: int = 0

    def shown(self) -> dict[str, float]:
        """The figures for the report."""
        return {
            "texts": len(self.seconds), "p50_s": statistics.median(self.seconds), "p99_s": p99(self.seconds),
            "images_per_second": self.images / self.wall_s, "text_engine_cores": self.text_s / self.wall_s,
            "image_engine_cores": self.images_s / self.wall_s,
        }  # fmt: skip


def text_beside_images(
    language: Path, vision: Path, folder: Path, size: int, dtype: str, rounds: int
) -> dict[str, Any]:
    """A server, two tenants of equal weight: the same texts without images and with them, in turns. Prints a table."""
    texts = [task.model_copy(update={"id": f"text-{i}"}) for i, task in enumerate(random_tasks(TASKS))]
    write_random_adapter(folder / "adapters" / "words" / "1", identify(language), texts)
    write_random_adapter(folder / "adapters" / "eyes" / "1", identify(vision), random_image_tasks(TASKS, size=size))
    made = {name: tenant(name) for name in ("texts", "images")}
    write_tenants(folder / "tenants.yaml", *(entry for _, entry in made.values()))
    with native_server(
        backbone=language, vision_backbone=vision, vision_dtype=dtype, vision_max_size=size,
        adapters=folder / "adapters", tenants=folder / "tenants.yaml", log_level="warning",
    ) as server:  # fmt: skip
        return asyncio.run(_in_turns(server, {name: Access(key) for name, (key, _) in made.items()}, rounds))


async def _in_turns(server: ServerProcess, access: dict[str, Access], rounds: int) -> dict[str, Any]:
    async with (
        AsyncClient(server.address, access["texts"], retry=None) as texts,
        AsyncClient(server.address, access["images"], retry=None) as images,
    ):
        engines = [child.pid for child in psutil.Process(server.process.pid).children(recursive=True)]
        both = Both(engines, texts, classifying(images, photographs(_IMAGES)))
        await both.warm_up()
        alone, beside = TextTimes(), TextTimes()
        for number in range(rounds):
            # Alternate the order of turns.
            for with_images in (False, True) if number % 2 else (True, False):
                await both.turn(number, beside if with_images else alone, with_images=with_images)
    report = beside_report(alone, beside)
    print_beside(report)
    return report


class Both:
    """Texts of one tenant and images of another, in closed loops.

    engines: processes, the two engines' among them. look: asks about an image.
    """

    def __init__(self, engines: Sequence[int], texts: AsyncClient, look: Callable[[int], Awaitable[None]]) -> None:
        self._engines, self._texts, self._look = engines, texts, look

    async def warm_up(self) -> None:
        """Ask texts alone, then images alone: what takes the most processor time then is the engine of each."""
        before = self._processor_s()
        await closed_loop(range(_TEXTS), TEXTS_IN_FLIGHT, partial(self._read, -1, TextTimes()))
        between = self._processor_s()
        await closed_loop(range(2 * IMAGES_IN_FLIGHT), IMAGES_IN_FLIGHT, self._look)
        after = self._processor_s()
        self._text = max(before, key=lambda pid: between[pid] - before[pid])
        self._images = max(before, key=lambda pid: after[pid] - between[pid])

    async def turn(self, number: int, times: TextTimes, *, with_images: bool) -> None:
        """The texts of a round, with images in flight from before the first to after the last, or without."""
        answered, done = 0, not with_images

        async def look(image: int) -> None:
            nonlocal answered
            await self._look(image)
            answered += 1

        def images() -> Iterator[int]:
            yield from itertools.takewhile(lambda _: not done, itertools.count())

        async with asyncio.TaskGroup() as running:
            running.create_task(closed_loop(images(), IMAGES_IN_FLIGHT, look))
            while not done and answered < IMAGES_IN_FLIGHT:
                await asyncio.sleep(0.01)
            began, before, earlier = time.perf_counter(), self._processor_s(), answered
            await closed_loop(range(_TEXTS), TEXTS_IN_FLIGHT, partial(self._read, number, times))
            times.wall_s += time.perf_counter() - began
            after = self._processor_s()
            times.text_s += after[self._text] - before[self._text]
            times.images_s += after[self._images] - before[self._images]
            times.images += answered - earlier
            done = True

    async def _read(self, number: int, times: TextTimes, text: int) -> None:
        rng = random.Random(f"{number}/{text}")
        words = " ".join(rng.choices(_WORDS, k=rng.randint(8, 24)))
        began = time.perf_counter()
        await self._texts.generate(f"text-{text % TASKS}", words, max_new_tokens=_NEW_TOKENS, stop=[])
        times.seconds.append(time.perf_counter() - began)

    def _processor_s(self) -> dict[int, float]:
        return {pid: cpu_seconds(pid) for pid in self._engines}


def beside_report(alone: TextTimes, beside: TextTimes) -> dict[str, Any]:
    """Both kinds of turns, text's p99 with images ÷ without, and the engines' processor times with images."""
    return {
        "rows": {"texts alone": alone.shown(), "texts beside images": beside.shown()},
        "p99_ratio": p99(beside.seconds) / p99(alone.seconds),
        "goal": P99_GOAL,
        "processor_text_by_images": beside.text_s / beside.images_s,
    }


def print_beside(report: Mapping[str, Any]) -> None:
    """The table and the ratios."""
    print_table(
        f"{TEXTS_IN_FLIGHT} texts in flight, {_NEW_TOKENS} new tokens each; beside them {IMAGES_IN_FLIGHT} images",
        ("turns", "texts", "p50, ms", "p99, ms", "images/s", "cores, language engine", "cores, vision engine"),
        [
            (
                name, row["texts"], f"{1e3 * row['p50_s']:.0f}", f"{1e3 * row['p99_s']:.0f}",
                *(f"{row[key]:.2f}" for key in ("images_per_second", "text_engine_cores", "image_engine_cores")),
            )
            for name, row in report["rows"].items()
        ],
    )  # fmt: skip
    print(
        f"text's p99, images beside it/alone: {report['p99_ratio']:.2f} (goal at most {report['goal']:.2f}); processor "
        f"time, language engine/vision engine: {report['processor_text_by_images']:.2f}",
        flush=True,
    )
