"""Tensors and nodes of an ONNX file, read by protobuf's runtime: the few messages of ONNX's schema that name them.

Field numbers are those of onnx/onnx.proto (IR version 3 and later); fields that are not here are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_FLOAT = 1
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Tensor": {"dims": (1, "int64*"), "data_type": (2, "int32"), "name": (8, "string"), "raw_data": (9, "bytes")},
    "Attribute": {"name": (1, "string"), "t": (5, "Tensor")},
    "Node": {
        "input": (1, "string*"), "output": (2, "string*"), "name": (3, "string"), "op_type": (4, "string"),
        "attribute": (5, "Attribute*"),
    },
    "Dimension": {"dim_value": (1, "int64"), "dim_param": (2, "string")},
    "Shape": {"dim": (1, "Dimension*")},
    "TensorType": {"elem_type": (1, "int32"), "shape": (2, "Shape")},
    "Type": {"tensor_type": (1, "TensorType")},
    "Value": {"name": (1, "string"), "type": (2, "Type")},
    "Graph": {
        "node": (1, "Node*"), "initializer": (5, "Tensor*"), "input": (11, "Value*"), "output": (12, "Value*"),
    },
    "Model": {"graph": (7, "Graph")},
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """An operator: its name, and the names of its inputs."""

    name: str
    op_type: str
    inputs: tuple[str, ...]


class OnnxFile:
    """float32 tensors by name, initialisers and constants alike, and the nodes in order. Raises ValueError."""

    def __init__(self, path: Path) -> None:
        model = read_model(path)
        self.tensors = {name: _array(tensor) for name, tensor in _tensors(model.graph) if tensor.data_type == _FLOAT}
        self.nodes = [Node(node.name, node.op_type, tuple(node.input)) for node in model.graph.node]


def read_model(path: Path) -> Any:
    """ONNX's outermost message. Raises ValueError."""
    from google.protobuf.message import DecodeError

    model = _model_class()()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: cannot be read as an ONNX file: {error}") from None
    return model


def _tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value")


def _array(tensor: Any) -> np.ndarray:
    return np.frombuffer(tensor.raw_data, dtype="<f4").reshape(tuple(tensor.dims))


@cache
def _model_class() -> Any:
    """The class of ONNX's outermost message."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="mtlora/onnx.proto", package="mtlora.onnx", syntax="proto3")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, type_name) in fields.items():
            scalar = type_name.rstrip("*")
            described.field.add(
                name=name,
                number=number,
                label=kind.LABEL_REPEATED if type_name.endswith("*") else kind.LABEL_OPTIONAL,
                type=kind.TYPE_MESSAGE if scalar in _MESSAGES else getattr(kind, f"TYPE_{scalar.upper()}"),
                type_name=f".mtlora.onnx.{scalar}" if scalar in _MESSAGES else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("mtlora.onnx.Model"))
