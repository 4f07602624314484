"""Classifies images: decoding, scheduler, residency, engine, then the task's head.

Each image is an item of a batch; a call with one image is a batch of one.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from mtlora_pb.v1 import inference_pb2 as pb
from numpy.typing import NDArray

from mtlora.answer.labels import tempered
from mtlora.vision.image_input import ImagePreparation
from server.accounting import Usage
from server.call import Call, current_call
from server.engine import VisionEngine
from server.errors import EngineAbortedError, EngineDeadError, Violation, invalid_argument
from server.job import FinishReason, ImageJob, Lane, ServedTask
from server.registry.residency import Residency
from server.rpc.batch import Batches, Expand, Item
from server.rpc.pictures import Decoding, Picture
from server.scheduling import Admission, Reservation, Scheduler
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from server.rpc.inference_service import InferenceServicer

# Most items of one call: its images times its tasks.
MAX_CLASSIFIED = 256


@dataclass(eq=False)
class Classification:
    """Runs a job once, then holds the labels' probabilities. Times are seconds since the request was received.

    probabilities: (label, probability) of every label, likeliest first.
    """

    job: ImageJob
    call: Call
    metrics: Metrics
    picture: Picture
    decoding: Decoding
    calibrated: bool = True
    probabilities: Sequence[tuple[str, float]] = ()
    finish_reason: FinishReason = "stop"
    queue_s: float = 0.0
    total_s: float = 0.0

    async def run(
        self, engine: VisionEngine, scheduler: Scheduler, residency: Residency, *, reserved: Reservation | None = None
    ) -> None:
        """Decode the image, wait for the job's turn and its adapter version, then ask the engine.

        The caller must hold the version. Raises AdapterError if it cannot be loaded, INVALID_ARGUMENT if the image
        cannot be decoded.
        """
        job, call = self.job, self.call
        spec = job.task.spec.image
        assert spec is not None
        try:
            began = time.monotonic()
            embeds_TD = await self.picture.embeds(spec, call.tenant, engine, self.decoding)
            self.metrics.image_decode.observe(time.monotonic() - began)
            async with scheduler.turn(call.tenant, job, call.deadline, reserved) as turn:
                if call.trace:
                    call.trace.submitted(job)
                async with residency.lease(job.task.version, turn.aside):
                    self.queue_s = time.monotonic() - call.received
                    self.metrics.observe_queue(self.queue_s, call.exemplar)
                    if call.trace:
                        call.trace.scheduled(time.monotonic())
                    turn.submitted()
                    call.sequences += 1
                    call.prompt_tokens += len(job.prompt_ids)
                    feature_F = await engine.encode(embeds_TD, job.task.slot)
                    now = time.monotonic()
                    turn.served(0, now)
            self._answer(feature_F)
        except BaseException as error:
            call.failed(job, error)
            raise
        self.total_s = now - call.received
        self.metrics.observe_e2e(call.tenant.id, self.total_s, call.exemplar)
        if call.trace:
            call.trace.step(0, now)
            call.trace.answered(self.finish_reason, 0, 0)
        if call.genai:
            call.genai.answered(job, 0, self.total_s, self.total_s)

    @property
    def answer(self) -> str:
        """The likeliest label."""
        return self.probabilities[0][0]

    def _answer(self, feature_F: Any) -> None:
        task = self.job.task
        head = task.version.heads[task.spec.id]
        logits = head.logits(feature_F)
        if not all(map(math.isfinite, logits)):
            raise EngineAbortedError("the image's logits are not finite")
        found = tempered(logits, (self.calibrated and task.calibration) or 1.0)
        self.probabilities = sorted(zip(task.spec.labels or (), found, strict=True), key=lambda each: -each[1])


ImageItem = Item[Picture, Classification]


@dataclass(frozen=True)
class ImageBackend:
    """What answers images: the engine that runs, and the versions in it."""

    engine: VisionEngine
    residency: Residency


class Classifier:
    """Runs batches of images, like InferenceServicer for texts.

    Each engine that starts sets `backend`. position_cost: see ImageJob.
    """

    backend: ImageBackend | None = None

    def __init__(
        self,
        service: "InferenceServicer",
        admission: Admission,
        scheduler: Scheduler,
        usage: Usage,
        metrics: Metrics,
        decoding: Decoding,
        position_cost: float,
    ) -> None:
        self._service = service
        self._scheduler = scheduler
        self._metrics = metrics
        self._decoding = decoding
        self._position_cost = position_cost
        self.batches = Batches(self, admission, scheduler, usage, metrics, Lane.IMAGES)

    def items(self, request: pb.ClassifyRequest) -> list[ImageItem]:
        """An item for every task of every image; each counts as its own call in usage, metrics and log.

        Raises INVALID_ARGUMENT or NOT_FOUND.
        """
        count = len(request.task_ids) * len(request.images)
        if not 1 <= count <= MAX_CLASSIFIED:
            found = f"found {len(request.task_ids)} task_ids and {len(request.images)} images"
            raise invalid_argument(
                [Violation("images", f"{found}; allowed: tasks times images, 1 to {MAX_CLASSIFIED}")]
            )
        tasks = [self._task(task_id, f"task_ids[{i}]") for i, task_id in enumerate(request.task_ids)]
        pictures = [
            Picture(image, f"images[{i}]", request.routing_key, len(tasks)) for i, image in enumerate(request.images)
        ]
        return self.of([(task, picture) for picture in pictures for task in tasks], "ClassifyItem")

    def of(self, asked: Sequence[tuple[ServedTask, Picture]], method: str) -> list[ImageItem]:
        """Items of the current call."""
        call, items = current_call.get(), list[ImageItem]()
        for index, (task, picture) in enumerate(asked):
            own = call.item(index, method)
            own.task = task.spec.id
            items.append(Item(picture, task, own, 1, index))
        return items

    def _task(self, task_id: str, where: str) -> ServedTask:
        task = self._service.task(task_id)
        if task.spec.image is None:
            found = f"found {task_id!r}, a task of texts; allowed: tasks of images (Generate asks tasks of texts)"
            raise invalid_argument([Violation(where, found)])
        return task

    # Methods for the images of text tasks.

    def running(self) -> ImageBackend:
        """The backend. Raises EngineDeadError before the first engine has started."""
        if self.backend is None:
            raise EngineDeadError
        return self.backend

    def check(self, picture: Picture, preparation: ImagePreparation) -> None:
        """Check everything of an image except its content. Raises INVALID_ARGUMENT."""
        picture.check(preparation, self._decoding.limits)

    async def states(
        self, picture: Picture, preparation: ImagePreparation, task: ServedTask, call: Call
    ) -> NDArray[np.float32]:
        """All states [T, D] of an image from the backbone alone; waits for a turn of its engine.

        Raises INVALID_ARGUMENT for an image that cannot be decoded, and EngineDeadError.
        """
        engine, began = self.running().engine, time.monotonic()
        embeds_TD = await picture.embeds(preparation, call.tenant, engine, self._decoding)
        self._metrics.image_decode.observe(time.monotonic() - began)
        job = ImageJob(task, range(engine.positions(preparation.size)), self._position_cost)
        # Charge no quota here: quotas count the soft tokens in the prompt; the image's own positions count only in the
        # fair queue.
        async with self._scheduler.turn(call.tenant, job, call.deadline, Reservation(0)) as turn:
            turn.submitted()
            states_TD = await engine.states(embeds_TD)
            turn.served(0, time.monotonic())
        return states_TD

    # Methods for Batches.

    @contextmanager
    def version_for(self, picture: Picture, task: ServedTask | None, *, prefetch: bool = True) -> Iterator[ServedTask]:
        """See the Inference service."""
        assert task is not None
        catalog = self._service.catalog
        if task.spec.id in catalog.splits:
            key = picture.routing_key.encode() or picture.digest
            task = catalog.choose(task, key)
        with self.running().residency.hold(task.version):
            if prefetch:
                self.running().residency.prefetch(task.version)
            yield task

    async def generation(
        self, picture: Picture, task: ServedTask | None, _: int, *, call: Call, **beside: Any
    ) -> Classification:
        """A valid image, ready to run. Raises INVALID_ARGUMENT."""
        engine = self.running().engine
        assert task is not None
        assert task.spec.image is not None
        picture.check(task.spec.image, self._decoding.limits)
        job = ImageJob(task, range(engine.positions(task.spec.image.size)), self._position_cost)
        return Classification(job, call, self._metrics, picture, self._decoding)


def classifying(*, calibrated: bool) -> Expand[Classification]:
    """The function that makes an item's classification, with or without its task's temperature."""

    def expand(first: Classification) -> list[Classification]:
        first.calibrated = calibrated
        return [first]

    return expand
