"""Messages of image requests, and their answers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.client.errors import ServerError, StatusOf

# An encoded image, a path of its file, or a prepared image: a numpy array of float32, [3, size, size].
ImageSource = bytes | Path | Any


@dataclass(frozen=True)
class Classification:
    """The result of one image and one task: the likeliest label and each label's probability, or an error.

    image: the image's index in the request. probabilities: likeliest first.
    """

    image: int
    task_id: str
    label: str = ""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    summary: pb.Summary | None = None
    error: ServerError | None = None

    @classmethod
    def of(cls, found: pb.Classification) -> Self:
        if found.status.code:
            return cls(found.image, found.task_id, error=ServerError(StatusOf(found.status)))
        probabilities = {each.label: each.probability for each in found.probabilities}
        return cls(found.image, found.task_id, found.label, probabilities, found.summary)


def make_image(image: ImageSource) -> pb.Image:
    """The message for one image. Raises OSError for a file that cannot be read."""
    if isinstance(image, bytes | Path):
        return pb.Image(encoded=image if isinstance(image, bytes) else image.read_bytes())
    import numpy as np

    pixels = np.ascontiguousarray(image, "<f4")
    return pb.Image(tensor=pb.ImageTensor(shape=pixels.shape, data=pixels.tobytes()))


def is_image(input: Any) -> bool:
    """Whether an input is an image rather than a text, fields or a chat."""
    return isinstance(input, bytes | Path) or hasattr(input, "tobytes")


def make_classification(
    tasks: str | Iterable[str], images: Iterable[ImageSource], *, uncalibrated: bool = False, routing_key: str = ""
) -> pb.ClassifyRequest:
    """The message for many images, each classified by one or several tasks."""
    return pb.ClassifyRequest(
        task_ids=[tasks] if isinstance(tasks, str) else tasks,
        images=map(make_image, images),
        uncalibrated=uncalibrated,
        routing_key=routing_key,
    )
