"""What a machine or a container must have before an engine starts: each lack is one line that says what is allowed."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtlora import control_group
from server.app import App, StartError
from server.engine import EngineStartError, check_machine, preflight
from server.engine.threads import BIND
from server.job import Lane
from server.registry.spool import Spool, SpoolError
from server.settings import Settings

MIB, GIB = 1 << 20, 1 << 30
AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A backbone of 512 MiB in bfloat16."""
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(512 * MIB)
    return tmp_path


def machine(monkeypatch: pytest.MonkeyPatch, limit: int | None = None, **found: Any) -> None:
    """This machine's processor, engine and memory limit."""
    import torch
    import vllm.platforms

    platform = SimpleNamespace(
        is_unspecified=lambda: found.get("unspecified", False), is_cpu=lambda: not found.get("gpu", False)
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    # The tests' own engines may have one.
    monkeypatch.delenv(BIND, raising=False)
    capabilities = {**AVX2, "architecture": found.get("architecture", "x86_64"), "avx2": found.get("avx2", True)}
    capabilities["avx512_bf16"] = found.get("bfloat16", True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(preflight, "memory_left", lambda: limit)
    monkeypatch.setattr("server.engine.threads.quota_cores", lambda: None)
    monkeypatch.setattr("mtlora.vllm_cpu.precision.free_memory", lambda: 64 * GIB)


def test_images_need_room_for_the_largest_that_is_decoded(monkeypatch: pytest.MonkeyPatch, backbone: Path) -> None:
    settings = Settings(allow_no_tasks=True, backbone="none", vision_backbone="vision", max_image_pixels=1 << 28)
    machine(monkeypatch, 4 * GIB)
    with pytest.raises(EngineStartError, match=r"need 4\.96"):
        check_machine(settings, {Lane.IMAGES: backbone})
    machine(monkeypatch, 5 * GIB)
    check_machine(settings, {Lane.IMAGES: backbone})


def test_threads_have_cores_that_are_there(monkeypatch: pytest.MonkeyPatch, backbone: Path) -> None:
    machine(monkeypatch)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    both = {Lane.TEXT: backbone, Lane.IMAGES: backbone}
    settings = Settings(allow_no_tasks=True, vision_backbone="vision", omp_threads_bind="0|1", tensor_parallel_size=2)
    with pytest.raises(EngineStartError, match="omp_threads_bind, for the engine of images: groups of cores"):
        check_machine(settings, both)
    check_machine(settings.model_copy(update={"vision_omp_threads_bind": "0-1"}), both)
    monkeypatch.setenv(BIND, "0-7")
    with pytest.raises(EngineStartError, match=f"{BIND}, for the engine of texts: found core 2; .*, 0-1"):
        check_machine(Settings(allow_no_tasks=True), {Lane.TEXT: backbone})


@pytest.mark.parametrize("gpu", [False, True])
def test_each_pipeline_stage_has_a_layer(monkeypatch: pytest.MonkeyPatch, backbone: Path, gpu: bool) -> None:
    (backbone / "config.json").write_text(json.dumps({"dtype": "bfloat16", "num_hidden_layers": 4}))
    machine(monkeypatch, gpu=gpu)
    with pytest.raises(EngineStartError, match="pipeline_parallel_size: found 5; allowed: 1 to 4, the backbone's"):
        check_machine(Settings(allow_no_tasks=True, pipeline_parallel_size=5), {Lane.TEXT: backbone})
    check_machine(Settings(allow_no_tasks=True, pipeline_parallel_size=4), {Lane.TEXT: backbone})


@pytest.mark.parametrize(
    ("limit", "setting", "needed", "caches"),
    [
        # The server; then weights, KV cache and process of each engine.
        (3 * GIB, {}, 0.8 + 0.5 + 1 + 0.9, "KV cache (1 GiB)"),
        (4 * GIB, {"kv_cache_gib": 2}, 0.8 + 0.5 + 2 + 0.9, "KV cache (2 GiB)"),
        # A rank beside its engine: one more process. Every rank has a cache.
        (3 * GIB, {"distributed_executor_backend": "mp"}, 0.8 + 0.5 + 1 + 0.6 + 0.7, "KV cache (1 GiB)"),
        (
            8 * GIB, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            0.8 + 0.5 + 4 * (1 + 0.7) + 0.6, "4 KV caches (1 GiB each)",
        ),
        # Several engines, one rank each: its process, unless threads are not bound; and a coordinator.
        (
            10 * GIB, {"data_parallel_size": 4, "kv_cache_gib": 1.5},
            0.8 + 4 * (0.5 + 1.5 + 0.6 + 0.7) + 0.4, "4 KV caches (1.5 GiB each)",
        ),
        (
            10 * GIB, {"data_parallel_size": 4, "omp_threads_bind": "nobind"},
            0.8 + 4 * (0.5 + 1 + 0.9) + 0.4, "4 KV caches (1 GiB each)",
        ),
    ],
)  # fmt: skip
def test_a_limit_below_what_the_backbone_needs(
    monkeypatch: pytest.MonkeyPatch, backbone: Path, limit: int, setting: dict[str, Any], needed: float, caches: str
) -> None:
    settings = Settings(allow_no_tasks=True, **setting)
    machine(monkeypatch, limit)
    message = rf"found {limit / GIB:.2f} GiB left; backbones, {re.escape(caches)} and processes need {needed:.2f}; "
    with pytest.raises(EngineStartError, match=message) as error:
        check_machine(settings, {Lane.TEXT: backbone})
    assert "\n" not in str(error.value)
    machine(monkeypatch, int((needed + 0.001) * GIB))
    check_machine(settings, {Lane.TEXT: backbone})
    machine(monkeypatch, None)
    check_machine(settings, {Lane.TEXT: backbone})


def test_images_need_no_kv_cache_of_texts(monkeypatch: pytest.MonkeyPatch, backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100 * MIB))
    settings, images = Settings(allow_no_tasks=True, backbone="none", vision_backbone="vision"), {Lane.IMAGES: tmp_path}
    machine(monkeypatch, GIB)
    with pytest.raises(EngineStartError, match=r"left; backbones and processes need 1\.84; allowed: a higher limit$"):
        check_machine(settings, images)
    machine(monkeypatch, GIB + 900 * MIB)
    check_machine(settings, images)
    # Two engines with the vision backbone.
    two = Settings(allow_no_tasks=True, backbone="none", vision_backbone="vision", vision_data_parallel_size=2)
    with pytest.raises(EngineStartError, match=r"need 3\.00; allowed"):
        check_machine(two, images)
    # Beside texts: the sum.
    both = Settings(allow_no_tasks=True, vision_backbone="vision")
    machine(monkeypatch, 3 * GIB + 300 * MIB)
    check_machine(both, {Lane.TEXT: backbone})
    with pytest.raises(EngineStartError, match=r"backbones, KV cache \(1 GiB\) and processes"):
        check_machine(both, {Lane.TEXT: backbone} | images)


def test_weights_that_are_widened_need_twice_their_size(monkeypatch: pytest.MonkeyPatch, backbone: Path) -> None:
    machine(monkeypatch, 3 * GIB + 300 * MIB, bfloat16=False)
    with pytest.raises(EngineStartError, match=re.escape("need 3.70")):
        check_machine(Settings(allow_no_tasks=True), {Lane.TEXT: backbone})
    check_machine(Settings(allow_no_tasks=True, dtype="bfloat16"), {Lane.TEXT: backbone})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"unspecified": True}, "for GPUs, and no GPU .*allowed: a node with a GPU"),
        ({"avx2": False}, "no AVX2; allowed: x86-64 with AVX2"),
        ({"avx2": False, "architecture": "aarch64"}, None),
        ({"avx2": False, "gpu": True}, None),
    ],
)
def test_rejects_the_wrong_machine(
    monkeypatch: pytest.MonkeyPatch, backbone: Path, found: dict[str, Any], message: str | None
) -> None:
    machine(monkeypatch, **found)
    settings = Settings(allow_no_tasks=True)
    if message is None:
        return check_machine(settings, {Lane.TEXT: backbone})
    with pytest.raises(EngineStartError, match=message):
        check_machine(settings, {Lane.TEXT: backbone})


@pytest.mark.parametrize(
    ("own", "file", "text", "kills"),
    [
        ("0::/a\n", "a/memory.events", "low 0\noom 5\noom_kill 2\noom_group_kill 0", 2),
        ("0::/host\n", "memory.events", "oom_kill 1", 1),
        ("4:memory:/a\n", "memory/a/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3", 3),
        ("0::/a\n", "b/memory.events", "oom_kill 9", 0),
    ],
)
def test_counts_the_processes_killed_at_the_memory_limit(
    tmp_path: Path, own: str, file: str, text: str, kills: int
) -> None:
    path = tmp_path / "root" / file
    path.parent.mkdir(parents=True)
    path.write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    assert control_group.out_of_memory_kills(tmp_path / "root", tmp_path / "own") == kills


def test_rejects_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match=r"file/copies: no copies of adapters can be written: .*adapter_cache"):
        Spool(tmp_path / "file" / "copies")


def test_a_tenants_file_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"no/tenants\.yaml"):
        App(Settings(allow_no_tasks=True, port=0, metrics_port=0, tenants=tmp_path / "no" / "tenants.yaml"))
