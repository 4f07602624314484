"""The reader of ONNX files, on files of its own making and on bytes of anyone's."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlora.errors import BackboneError
from mtlora.vision import prepare
from mtlora.vision.onnx_file import OnnxFile, _model_class


def write(path: Path, *, float16: bool = False) -> np.ndarray:
    """A graph of one product with a weight, behind a constant."""
    model = _model_class()()
    weight = np.arange(6, dtype="<f4").reshape(2, 3)
    model.graph.initializer.add(name="w", dims=[2, 3], data_type=10 if float16 else 1, raw_data=weight.tobytes())
    constant = model.graph.node.add(op_type="Constant", output=["c"], name="constant")
    constant.attribute.add(name="value").t.MergeFromString(
        type(model.graph.initializer[0])(dims=[2], data_type=1, raw_data=weight[0, :2].tobytes()).SerializeToString()
    )
    model.graph.node.add(op_type="MatMul", name="/backbone/x/MatMul", input=["c", "w"], output=["y"])
    path.write_bytes(model.SerializeToString())
    return weight


def test_reads_tensors_and_nodes(tmp_path: Path) -> None:
    weight = write(tmp_path / "m.onnx")
    found = OnnxFile(tmp_path / "m.onnx")
    assert found.tensors.keys() == {"w", "c"}
    assert np.array_equal(found.tensors["w"], weight)
    assert np.array_equal(found.tensors["c"], weight[0, :2])
    assert [(node.op_type, node.inputs) for node in found.nodes] == [("Constant", ()), ("MatMul", ("c", "w"))]


def test_leaves_other_types_out(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", float16=True)
    assert OnnxFile(tmp_path / "m.onnx").tensors.keys() == {"c"}


@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(content)
    try:
        OnnxFile(path)
    except ValueError:
        return


def test_another_model_is_no_backbone(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx")
    with pytest.raises(BackboneError, match=r"m.onnx: not the expected model"):
        prepare._read(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 20)
    with pytest.raises(BackboneError, match=r"not the expected model \(ValueError: .* cannot be read as an ONNX file"):
        prepare._read(tmp_path / "m.onnx")
