"""What is written is read back."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from benchmarks.harness.adapters import random_tensors as drawn_tensors
from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE, CheckpointError, TaskEntry
from mtlora.checkpoint.read import read_checkpoint, read_manifest
from mtlora.checkpoint.write import write_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.vision.image_input import ImageInput
from tests.factories import (
    CONFIG,
    IDENTITY,
    join_tensors,
    random_tensors,
    replace_tensors,
    task_table,
    write_random,
)
from tests.mtlora.checkpoint.damage import NAMED


@st.composite
def image_fields(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of a task of images."""
    number = st.floats(-10, 10)
    return {
        "allowed_answers": tuple(
            draw(st.lists(st.text("abcé", min_size=1, max_size=5), min_size=2, max_size=5, unique=True))
        ),
        "image": ImageInput(
            size=draw(st.integers(8, 1024)),
            resize=draw(st.sampled_from(["crop", "squash", "pad"])),
            pooling=draw(st.sampled_from(["cls", "mean", "cls_mean"])),
            mean=draw(st.none() | st.tuples(number, number, number)),
            std=draw(st.none() | st.just((0.1, 1.0, 2.5))),
            augment=tuple(draw(st.lists(st.sampled_from(["flip", "rotate", "crop", "colour"]), max_size=4))),
        ),
    }


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, Any]:
    num_groups = draw(st.integers(1, 3))
    num_experts = draw(st.integers(1, 3))
    activation = draw(st.sampled_from(["all", "task"]))
    config = MtLoRAConfig(
        r=draw(st.integers(1, 3)),
        lora_alpha=draw(st.floats(1e-3, 1e3)),
        num_experts=num_experts,
        num_groups=num_groups,
        blocks=draw(st.sampled_from(["ffn", "attention", "both"])),
        task_bias=draw(st.booleans()) if num_experts > 1 else False,
        activation=activation,
    )
    identity = IDENTITY.model_copy(
        update={"hidden_size": num_groups * draw(st.integers(1, 3)), "num_layers": draw(st.integers(1, 2))}
    )
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
    ids = draw(
        st.lists(st.from_regex(r"[a-z0-9][a-z0-9_.\-]{0,20}", fullmatch=True), min_size=1, max_size=4, unique=True)
    )
    rows = draw(st.permutations(range(len(ids))))
    images = activation == "all" and draw(st.booleans())

    def of_text() -> dict[str, Any]:
        return {
            "template": draw(text).replace("{", "{{").replace("}", "}}") + "{input}",
            "document_template": "{document}\n" if activation == "task" or draw(st.booleans()) else None,
            "stop": tuple(draw(st.lists(text, max_size=2))),
            "max_new_tokens": draw(st.integers(1, 4096)),
        }

    tasks = tuple(
        TaskEntry(
            id=task_id,
            description=draw(text),
            bias_index=row if config.task_bias else None,
            **(draw(image_fields()) if images else of_text()),
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
        "tensors": {
            name: tensor.to(dtype)
            for name, tensor in drawn_tensors(identity, config, tasks, seed=draw(st.integers(0, 99))).items()
        },
        "training": draw(st.dictionaries(text, json_values, max_size=2)),
        "evaluation": draw(st.dictionaries(text, json_values, max_size=2)),
    }


@pytest.mark.slow
@given(checkpoints())
@settings(max_examples=40)
def test_any_checkpoint_is_read_as_written(arguments: dict[str, Any]) -> None:
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


def test_shared_storage_and_odd_strides_are_written_right(tmp_path: Path) -> None:
    tensors = random_tensors()
    route = tensors["layers.0.mlp.lora_route"]
    tensors["layers.1.mlp.lora_route"] = route
    tensors[NAMED] = torch.randn(2, 8, 3).permute(2, 1, 0)
    write_random(tmp_path / "a", tensors=tensors)
    read = read_checkpoint(tmp_path / "a").tensors
    assert torch.equal(read["layers.1.mlp.lora_route"], route)
    assert torch.equal(read[NAMED], tensors[NAMED])


def test_mixed_dtypes_at_odd_offsets_are_read_right(folder: Path) -> None:
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


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_random(tmp_path / "a")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o644}


def test_values_that_json_cannot_hold_are_normalised_or_refused(tmp_path: Path) -> None:
    manifest = write_random(tmp_path / "a", training={"shape": (1, 2)})
    assert manifest.training == {"shape": [1, 2]} == read_manifest(tmp_path / "a").training
    for value in (math.nan, math.inf, {1}, Path("x"), "\ud800"):
        with pytest.raises(CheckpointError):
            write_random(tmp_path / "b", evaluation={"value": value})
    assert not (tmp_path / "b").exists()


def test_largest_and_smallest_finite_values_are_accepted(folder: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = random_tensors(dtype=dtype)
        info = torch.finfo(dtype)
        tensors[NAMED].view(-1)[:5] = torch.tensor([info.max, info.min, info.tiny, -0.0, info.smallest_normal / 4]).to(
            dtype
        )
        replace_tensors(folder, save(tensors))
        assert torch.equal(read_checkpoint(folder).tensors[NAMED], tensors[NAMED])


DOCUMENTS = task_table(3, document_template="{document}\n")


def test_only_a_checkpoint_with_documents_has_version_2(tmp_path: Path) -> None:
    made = {
        "plain": write_random(tmp_path / "plain"),
        "document": write_random(tmp_path / "document", tasks=DOCUMENTS),
        "task": write_random(
            tmp_path / "task", tasks=DOCUMENTS, config=CONFIG.model_copy(update={"activation": "task"})
        ),
    }
    assert {name: manifest.format_version for name, manifest in made.items()} == {"plain": 1, "document": 2, "task": 2}
    plain = (tmp_path / "plain" / MANIFEST_FILE).read_text()
    assert "activation" not in plain
    assert "document_template" not in plain
    for name, manifest in made.items():
        assert read_manifest(tmp_path / name) == manifest


def test_an_activated_adapter_needs_document_parts(tmp_path: Path) -> None:
    tasks = (*DOCUMENTS[:2], task_table(3)[2])
    with pytest.raises(
        CheckpointError, match=r"document_template: expected one, .* 'task', found none in task 'task-2'"
    ):
        write_random(tmp_path / "a", tasks=tasks, config=CONFIG.model_copy(update={"activation": "task"}))
