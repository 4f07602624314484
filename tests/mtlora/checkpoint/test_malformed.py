"""A damaged checkpoint is refused by name: file, tensor or field, what was expected and what was found."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save

from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE, CheckpointError
from mtlora.checkpoint.read import read_checkpoint, read_manifest
from mtlora.errors import MtLoRAError
from tests.factories import (
    IDENTITY,
    edit_header,
    random_tensors,
    replace_tensors,
    split_tensors,
    write_random,
    write_random_images,
    write_random_pictures,
)
from tests.mtlora.checkpoint.damage import (
    NAMED,
    Damage,
    gap,
    header_bytes,
    header_set,
    huge_and_consistent,
    linked_outside,
    linked_outside_in_two_steps,
    manifest_bytes,
    manifest_drop,
    manifest_set,
    manifest_text,
    overlapping,
    replaced_by,
    sparse,
    tensor_set,
    tensor_value,
    tensors_cut,
)

MALFORMED: dict[str, tuple[Damage, list[str]]] = {
    # The manifest as a file.
    "manifest missing": (replaced_by(MANIFEST_FILE, lambda path: None), [MANIFEST_FILE, "No such file"]),
    "manifest empty": (manifest_bytes(b""), [MANIFEST_FILE, "cannot be read as JSON"]),
    "manifest cut in half": (
        manifest_bytes(b'{"format_version": 1, "backbo'),
        [MANIFEST_FILE, "cannot be read as JSON"],
    ),
    "manifest with trailing text": (manifest_bytes(b"{} {}"), [MANIFEST_FILE, "Extra data"]),
    "manifest with single quotes": (
        manifest_bytes(b"{'format_version': 1}"),
        [MANIFEST_FILE, "cannot be read as JSON"],
    ),
    "manifest of null bytes": (manifest_bytes(bytes(100)), [MANIFEST_FILE, "cannot be read as JSON"]),
    "manifest an array": (manifest_bytes(b"[1]"), [MANIFEST_FILE, "expected a JSON object, found list"]),
    "manifest a number": (manifest_bytes(b"1"), [MANIFEST_FILE, "expected a JSON object, found int"]),
    "manifest null": (manifest_bytes(b"null"), [MANIFEST_FILE, "expected a JSON object, found NoneType"]),
    "manifest in Latin-1": (manifest_bytes('{"ä": 1}'.encode("latin-1")), [MANIFEST_FILE, "cannot be read as UTF-8"]),
    "manifest in UTF-16": (manifest_bytes('{"a": 1}'.encode("utf-16")), [MANIFEST_FILE, "cannot be read as UTF-8"]),
    "manifest with a byte order mark": (manifest_bytes(b"\xef\xbb\xbf{}"), [MANIFEST_FILE, "BOM"]),
    "manifest nested deeply": (
        manifest_bytes(b'{"a":' + b"[" * 200_000),
        [MANIFEST_FILE, "cannot be read as JSON", "recursion"],
    ),
    "manifest nested deeply in a free field": (
        manifest_text('"training": {', '"training": {"a": ' + "[" * 500 + "]" * 500 + ", "),
        [MANIFEST_FILE, "recursion"],
    ),
    "manifest too large": (
        lambda f: os.truncate(f / MANIFEST_FILE, 1 << 40),
        [MANIFEST_FILE, "at most 16777216 bytes"],
    ),
    "manifest a folder": (replaced_by(MANIFEST_FILE, Path.mkdir), [MANIFEST_FILE, "regular file, found a folder"]),
    "manifest a pipe": (replaced_by(MANIFEST_FILE, os.mkfifo), [MANIFEST_FILE, "regular file, found a special file"]),
    "manifest a dangling link": (
        replaced_by(MANIFEST_FILE, lambda path: path.symlink_to("nothing")),
        [MANIFEST_FILE, "No such file"],
    ),
    "manifest a link to itself": (
        replaced_by(MANIFEST_FILE, lambda path: path.symlink_to(path.name)),
        [MANIFEST_FILE, "symbolic links"],
    ),
    "manifest a device": (
        replaced_by(MANIFEST_FILE, lambda path: path.symlink_to("/dev/zero")),
        [MANIFEST_FILE, "inside", "/dev/zero"],
    ),
    "manifest linked outside": (
        linked_outside(MANIFEST_FILE),
        [MANIFEST_FILE, "inside the checkpoint's folder", "outside"],
    ),
    # The manifest as JSON.
    "duplicate key": (
        manifest_text('"config":', '"training": {}, "config":'),
        [MANIFEST_FILE, "duplicate key 'training'"],
    ),
    "duplicate key deep inside": (manifest_text('"r": 2', '"r": 2, "r": 3'), [MANIFEST_FILE, "duplicate key 'r'"]),
    "duplicate key after many": (
        manifest_text(
            '"training": {', '"training": {' + "".join(f'"{i}": 0, ' for i in range(100_000)) + '"99999": 1, '
        ),
        [MANIFEST_FILE, "duplicate key '99999'"],
    ),
    "NaN": (manifest_text('"lora_alpha": 4.0', '"lora_alpha": NaN'), [MANIFEST_FILE, "NaN is not JSON"]),
    "infinity": (manifest_text('"seed": 0', '"seed": -Infinity'), [MANIFEST_FILE, "-Infinity is not JSON"]),
    "a number beyond floats": (manifest_text('"seed": 0', '"seed": 1e999'), [MANIFEST_FILE, "1e999 is out of range"]),
    "an endless integer": (manifest_text('"r": 2', '"r": ' + "9" * 10_000), [MANIFEST_FILE, "digits"]),
    "half a surrogate pair": (manifest_text('"Task 0."', '"\\ud800"'), [MANIFEST_FILE, "hex escape"]),
    # The manifest's fields.
    "version missing": (manifest_drop("format_version"), ["format_version: expected 1 or 2, found none"]),
    "version 0": (manifest_set("format_version", to=0), ["format_version: expected 1 or 2, found 0"]),
    "version 2": (manifest_set("format_version", to=2), ["format_version: expected 1, found 2"]),
    "version a string": (manifest_set("format_version", to="1"), ["format_version: expected 1 or 2, found '1'"]),
    "version true": (manifest_set("format_version", to=True), ["format_version: expected 1 or 2, found True"]),
    "version a float": (manifest_set("format_version", to=1.0), ["format_version: expected 1 or 2, found 1.0"]),
    "version null": (manifest_set("format_version", to=None), ["format_version: expected 1 or 2, found None"]),
    "backbone missing": (manifest_drop("backbone"), ["backbone: Field required"]),
    "config missing": (manifest_drop("config"), ["config: Field required"]),
    "tasks missing": (manifest_drop("tasks"), ["tasks: Field required"]),
    "sha256 missing": (manifest_drop("tensors_sha256"), ["tensors_sha256: Field required"]),
    "unknown field": (manifest_set("extra", to=1), ["extra: Extra inputs are not permitted", "found 1"]),
    "unknown config field": (manifest_set("config", "rank", to=2), ["config.rank", "not permitted"]),
    "unknown backbone field": (manifest_set("backbone", "name", to="x"), ["backbone.name", "not permitted"]),
    "unknown task field": (manifest_set("tasks", 1, "weight", to=1), ["tasks.1.weight", "not permitted"]),
    "r of 0": (manifest_set("config", "r", to=0), ["config.r", "greater than or equal to 1", "found 0"]),
    "r true": (manifest_set("config", "r", to=True), ["config.r", "valid integer", "found True"]),
    "r a string": (manifest_set("config", "r", to="2"), ["config.r", "valid integer", "found '2'"]),
    "r enormous": (manifest_set("config", "r", to=10**30), ["config.r", "less than or equal to 512"]),
    "alpha negative": (
        manifest_set("config", "lora_alpha", to=-1),
        ["config.lora_alpha", "greater than 0", "found -1"],
    ),
    "unknown blocks": (manifest_set("config", "blocks", to="mlp"), ["config.blocks", "'ffn'", "found 'mlp'"]),
    "groups that do not divide": (manifest_set("config", "num_groups", to=3), ["num_groups 3", "hidden size 8"]),
    "one expert with task bias": (manifest_set("config", "num_experts", to=1), ["config", "num_experts > 1"]),
    "layers without number": (manifest_set("backbone", "num_layers", to=10**18), ["backbone.num_layers", "4096"]),
    "hidden size enormous": (manifest_set("backbone", "hidden_size", to=1 << 40), ["backbone.hidden_size", "1048576"]),
    "fingerprint no digest": (
        manifest_set("backbone", "weights_fingerprint", to="x"),
        ["weights_fingerprint", "found 'x'"],
    ),
    "sha256 no digest": (manifest_set("tensors_sha256", to="AB" * 32), ["tensors_sha256", "match pattern"]),
    "training no object": (manifest_set("training", to=[1]), ["training", "object", "found [1]"]),
    # The task table.
    "task table empty": (manifest_set("tasks", to=[]), ["tasks", "at least 1 item"]),
    "task table an object": (manifest_set("tasks", to={}), ["tasks", "valid"]),
    "task null": (manifest_set("tasks", 0, to=None), ["tasks.0", "found None"]),
    "task id duplicate": (manifest_set("tasks", 2, "id", to="task-0"), ["tasks: id", "'task-0' twice"]),
    "task id unicode": (manifest_set("tasks", 0, "id", to="tâche"), ["tasks.0.id", "match pattern", "found 'tâche'"]),
    "task id a path": (manifest_set("tasks", 0, "id", to="../x"), ["tasks.0.id", "match pattern"]),
    "task id with a line feed": (manifest_set("tasks", 0, "id", to="a\n"), ["tasks.0.id", "match pattern"]),
    "bias index missing": (
        manifest_drop("tasks", 1, "bias_index"),
        ["tasks: bias_index: expected 0 to 2", "[2, None, 0]"],
    ),
    "bias index null": (manifest_set("tasks", 0, "bias_index", to=None), ["bias_index: expected 0 to 2", "None, 1, 0"]),
    "bias index duplicate": (
        manifest_set("tasks", 0, "bias_index", to=1),
        ["bias_index: expected 0 to 2", "[1, 1, 0]"],
    ),
    "bias index out of range": (
        manifest_set("tasks", 0, "bias_index", to=3),
        ["bias_index: expected 0 to 2", "[3, 1, 0]"],
    ),
    "bias index negative": (manifest_set("tasks", 0, "bias_index", to=-1), ["tasks.0.bias_index", "found -1"]),
    "bias index true": (manifest_set("tasks", 1, "bias_index", to=True), ["tasks.1.bias_index", "found True"]),
    "bias index without bias": (
        manifest_set("config", "task_bias", to=False),
        ["bias_index: expected null", "[2, 1, 0]"],
    ),
    "template with an attribute": (
        manifest_set("tasks", 0, "template", to="{input.__class__}"),
        ["tasks.0.template", "{input.__class__}"],
    ),
    "template with a conversion": (
        manifest_set("tasks", 0, "template", to="{input!r}"),
        ["tasks.0.template", "plain name"],
    ),
    "template unbalanced": (manifest_set("tasks", 0, "template", to="{input"), ["tasks.0.template", "'{input'"]),
    "template without field": (manifest_set("tasks", 0, "template", to="hello"), ["tasks.0.template", "no field"]),
    "stop empty": (manifest_set("tasks", 0, "stop", to=[""]), ["tasks.0.stop.0", "at least 1 character"]),
    "stop a string": (manifest_set("tasks", 0, "stop", to="\n"), ["tasks.0.stop", "valid"]),
    "stop inside an answer": (
        manifest_set("tasks", 0, "allowed_answers", to=["a\nb", "c"]),
        ["tasks.0", "'a\\nb' contains the stop string '\\n'"],
    ),
    "max_new_tokens of 0": (manifest_set("tasks", 0, "max_new_tokens", to=0), ["tasks.0.max_new_tokens", "found 0"]),
    # The tensor file as a file.
    "tensors missing": (replaced_by(TENSORS_FILE, lambda path: None), [TENSORS_FILE, "No such file"]),
    "tensors a folder": (replaced_by(TENSORS_FILE, Path.mkdir), [TENSORS_FILE, "regular file, found a folder"]),
    "tensors a pipe": (replaced_by(TENSORS_FILE, os.mkfifo), [TENSORS_FILE, "regular file, found a special file"]),
    "tensors linked outside": (linked_outside(TENSORS_FILE), [TENSORS_FILE, "inside the checkpoint's folder"]),
    "tensors linked outside in two steps": (
        linked_outside_in_two_steps,
        [TENSORS_FILE, "inside the checkpoint's folder"],
    ),
    "tensors empty": (tensors_cut(keep=lambda h, n: 0), [TENSORS_FILE, "truncated: expected 8 bytes", "found 0"]),
    "tensors cut in the size": (tensors_cut(keep=lambda h, n: 5), [TENSORS_FILE, "truncated: expected 8", "found 5"]),
    "tensors cut after the size": (tensors_cut(keep=lambda h, n: 8), [TENSORS_FILE, "bytes of header, found 0"]),
    "tensors cut in the header": (tensors_cut(keep=lambda h, n: h), [TENSORS_FILE, "truncated", "bytes of header"]),
    "tensors cut after the header": (tensors_cut(keep=lambda h, n: 8 + h), [TENSORS_FILE, "bytes of tensors, found 0"]),
    "tensors cut in the data": (tensors_cut(keep=lambda h, n: n // 2), [TENSORS_FILE, "truncated", "bytes of tensors"]),
    "tensors one byte short": (
        tensors_cut(keep=lambda h, n: n - 1),
        [TENSORS_FILE, "expected 1040 bytes", "found 1039"],
    ),
    "tensors one byte long": (
        lambda f: replace_tensors(f, (f / TENSORS_FILE).read_bytes() + b"x"),
        ["expected 1040 bytes", "found 1041"],
    ),
    "tensors sparse": (sparse(1 << 40), [TENSORS_FILE, "expected 1040 bytes of tensors"]),
    "tensors consistent but huge": (huge_and_consistent, [TENSORS_FILE, "at most 4294967296 bytes"]),
    "tensors a torch file": (
        lambda f: torch.save(random_tensors(), f / TENSORS_FILE),
        [TENSORS_FILE, "header: expected at most"],
    ),
    "tensors of another checkpoint": (
        lambda f: (f / TENSORS_FILE).write_bytes(save(random_tensors(seed=1))),
        [TENSORS_FILE, "sha256: expected", "found"],
    ),
    "sha256 of another file": (manifest_set("tensors_sha256", to="0" * 64), [TENSORS_FILE, "sha256: expected 000"]),
    # The header.
    "header bomb": (
        lambda f: replace_tensors(f, (1 << 62).to_bytes(8, "little") + b"{}"),
        [TENSORS_FILE, "header: expected at most 8388608 bytes, found 4611686018427387904"],
    ),
    "header longer than the file": (
        lambda f: replace_tensors(f, (1 << 20).to_bytes(8, "little") + b"{}"),
        ["expected 1048576 bytes of header, found 2"],
    ),
    "header no JSON": (header_bytes(b"{nothing}"), [TENSORS_FILE, "cannot be read as JSON"]),
    "header not UTF-8": (header_bytes(b'{"\xff": 1}'), [TENSORS_FILE, "cannot be read as UTF-8"]),
    "header an array": (header_bytes(b"[]"), [TENSORS_FILE, "expected a JSON object, found list"]),
    "header nested deeply": (
        header_bytes(b'{"a":' + b"[" * 200_000),
        [TENSORS_FILE, "cannot be read as JSON", "recursion"],
    ),
    "header empty": (header_bytes(b"{}"), [TENSORS_FILE, "tensor layers.0.mlp.lora_A", "(and 7 more)"]),
    "header with a duplicate tensor": (
        lambda f: header_bytes(json.dumps(split_tensors(f)[0]).replace("{", f'{{"{NAMED}": 1, ', 1).encode())(f),
        [TENSORS_FILE, f"duplicate key '{NAMED}'"],
    ),
    "entry null": (
        lambda f: edit_header(f, lambda h: h.update({NAMED: None})),
        [NAMED, "expected dtype", "found None"],
    ),
    "entry without offsets": (
        lambda f: edit_header(f, lambda h: h[NAMED].pop("data_offsets")),
        [NAMED, "data_offsets"],
    ),
    "dtype unknown": (header_set("dtype", "F128"), [NAMED, "expected dtype F32 or F16 or BF16, found 'F128'"]),
    "dtype a number": (header_set("dtype", 7), [NAMED, "expected dtype", "found 7"]),
    "dtype of another size": (header_set("dtype", "F16"), [NAMED, "data_offsets: expected 96 bytes"]),
    "shape a string": (header_set("shape", "3x8x2"), [NAMED, "expected shape [3, 8, 2], found '3x8x2'"]),
    "shape negative": (header_set("shape", [-3, -8, 2]), [NAMED, "expected shape [3, 8, 2], found [-3, -8, 2]"]),
    "offsets null": (header_set("data_offsets", None), [NAMED, "data_offsets: expected two integers, found None"]),
    "offsets floats": (header_set("data_offsets", [0.0, 192.0]), [NAMED, "expected two integers, found [0.0, 192.0]"]),
    "offsets reversed": (header_set("data_offsets", [192, 0]), [NAMED, "data_offsets: expected 192 bytes"]),
    "offsets negative": (header_set("data_offsets", [-192, 0]), [NAMED, "expected to begin at 0, found -192"]),
    "offsets beyond the file": (
        header_set("data_offsets", [10**20, 10**20 + 192]),
        ["lora_route: data_offsets: expected to begin at 64, found 256"],
    ),
    "offsets overlap": (overlapping, [TENSORS_FILE, "lora_B", "data_offsets: expected to begin at"]),
    "offsets leave a gap": (gap, [TENSORS_FILE, "expected to begin at 0, found 4"]),
    # The tensors.
    "tensor missing": (tensor_set(NAMED, None), [TENSORS_FILE, NAMED, "expected by the config, found none"]),
    "tensor too many": (
        tensor_set("layers.2.mlp.lora_A", torch.zeros(2, 8)),
        ["'layers.2.mlp.lora_A'", "has no such part"],
    ),
    "tensor name with control characters": (
        tensor_set("\x1b[31m\n", torch.zeros(1)),
        [r"'\x1b[31m\n'", "has no such part"],
    ),
    "shape transposed": (tensor_set(NAMED, torch.zeros(3, 2, 8)), [NAMED, "expected shape [3, 8, 2], found [3, 2, 8]"]),
    "shape of another rank": (
        tensor_set(NAMED, torch.zeros(3, 8, 4)),
        [NAMED, "expected shape [3, 8, 2], found [3, 8, 4]"],
    ),
    "shape empty": (tensor_set(NAMED, torch.zeros(0)), [NAMED, "expected shape [3, 8, 2], found [0]"]),
    "task bias of fewer tasks": (
        tensor_set("layers.1.mlp.task_bias", torch.zeros(2, 2, 3)),
        ["layers.1.mlp.task_bias", "[3, 2, 3], found [2, 2, 3]"],
    ),
    "dtype int8": (tensor_set(NAMED, torch.zeros(3, 8, 2).to(torch.int8)), [NAMED, "expected dtype", "found 'I8'"]),
    "dtype float64": (tensor_set(NAMED, torch.zeros(3, 8, 2).double()), [NAMED, "expected dtype", "found 'F64'"]),
    "dtype bool": (tensor_set(NAMED, torch.zeros(3, 8, 2).bool()), [NAMED, "expected dtype", "found 'BOOL'"]),
    "NaN in a tensor": (
        tensor_value(math.nan),
        [TENSORS_FILE, NAMED, "expected finite values, found 1 NaN or infinite"],
    ),
    "inf in a tensor": (tensor_value(math.inf), [TENSORS_FILE, NAMED, "expected finite values"]),
    "-inf in a float16 tensor": (tensor_value(-math.inf, torch.float16), [NAMED, "expected finite values"]),
    "NaN in a bfloat16 tensor": (tensor_value(math.nan, torch.bfloat16), [NAMED, "expected finite values"]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_checkpoint_is_refused_by_name(folder: Path, name: str) -> None:
    damage, expected = MALFORMED[name]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, IDENTITY if "backbone" not in name and "huge" not in name else None)
    message = str(caught.value)
    assert message.startswith(f"{folder}/adapter.")
    for part in expected:
        assert part in message, message
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "MistralForCausalLM"),
        ("hidden_size", 16),
        ("num_layers", 3),
        ("weights_fingerprint", "cd" * 32),
    ],
)
def test_refuses_another_backbone(folder: Path, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, IDENTITY.model_copy(update={field: value}))
    found = getattr(IDENTITY, field)
    expected = f"backbone.{field}: expected {value!r} (the backbone in use), found {found!r}"
    assert str(caught.value) == f"{folder}/{MANIFEST_FILE}: {expected}"


@pytest.mark.parametrize("make", [lambda path: None, Path.touch], ids=["nothing", "a file"])
def test_refuses_a_missing_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    for read in (read_checkpoint, read_manifest):
        with pytest.raises(CheckpointError, match=r"x: expected a folder of adapter.json and adapter.safetensors"):
            read(tmp_path / "x")
    with pytest.raises(CheckpointError, match="expected a folder"):
        read_checkpoint(Path("a\0b"))


@cache
def good_files(write: Callable[[Path], object]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        return {path.name: path.read_bytes() for path in Path(temporary).iterdir()}


def good_copy(temporary: str, data: st.DataObject) -> Path:
    """A good checkpoint of text, of images or of both in one task, written without waiting for the disk."""
    write = data.draw(st.sampled_from([write_random, write_random_images, write_random_pictures]))
    for name, content in good_files(write).items():
        (Path(temporary) / name).write_bytes(content)
    return Path(temporary)


@pytest.mark.slow
@given(st.data())
def test_any_damage_is_a_checkpoint_error_or_no_damage(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = good_copy(temporary, data)
        original = read_checkpoint(folder)
        path = folder / data.draw(st.sampled_from([MANIFEST_FILE, TENSORS_FILE]))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3), label="flips")):
            # Half of the flips near the start, where the header is.
            end = data.draw(st.sampled_from([64, len(content)]))
            content[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
        del content[data.draw(st.just(len(content)) | st.integers(0, len(content))) :]
        changed = bytes(content) != path.read_bytes()
        path.write_bytes(content)
        try:
            read = read_checkpoint(folder)
        except CheckpointError:
            assert changed
            return
        assert path.name == MANIFEST_FILE or not changed
        assert all(torch.equal(tensor, original.tensors[name]) for name, tensor in read.tensors.items())
        assert read.tensors.keys() == original.tensors.keys()


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)),
    st.data(),
)
def test_any_json_in_any_field_is_read_or_refused(value: Any, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = good_copy(temporary, data)
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        node: Any = manifest
        while isinstance(node, dict | list) and node:
            at = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
            if not isinstance(node[at], dict | list) or not node[at] or data.draw(st.booleans()):
                node[at] = value
                break
            node = node[at]
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
        with contextlib.suppress(CheckpointError):
            read_checkpoint(folder)


def test_errors_are_of_the_type_that_commands_print() -> None:
    assert issubclass(CheckpointError, MtLoRAError)
    with pytest.raises(ValidationError):
        BackboneIdentity(architecture="", hidden_size=0, num_layers=0, weights_fingerprint="")
