"""Images of requests: checked when they come, decoded in threads that tenants share fairly, made an engine's input."""

import asyncio
import hashlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
from mtlora_pb.v1 import inference_pb2 as pb
from numpy.typing import NDArray

from mtlora.control_group import cpu_cores
from mtlora.vision.image_input import ImageInput, ImagePreparation
from mtlora.vision.images import Header, ImageError, ImageLimits, decode, held_pixels, prepare, read_header
from server.errors import RequestFailedError, Violation, invalid_argument
from server.scheduling.fair_thread import FairThread
from server.settings import Settings
from server.tenants import Tenant

# Limit for prepared images: normalised values of any image are within a few units of 0.
MAX_VALUE = 100.0
_MAX_THREADS = 8


class Embeds(Protocol):
    """The engine's function from normalised pixels [3, S, S] to patches with positions [T, D]."""

    def embed(self, pixels_CSS: NDArray[np.float32]) -> Any: ...


def decoding_threads() -> int:
    """Number of threads: half of this process's cores, at least one; the other half is for engines."""
    cores = min(len(os.sched_getaffinity(0)), cpu_cores() or math.inf)
    return min(_MAX_THREADS, max(1, int(cores / 2)))


class Decoding:
    """Decodes images in a few threads. A server has one such object.

    All threads together hold no more pixels than the largest image has: each takes up to 12 bytes.
    """

    def __init__(self, limits: ImageLimits, threads: int) -> None:
        self.limits = limits
        self._threads = FairThread("decode", threads)
        self._next, self._changed = threading.Lock(), threading.Condition()
        self._pixels = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> "Decoding":
        limits = ImageLimits(settings.message_limit, settings.max_image_pixels)
        return cls(limits, settings.image_threads or decoding_threads())

    async def run(self, tenant: Tenant, pixels: int, held: int, work: Callable[[], Any]) -> Any:
        """Run work that costs `pixels` and keeps `held` pixels in memory."""
        return await self._threads.run(tenant, pixels, partial(self._in_memory, held, work))

    def _in_memory(self, pixels: int, work: Callable[[], Any]) -> Any:
        # While a large image waits for room, later ones wait behind it, so that it is not starved.
        with self._next, self._changed:
            self._changed.wait_for(lambda: not self._pixels or self._pixels + pixels <= self.limits.max_pixels)
            self._pixels += pixels
        try:
            return work()
        finally:
            with self._changed:
                self._pixels -= pixels
                self._changed.notify()


@dataclass(eq=False)
class Picture:
    """An image of a call. Tasks with the same preparation share the result, which is dropped after the last of `uses`.

    where: the image's field, for messages. pixels: the cost of decoding it.
    """

    image: pb.Image
    where: str
    routing_key: str
    uses: int = 1
    pixels: int = 0
    _header: Header | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _made: dict[ImagePreparation, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> bytes:
        """The content's digest."""
        return hashlib.blake2b(self.image.SerializeToString(deterministic=True), digest_size=16).digest()

    def ByteSize(self) -> int:
        """The message's size."""
        return int(self.image.ByteSize())

    def check(self, spec: ImagePreparation, limits: ImageLimits) -> None:
        """Check everything except the content. Raises INVALID_ARGUMENT."""
        match self.image.WhichOneof("content"):
            case "encoded":
                try:
                    self._header = read_header(self.image.encoded, limits)
                    self.pixels = self._header.pixels
                except ImageError as error:
                    raise self._failure("encoded", str(error)) from None
            case "tensor":
                shape, size = list(self.image.tensor.shape), len(self.image.tensor.data)
                wanted = [3, spec.size, spec.size]
                if shape != wanted:
                    raise self._failure("tensor.shape", f"found {shape[:4]}; allowed: {wanted}")
                if size != 4 * 3 * spec.size**2:
                    allowed = f"{4 * 3 * spec.size**2}, FP32 of shape {wanted}"
                    raise self._failure("tensor.data", f"found {size} bytes; allowed: {allowed}")
                self.pixels = spec.size**2
            case _:
                raise self._failure("content", "found none; allowed: encoded or tensor")

    async def embeds(self, spec: ImagePreparation, tenant: Tenant, engine: Embeds, decoding: Decoding) -> Any:
        """The engine's input for a task. Raises INVALID_ARGUMENT."""
        key = spec.model_copy(update={"pooling": "mean", "augment": ()}) if isinstance(spec, ImageInput) else spec
        # One of the tasks decodes, the others wait for it.
        async with self._lock:
            if key not in self._made:
                try:
                    work = partial(self._make, spec, engine, decoding.limits)
                    held = held_pixels(self._header, spec.size) if self._header else self.pixels
                    self._made[key] = await decoding.run(tenant, self.pixels, held, work)
                except RequestFailedError as failure:
                    self._made[key] = failure
            made = self._made[key]
            self.uses -= 1
            if not self.uses:
                self._made.clear()
        if isinstance(made, RequestFailedError):
            raise made
        return made

    def _make(self, spec: ImagePreparation, engine: Embeds, limits: ImageLimits) -> Any:
        if self.image.WhichOneof("content") == "tensor":
            pixels_CSS = np.frombuffer(self.image.tensor.data, "<f4").reshape(3, spec.size, spec.size)
            # This comparison is false for a NaN too.
            if not (np.abs(pixels_CSS) <= MAX_VALUE).all():
                allowed = f"finite ones, {-MAX_VALUE:g} to {MAX_VALUE:g}"
                raise self._failure("tensor.data", f"found other values than allowed; allowed: {allowed}")
            return engine.embed(pixels_CSS.astype(np.float32))
        try:
            pixels_HWC = decode(self.image.encoded, limits, size=spec.size)
        except ImageError as error:
            raise self._failure("encoded", str(error)) from None
        return engine.embed(prepare(pixels_HWC, spec, _of(spec.mean), _of(spec.std)))

    def _failure(self, name: str, description: str) -> RequestFailedError:
        return invalid_argument([Violation(f"{self.where}.{name}", description)])


def _of(values: Sequence[float] | None) -> Sequence[float]:
    """The mean or std of a served task; it is never None, because the registry sets the backbone's."""
    assert values is not None
    return values
