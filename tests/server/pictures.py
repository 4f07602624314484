"""Image tasks on a fake engine that answers by an image's mean colour."""

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtlora.vision.image_input import ImageInput, ImagePreparation
from server.job import Lane, ServedTask
from server.registry.heads import Head, ServedProjector
from server.registry.residency import Residency
from server.rpc.classify import ImageBackend
from tests.server.adapters import entry
from tests.server.fakes import FakeMemory, Service
from tests.server.slots import serving_version

COLOURS = ("red", "green", "blue")
PLAIN: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


class FakeVisionEngine:
    """Its feature is the mean of red, green and blue, behind three zeros. `hold` keeps it, `error` ends an image."""

    def __init__(self) -> None:
        self.hold: asyncio.Event | None = None
        self.error: Exception | None = None
        self.running = 0
        self.slots: list[Any] = []

    def positions(self, size: int) -> int:
        return 1 + (size // 14) ** 2

    def embed(self, pixels_CSS: NDArray[np.float32]) -> Any:
        return pixels_CSS

    num_prefix = 1

    def soft_tokens(self, size: int, merge: int) -> int:
        return int((size // 14 // merge) ** 2)

    async def states(self, pixels_CSS: NDArray[np.float32]) -> NDArray[np.float32]:
        """Each position's is the image's mean red, green and blue."""
        colours = (await self.encode(pixels_CSS, None))[3:]
        return np.tile(colours, (self.positions(pixels_CSS.shape[1]), 1))

    async def encode(self, pixels_CSS: NDArray[np.float32], slot: Any) -> NDArray[np.float32]:
        self.slots.append(slot)
        self.running += 1
        try:
            await asyncio.sleep(0)
            if self.hold:
                await self.hold.wait()
            if self.error:
                raise self.error
            return np.concatenate([np.zeros(3, np.float32), pixels_CSS.mean((1, 2))])
        finally:
            self.running -= 1


def picture_task(name: str, *, adapter: str = "sights", size: int = 28, **more: Any) -> ServedTask:
    """A task that names the strongest colour."""
    image = ImageInput(size=size, **{"pooling": "mean", **PLAIN, **more.pop("image", {})})
    version = serving_version(adapter, name)
    version.lane = Lane.IMAGES
    version.heads = {name: Head(10 * np.eye(3, dtype=np.float32), np.zeros(3, np.float32), image.pooling)}
    spec = entry(name, allowed_answers=COLOURS, image=image)
    return ServedTask(spec, adapter, version.version, version.slots[name], version=version, **more)


def described_task(name: str, template: str = "{image} {input}?", *, adapter: str = "words", **more: Any) -> ServedTask:
    """A task of text about an image of 4 patches, which is one soft token: 12 numbers of its mean colour."""
    version = serving_version(adapter, name)
    version.projector = ServedProjector(np.eye(12, dtype=np.float32), np.ones(12, np.float32), 2)
    spec = entry(name, template=template, picture=ImagePreparation(size=28, **PLAIN), **more)
    return ServedTask(spec, adapter, version.version, version.slots[name], version=version)


def with_pictures(service: Service, *more: ServedTask) -> FakeVisionEngine:
    """Let a service serve tasks of images beside its two of texts."""
    engine: Any = FakeVisionEngine()
    service.servicer.classifier.backend = ImageBackend(engine, Residency(FakeMemory(), capacity=4))
    service.serve(picture_task("colour"), picture_task("tint", adapter="tints"), *more)
    return engine
