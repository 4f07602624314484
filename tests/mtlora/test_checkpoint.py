"""Checkpoints: what is written is read back, whatever is damaged is refused by name, and nothing is half written."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save

import mtlora.checkpoint.format
import mtlora.files
from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.format import (
    MANIFEST_FILE,
    TENSORS_FILE,
    CheckpointError,
    TaskEntry,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)
from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError
from tests.factories import (
    CONFIG,
    IDENTITY,
    edit_header,
    edit_manifest,
    join_tensors,
    random_tensors,
    replace_tensors,
    split_tensors,
    task_table,
    write_random,
)

NAMED = "layers.0.mlp.lora_B"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint."""
    write_random(tmp_path / "good")
    return tmp_path / "good"


# ---- round trip ------------------------------------------------------------------------------------------------------


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, Any]:
    num_groups = draw(st.integers(1, 3))
    num_experts = draw(st.integers(1, 3))
    config = MtLoRAConfig(
        r=draw(st.integers(1, 3)),
        lora_alpha=draw(st.floats(1e-3, 1e3)),
        num_experts=num_experts,
        num_groups=num_groups,
        blocks=draw(st.sampled_from(["ffn", "attention", "both"])),
        task_bias=draw(st.booleans()) if num_experts > 1 else False,
    )
    identity = IDENTITY.model_copy(
        update={"hidden_size": num_groups * draw(st.integers(1, 3)), "num_layers": draw(st.integers(1, 2))}
    )
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
    ids = draw(
        st.lists(st.from_regex(r"[a-z0-9][a-z0-9_.\-]{0,20}", fullmatch=True), min_size=1, max_size=4, unique=True)
    )
    rows = draw(st.permutations(range(len(ids))))
    tasks = tuple(
        TaskEntry(
            id=task_id,
            description=draw(text),
            template=draw(text).replace("{", "{{").replace("}", "}}") + "{input}",
            stop=tuple(draw(st.lists(text, max_size=2))),
            max_new_tokens=draw(st.integers(1, 4096)),
            bias_index=row if config.task_bias else None,
        )
        for task_id, row in zip(ids, rows, strict=True)
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
        max_leaves=4,
    )
    return {
        "backbone": identity,
        "config": config,
        "tasks": tasks,
        "tensors": random_tensors(config, identity, len(ids), dtype=dtype, seed=draw(st.integers(0, 99))),
        "training": draw(st.dictionaries(text, json_values, max_size=2)),
        "evaluation": draw(st.dictionaries(text, json_values, max_size=2)),
    }


@given(checkpoints())
@settings(max_examples=40, deadline=None)
def test_round_trip(arguments: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "ädapter"
        manifest = write_checkpoint(folder, **arguments)
        checkpoint = read_checkpoint(folder, arguments["backbone"])
        assert checkpoint.manifest == manifest == read_manifest(folder)
        for field in ("backbone", "config", "tasks", "training", "evaluation"):
            assert getattr(manifest, field) == arguments[field]
        others = load_file(folder / TENSORS_FILE)
        assert set(checkpoint.tensors) == set(others) == set(arguments["tensors"])
        for name, tensor in arguments["tensors"].items():
            assert checkpoint.tensors[name].dtype == tensor.dtype
            assert torch.equal(checkpoint.tensors[name], tensor)
            assert torch.equal(others[name], tensor)
        assert os.listdir(temporary) == [folder.name]


def test_tensors_of_one_storage_and_of_odd_strides(tmp_path: Path) -> None:
    tensors = random_tensors()
    route = tensors["layers.0.mlp.lora_route"]
    tensors["layers.1.mlp.lora_route"] = route
    tensors[NAMED] = torch.randn(2, 8, 3).permute(2, 1, 0)
    write_random(tmp_path / "a", tensors=tensors)
    read = read_checkpoint(tmp_path / "a").tensors
    assert torch.equal(read["layers.1.mlp.lora_route"], route)
    assert torch.equal(read[NAMED], tensors[NAMED])


def test_a_file_of_mixed_dtypes_whose_floats_lie_at_odd_offsets(folder: Path) -> None:
    tensors = {n: t.half() if n == "layers.0.mlp.lora_A" else t for n, t in random_tensors().items()}
    header, data, at = {}, b"", 0
    for name in sorted(tensors):
        raw = tensors[name].numpy().tobytes()
        dtype = "F16" if tensors[name].dtype == torch.float16 else "F32"
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [at, at + len(raw)]}
        data, at = data + raw, at + len(raw)
    replace_tensors(folder, join_tensors(json.dumps(header).encode(), data))
    read = read_checkpoint(folder).tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_random(tmp_path / "a")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o644}


def test_what_json_would_change_is_normalised_or_refused(tmp_path: Path) -> None:
    manifest = write_random(tmp_path / "a", training={"shape": (1, 2)})
    assert manifest.training == {"shape": [1, 2]} == read_manifest(tmp_path / "a").training
    for value in (math.nan, math.inf, {1}, Path("x"), "\ud800"):
        with pytest.raises(CheckpointError):
            write_random(tmp_path / "b", evaluation={"value": value})
    assert not (tmp_path / "b").exists()


# ---- malformed -------------------------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def manifest_bytes(content: bytes) -> Damage:
    return lambda folder: (folder / MANIFEST_FILE).write_bytes(content)


def manifest_set(*keys: str | int, to: Any) -> Damage:
    """Set manifest[keys[0]][keys[1]]… ."""

    def edit(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = to

    return lambda folder: edit_manifest(folder, edit)


def manifest_drop(*keys: str | int) -> Damage:
    def edit(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return lambda folder: edit_manifest(folder, edit)


def manifest_text(old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        text = json.dumps(json.loads((folder / MANIFEST_FILE).read_text()))
        assert old in text
        (folder / MANIFEST_FILE).write_text(text.replace(old, new, 1))

    return damage


def tensors_cut(*, keep: Callable[[int, int], int]) -> Damage:
    """Keep the first `keep(header size, file size)` bytes of the tensor file."""

    def damage(folder: Path) -> None:
        content = (folder / TENSORS_FILE).read_bytes()
        replace_tensors(folder, content[: keep(int.from_bytes(content[:8], "little"), len(content))])

    return damage


def tensor_set(name: str, tensor: torch.Tensor | None) -> Damage:
    """Replace, add or (None) remove a tensor."""
    tensors = random_tensors() | {name: tensor}
    return lambda folder: replace_tensors(folder, save({n: t for n, t in tensors.items() if t is not None}))


def tensor_value(value: float, dtype: torch.dtype = torch.float32) -> Damage:
    def damage(folder: Path) -> None:
        tensors = random_tensors(dtype=dtype)
        tensors[NAMED][2, 7, 1] = value
        replace_tensors(folder, save(tensors))

    return damage


def header_set(key: str, to: Any) -> Damage:
    return lambda folder: edit_header(folder, lambda header: header[NAMED].update({key: to}))


def header_bytes(header: bytes) -> Damage:
    return lambda folder: replace_tensors(folder, join_tensors(header, split_tensors(folder)[1]))


def overlapping(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        header["layers.1.mlp.lora_B"]["data_offsets"] = header[NAMED]["data_offsets"]

    edit_header(folder, edit)


def gap(folder: Path) -> None:
    header, data = split_tensors(folder)
    for entry in header.values():
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    replace_tensors(folder, join_tensors(json.dumps(header).encode(), bytes(4) + data))


def replaced_by(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def linked_outside(name: str) -> Damage:
    def damage(folder: Path) -> None:
        os.rename(folder / name, folder.parent / "outside")
        (folder / name).symlink_to("../outside")

    return damage


def linked_outside_in_two_steps(folder: Path) -> None:
    os.rename(folder / TENSORS_FILE, folder.parent / "outside")
    (folder / "inside").symlink_to(folder.parent)
    (folder / TENSORS_FILE).symlink_to("inside/outside")


def sparse(size: int) -> Damage:
    return lambda folder: os.truncate(folder / TENSORS_FILE, size)


def huge_and_consistent(folder: Path) -> None:
    """A manifest and a header that agree on 8 TiB, in a sparse file."""
    config = MtLoRAConfig(r=512, num_experts=256, num_groups=2)
    identity = IDENTITY.model_copy(update={"hidden_size": 1 << 20})
    manifest = read_manifest(folder).model_copy(update={"config": config, "backbone": identity})
    header, at = {}, 0
    for name, shape in manifest.tensor_shapes().items():
        end = at + 4 * math.prod(shape)
        header[name], at = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}, end
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    content = join_tensors(json.dumps(header).encode(), b"")
    (folder / TENSORS_FILE).write_bytes(content)
    os.truncate(folder / TENSORS_FILE, len(content) + at)


MALFORMED: dict[str, tuple[Damage, list[str]]] = {
    # The manifest as a file.
    "manifest missing": (replaced_by(MANIFEST_FILE, lambda path: None), [MANIFEST_FILE, "No such file"]),
    "manifest empty": (manifest_bytes(b""), [MANIFEST_FILE, "expected JSON"]),
    "manifest cut in half": (manifest_bytes(b'{"format_version": 1, "backbo'), [MANIFEST_FILE, "expected JSON"]),
    "manifest with trailing text": (manifest_bytes(b"{} {}"), [MANIFEST_FILE, "Extra data"]),
    "manifest with single quotes": (manifest_bytes(b"{'format_version': 1}"), [MANIFEST_FILE, "expected JSON"]),
    "manifest of null bytes": (manifest_bytes(bytes(100)), [MANIFEST_FILE, "expected JSON"]),
    "manifest an array": (manifest_bytes(b"[1]"), [MANIFEST_FILE, "expected a JSON object, found list"]),
    "manifest a number": (manifest_bytes(b"1"), [MANIFEST_FILE, "expected a JSON object, found int"]),
    "manifest null": (manifest_bytes(b"null"), [MANIFEST_FILE, "expected a JSON object, found NoneType"]),
    "manifest in Latin-1": (manifest_bytes('{"ä": 1}'.encode("latin-1")), [MANIFEST_FILE, "expected UTF-8"]),
    "manifest in UTF-16": (manifest_bytes('{"a": 1}'.encode("utf-16")), [MANIFEST_FILE, "expected UTF-8"]),
    "manifest with a byte order mark": (manifest_bytes(b"\xef\xbb\xbf{}"), [MANIFEST_FILE, "BOM"]),
    "manifest nested deeply": (
        manifest_bytes(b'{"a":' + b"[" * 200_000),
        [MANIFEST_FILE, "expected JSON", "recursion"],
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
    "NaN": (manifest_text('"lora_alpha": 4.0', '"lora_alpha": NaN'), [MANIFEST_FILE, "NaN is no JSON"]),
    "infinity": (manifest_text('"seed": 0', '"seed": -Infinity'), [MANIFEST_FILE, "-Infinity is no JSON"]),
    "a number beyond floats": (manifest_text('"seed": 0', '"seed": 1e999'), [MANIFEST_FILE, "1e999 is out of range"]),
    "an endless integer": (manifest_text('"r": 2', '"r": ' + "9" * 10_000), [MANIFEST_FILE, "digits"]),
    "half a surrogate pair": (manifest_text('"Task 0."', '"\\ud800"'), [MANIFEST_FILE, "hex escape"]),
    # The manifest's fields.
    "version missing": (manifest_drop("format_version"), ["format_version: expected 1, found none"]),
    "version 0": (manifest_set("format_version", to=0), ["format_version: expected 1, found 0"]),
    "version 2": (manifest_set("format_version", to=2), ["format_version: expected 1, found 2"]),
    "version a string": (manifest_set("format_version", to="1"), ["format_version: expected 1, found '1'"]),
    "version true": (manifest_set("format_version", to=True), ["format_version: expected 1, found True"]),
    "version a float": (manifest_set("format_version", to=1.0), ["format_version: expected 1, found 1.0"]),
    "version null": (manifest_set("format_version", to=None), ["format_version: expected 1, found None"]),
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
    "header no JSON": (header_bytes(b"{nothing}"), [TENSORS_FILE, "expected JSON"]),
    "header not UTF-8": (header_bytes(b'{"\xff": 1}'), [TENSORS_FILE, "expected UTF-8"]),
    "header an array": (header_bytes(b"[]"), [TENSORS_FILE, "expected a JSON object, found list"]),
    "header nested deeply": (header_bytes(b'{"a":' + b"[" * 200_000), [TENSORS_FILE, "expected JSON", "recursion"]),
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
    "tensor too many": (tensor_set("layers.2.mlp.lora_A", torch.zeros(2, 8)), ["'layers.2.mlp.lora_A'", "no part of"]),
    "tensor name with control characters": (tensor_set("\x1b[31m\n", torch.zeros(1)), [r"'\x1b[31m\n'", "no part of"]),
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
def test_malformed(folder: Path, name: str) -> None:
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


def test_largest_and_smallest_finite_values_are_no_nan(folder: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = random_tensors(dtype=dtype)
        info = torch.finfo(dtype)
        tensors[NAMED].view(-1)[:5] = torch.tensor([info.max, info.min, info.tiny, -0.0, info.smallest_normal / 4]).to(
            dtype
        )
        replace_tensors(folder, save(tensors))
        assert torch.equal(read_checkpoint(folder).tensors[NAMED], tensors[NAMED])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "MistralForCausalLM"),
        ("hidden_size", 16),
        ("num_layers", 3),
        ("weights_fingerprint", "cd" * 32),
    ],
)
def test_another_backbone(folder: Path, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, IDENTITY.model_copy(update={field: value}))
    found = getattr(IDENTITY, field)
    expected = f"backbone.{field}: expected {value!r} (the backbone in use), found {found!r}"
    assert str(caught.value) == f"{folder}/{MANIFEST_FILE}: {expected}"


@pytest.mark.parametrize("make", [lambda path: None, Path.touch], ids=["nothing", "a file"])
def test_no_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    for read in (read_checkpoint, read_manifest):
        with pytest.raises(CheckpointError, match=r"x: expected a folder of adapter.json and adapter.safetensors"):
            read(tmp_path / "x")
    with pytest.raises(CheckpointError, match="expected a folder"):
        read_checkpoint(Path("a\0b"))


@cache
def good_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as temporary:
        write_random(Path(temporary))
        return {path.name: path.read_bytes() for path in Path(temporary).iterdir()}


def good_copy(temporary: str) -> Path:
    """A good checkpoint without the waits for the disk."""
    for name, content in good_files().items():
        (Path(temporary) / name).write_bytes(content)
    return Path(temporary)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage_is_a_checkpoint_error_or_no_damage(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = good_copy(temporary)
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
@settings(max_examples=100, deadline=None)
def test_any_json_in_place_of_any_field(value: Any, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = good_copy(temporary)
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


# ---- links and replacement while reading -----------------------------------------------------------------------------


def mounted(root: Path, *seeds: int) -> Path:
    """A folder as Kubernetes mounts a ConfigMap: files are links through `..data` to a dated folder."""
    mount = root / "mount"
    for seed in seeds:
        write_random(mount / f"..{seed}", seed=seed)
    (mount / "..data").symlink_to(f"..{seeds[0]}")
    for name in (MANIFEST_FILE, TENSORS_FILE):
        (mount / name).symlink_to(f"..data/{name}")
    return mount


def flip(mount: Path, seed: int) -> None:
    (mount / "..new").symlink_to(f"..{seed}")
    os.rename(mount / "..new", mount / "..data")


def test_a_mounted_config_map(tmp_path: Path) -> None:
    mount = mounted(tmp_path, 0, 1)
    assert read_checkpoint(mount).manifest.training == {"seed": 0}
    flip(mount, 1)
    assert read_checkpoint(mount).manifest.training == {"seed": 1}


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write_random(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    assert read_checkpoint(tmp_path / "current").manifest.training == {"seed": 0}


@pytest.mark.parametrize("flips", [1, 3])
def test_a_flip_between_the_two_files_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flips: int
) -> None:
    mount = mounted(tmp_path, 0, 1)
    original, left = mtlora.checkpoint.open_file, [flips]

    def opened(folder: Path, name: str) -> Any:
        if name == TENSORS_FILE and left[0]:
            left[0] -= 1
            flip(mount, (left[0] + 1) % 2)
        return original(folder, name)

    monkeypatch.setattr(mtlora.checkpoint, "open_file", opened)
    checkpoint = read_checkpoint(mount)
    assert torch.equal(checkpoint.tensors[NAMED], random_tensors(seed=checkpoint.manifest.training["seed"])[NAMED])
    assert left == [0]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_grows_or_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    config = CONFIG.model_copy(update={"r": 512})  # More than one buffer of the reader.
    write_random(tmp_path, config=config, tensors=random_tensors(config))
    original = mtlora.checkpoint._layout

    def resized(path: Path, *args: Any) -> Any:
        layout = original(path, *args)
        os.truncate(path, path.stat().st_size + change)
        return layout

    monkeypatch.setattr(mtlora.checkpoint, "_layout", resized)
    # Read again, since it changed meanwhile; by then it does not fit its header.
    with pytest.raises(CheckpointError, match="bytes of tensors, found"):
        read_checkpoint(tmp_path)


def test_what_was_read_does_not_change_with_the_file(folder: Path) -> None:
    tensors = read_checkpoint(folder).tensors
    with (folder / TENSORS_FILE).open("r+b") as file:
        file.write(b"\xff" * (folder / TENSORS_FILE).stat().st_size)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in random_tensors().items())


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": random_tensors() | {NAMED: torch.zeros(3, 8, 3)}}, f"{NAMED}: expected shape"),
        ({"tensors": random_tensors() | {NAMED: torch.full((3, 8, 2), math.nan)}}, f"{NAMED}: expected finite"),
        ({"tensors": random_tensors() | {NAMED: torch.zeros(3, 8, 2).double()}}, f"{NAMED}: expected dtype"),
        ({"tensors": random_tensors() | {"more": torch.zeros(1)}}, "tensor 'more'"),
        ({"tensors": {}}, "lora_A: expected by the config, found none"),
        ({"tasks": task_table(2)}, "task_bias: expected shape"),
        ({"tasks": task_table(3, biased=False)}, "bias_index: expected 0 to 2"),
        ({"tasks": ()}, "tasks"),
        ({"config": CONFIG.model_copy(update={"num_groups": 3})}, "num_groups 3 does not divide"),
        ({"training": {"loss": math.nan}}, "training"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_random(tmp_path / "a", seed=5)
    with pytest.raises(CheckpointError) as caught:
        write_random(tmp_path / "a", **change)
    assert message in str(caught.value)
    assert "made" not in str(caught.value)
    assert read_checkpoint(tmp_path / "a").manifest.training == {"seed": 5}
    assert os.listdir(tmp_path) == ["a"]


def test_a_checkpoint_is_replaced(folder: Path) -> None:
    write_random(folder, seed=1)
    assert read_checkpoint(folder).manifest.training == {"seed": 1}
    assert os.listdir(folder.parent) == ["good"]


def test_replacing_is_one_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "one").mkdir()
    (folder.parent / "other").mkdir()
    try:
        mtlora.files._exchange(folder.parent / "one", folder.parent / "other")
    except OSError as error:
        pytest.skip(f"this file system cannot exchange two folders: {error}")

    def rename(*args: Any) -> None:
        raise AssertionError("two renames, between which the checkpoint is absent")

    monkeypatch.setattr(os, "rename", rename)
    write_random(folder, seed=1)
    assert read_checkpoint(folder).manifest.training == {"seed": 1}


def test_writing_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    write_random(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    write_random(tmp_path / "current", seed=1)
    assert (tmp_path / "current").is_symlink()
    assert read_manifest(tmp_path / "v1").training == {"seed": 1}


@pytest.mark.parametrize("name", ["notes.txt", ".git", "adapter.json.bak"])
def test_a_folder_that_holds_anything_else_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "home" / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"home: not replaced: '{name}' is no part of a checkpoint"):
        write_random(tmp_path / "home")
    assert os.listdir(tmp_path / "home") == [name]


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a folder or nothing, found a file"):
        write_random(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_random(tmp_path / "a" / "b")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_random(tmp_path / "a")
    assert read_manifest(tmp_path / "a").training == {"seed": 0}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_any_call_leaves_the_old_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Without an exchange there are two renames: each, and each fsync before them, fails once."""

    def no_exchange(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "no exchange here")

    monkeypatch.setattr(mtlora.files, "_exchange", no_exchange)
    original, calls = getattr(os, call), 0
    for failing in range(10):
        calls = 0

        def flaky(*args: Any, failing: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(errno.EIO, "disk on fire")
            return original(*args)

        monkeypatch.setattr(os, call, flaky)
        try:
            write_random(folder, seed=1)
        except CheckpointError:
            # The last fsync, of the parent, comes after the new checkpoint is in place.
            assert read_checkpoint(folder).manifest.training["seed"] == (1 if call == "fsync" and calls == 4 else 0)
            assert os.listdir(folder.parent) == ["good"]
        else:
            break
    assert failing == {"fsync": 4, "rename": 2}[call]
    assert read_checkpoint(folder).manifest.training == {"seed": 1}
    assert os.listdir(folder.parent) == ["good"]


def _write_for_ever(folder: Path) -> None:
    seed = 0
    while True:
        seed += 1
        write_random(folder, seed=seed)


def test_kills_and_readers_meet_whole_checkpoints_only(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    reads, seeds = 0, set()
    for attempt in range(8):
        writer = context.Process(target=_write_for_ever, args=(folder,))
        writer.start()
        until = time.monotonic() + 0.05 + 0.013 * attempt
        while time.monotonic() < until:
            checkpoint = read_checkpoint(folder, IDENTITY)
            reads += 1
            seeds.add(checkpoint.manifest.training["seed"])
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        checkpoint = read_checkpoint(folder, IDENTITY)
        seed = checkpoint.manifest.training["seed"]
        assert all(torch.equal(checkpoint.tensors[n], t) for n, t in random_tensors(seed=seed).items())
    assert reads > 8
    assert len(seeds) > 2


def test_errors_are_of_the_kind_the_command_prints() -> None:
    assert issubclass(CheckpointError, MtLoRAError)
    with pytest.raises(ValidationError):
        BackboneIdentity(architecture="", hidden_size=0, num_layers=0, weights_fingerprint="")
