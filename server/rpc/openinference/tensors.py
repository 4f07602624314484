"""Converts tensors (typed or raw contents) to texts and images, and answers to tensors."""

import math
import struct
from collections.abc import Iterator, Sequence

from mtlora_pb.v1 import inference_pb2 as native
from openinference_pb import grpc_predict_v2_pb2 as pb

from mtlora.task import TaskSpec
from server.errors import Violation

# Most elements of one request; each becomes a sequence in the engine.
MAX_BATCH = 64
TEXT_INPUT = "text_input"
TEXT_OUTPUT = "text_output"
# Outputs of label tasks: the likeliest label, all probabilities, and the labels in the same order.
LABEL_OUTPUT, PROBABILITIES_OUTPUT, LABELS_OUTPUT = "label", "probabilities", "labels"
# Input of image tasks: encoded images as BYTES [n], or prepared ones as FP32 [n, 3, size, size].
IMAGE_INPUT = "image"


_MAX_SIDE = 1024
_TWICE = "contents: found some beside raw_input_contents; allowed: one of the two"


class TensorError(Exception):
    """Invalid tensors; holds every violation."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__(violations[0].description)
        self.violations = list(violations)


def input_names(task: TaskSpec) -> tuple[str, ...]:
    """The names of a task's input tensors."""
    if task.image is not None:
        return (IMAGE_INPUT,)
    return (TEXT_INPUT,) if len(task.fields) == 1 else task.fields


def output_names(task: TaskSpec) -> tuple[str, ...]:
    """The names of a task's output tensors."""
    if task.image is not None:
        return (LABEL_OUTPUT, PROBABILITIES_OUTPUT, LABELS_OUTPUT)
    return (TEXT_OUTPUT, LABEL_OUTPUT, PROBABILITIES_OUTPUT, LABELS_OUTPUT) if task.labels else (TEXT_OUTPUT,)


def wanted(request: pb.ModelInferRequest, task: TaskSpec) -> Sequence[str]:
    """The output tensors that a request wants.

    If a request for a text task names none, only the text is returned: other outputs need scores, which allow no
    sampling parameters.
    """
    if names := [tensor.name for tensor in request.outputs]:
        return names
    return output_names(task) if task.image is not None else (TEXT_OUTPUT,)


def scored(request: pb.ModelInferRequest) -> bool:
    """Whether a requested output needs the labels' probabilities."""
    return any(tensor.name in (LABEL_OUTPUT, PROBABILITIES_OUTPUT, LABELS_OUTPUT) for tensor in request.outputs)


def read_texts(
    request: pb.ModelInferRequest, names: Sequence[str], outputs: Sequence[str] = (TEXT_OUTPUT,)
) -> dict[str, list[str]]:
    """The texts of every input tensor, all of one shape. `outputs` may be asked for. Raises TensorError."""
    raw = _check_tensors(request, names, outputs)
    violations: list[Violation] = []
    texts: dict[str, list[str]] = {}
    for index, tensor in enumerate(request.inputs):
        try:
            texts[tensor.name] = _texts(tensor, raw[index] if raw else None)
        except ValueError as error:
            violations.append(Violation(f"inputs[{index}]", str(error)))
    if not violations and len({tuple(tensor.shape) for tensor in request.inputs}) > 1:
        violations.append(Violation("inputs", "found several shapes; allowed: the same for all"))
    if violations:
        raise TensorError(violations)
    return texts


def read_images(request: pb.ModelInferRequest, outputs: Sequence[str]) -> list[native.Image]:
    """The images of the input tensor. `outputs` may be asked for. Raises TensorError."""
    raw = _check_tensors(request, (IMAGE_INPUT,), outputs)
    tensor = request.inputs[0]
    try:
        if tensor.datatype == "FP32":
            return _prepared(tensor, raw[0] if raw else None)
        return [native.Image(encoded=each) for each in _elements(tensor, raw[0] if raw else None, "BYTES or FP32")]
    except ValueError as error:
        raise TensorError([Violation("inputs[0]", str(error))]) from None


def _prepared(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> list[native.Image]:
    shape = list(tensor.shape)
    if len(shape) != 4 or not 1 <= shape[0] <= MAX_BATCH or any(not 1 <= side <= _MAX_SIDE for side in shape[1:]):
        raise ValueError(f"shape: found {shape[:5]}; allowed: [n, 3, size, size], n from 1 to {MAX_BATCH}")
    if raw is not None and tensor.contents.ByteSize():
        raise ValueError(_TWICE)
    values = (
        raw
        if raw is not None
        else struct.pack(f"<{len(tensor.contents.fp32_contents)}f", *tensor.contents.fp32_contents)
    )
    size = 4 * math.prod(shape[1:])
    if len(values) != shape[0] * size:
        raise ValueError(f"found {len(values) / 4:g} elements in a tensor of shape {shape}")
    return [
        native.Image(tensor=native.ImageTensor(shape=shape[1:], data=values[at : at + size]))
        for at in range(0, len(values), size)
    ]


def write_texts(
    response: pb.ModelInferResponse, name: str, texts: Sequence[str], shape: Sequence[int], *, raw: bool
) -> None:
    """Add an output tensor of texts, in the form (typed or raw) of the inputs."""
    tensor = response.outputs.add(name=name, datatype="BYTES", shape=shape)
    elements = [text.encode() for text in texts]
    if raw:
        response.raw_output_contents.append(b"".join(struct.pack("<I", len(each)) + each for each in elements))
    else:
        tensor.contents.bytes_contents.extend(elements)


def write_numbers(response: pb.ModelInferResponse, name: str, rows: Sequence[Sequence[float]], *, raw: bool) -> None:
    """Add an output tensor of FP32, a row for each element, in the form of the inputs."""
    tensor = response.outputs.add(name=name, datatype="FP32", shape=[len(rows), len(rows[0])])
    numbers = [number for row in rows for number in row]
    if raw:
        response.raw_output_contents.append(struct.pack(f"<{len(numbers)}f", *numbers))
    else:
        tensor.contents.fp32_contents.extend(numbers)


def _check_tensors(request: pb.ModelInferRequest, names: Sequence[str], outputs: Sequence[str]) -> Sequence[bytes]:
    """The raw contents of the input tensors, if there are any. Raises TensorError for wrong names."""
    violations = list(_name_violations(request, names, outputs))
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        violations.append(Violation("raw_input_contents", f"found {len(raw)}; allowed: one for each of the inputs"))
    if violations:
        raise TensorError(violations)
    return raw


def _name_violations(
    request: pb.ModelInferRequest, names: Sequence[str], outputs: Sequence[str]
) -> Iterator[Violation]:
    found = [tensor.name for tensor in request.inputs]
    if sorted(found) != sorted(names):
        yield Violation("inputs", f"found {_shown(found)}; allowed: {', '.join(names)}, once each")
    wanted = [tensor.name for tensor in request.outputs]
    if any(name not in outputs for name in wanted) or len(set(wanted)) < len(wanted):
        once = ", once each" if len(outputs) > 1 else ""
        yield Violation("outputs", f"found {_shown(wanted)}; allowed: {', '.join(outputs)}{once}")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:32]) for name in names[:4]) or "none"


def _texts(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> list[str]:
    try:
        return [element.decode() for element in _elements(tensor, raw, "BYTES")]
    except UnicodeDecodeError:
        raise ValueError("found bytes that are no UTF-8; allowed: texts") from None


def _elements(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, allowed: str) -> list[bytes]:
    """The elements of a tensor of bytes."""
    if tensor.datatype != "BYTES":
        raise ValueError(f"datatype: found {tensor.datatype[:16]!r}; allowed: {allowed}")
    shape = list(tensor.shape)
    if len(shape) not in (1, 2) or not 1 <= shape[0] <= MAX_BATCH or shape[1:] not in ([], [1]):
        raise ValueError(f"shape: found {shape[:4]}; allowed: [n] or [n, 1], n from 1 to {MAX_BATCH}")
    if raw is not None and tensor.contents.ByteSize():
        raise ValueError(_TWICE)
    elements = list(tensor.contents.bytes_contents) if raw is None else _split(raw)
    if len(elements) != shape[0]:
        raise ValueError(f"found {len(elements)} elements in a tensor of shape {shape}")
    return elements


def _split(raw: bytes) -> list[bytes]:
    elements, at = [], 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise ValueError("raw contents end inside an element's length")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + length > len(raw):
            raise ValueError(f"raw contents end inside an element of {length} bytes")
        elements.append(raw[at : at + length])
        at += length
    return elements
