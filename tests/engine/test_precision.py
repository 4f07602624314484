"""The default dtype of a backbone in the engine."""

import json

import pytest
import torch

from mtlora.vllm_cpu import precision
from mtlora.vllm_cpu.precision import engine_dtype, free_memory, multiplies_bfloat16

X86 = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (X86, False),
        (X86 | {"avx512_bf16": True}, True),
        (X86 | {"amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_multiplies_bfloat16_by_the_processors_capabilities(capabilities, expected):
    assert multiplies_bfloat16(capabilities) is expected


def test_torch_reports_the_capabilities_that_are_read():
    multiplies_bfloat16(torch.cpu.get_capabilities())  # raises where one is missing


@pytest.mark.parametrize(
    ("asked", "config", "quantised", "capabilities", "expected"),
    [
        ("auto", {}, False, X86, "float32"),
        ("auto", {}, False, X86 | {"amx_bf16": True}, "auto"),
        ("bfloat16", {}, False, X86, "bfloat16"),
        ("float16", {}, False, X86, "float16"),
        ("auto", {"quantization_config": {}}, False, X86, "auto"),
        ("auto", {}, True, X86, "auto"),
    ],
)
def test_engine_dtype_is_float32_where_bfloat16_is_slow(
    tmp_path, monkeypatch, asked, config, quantised, capabilities, expected
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert engine_dtype(asked, tmp_path, quantised=quantised) == expected


@pytest.mark.parametrize(("free", "expected"), [(40_000, "float32"), (39_999, "auto")])
def test_float32_must_fit_the_memory(tmp_path, monkeypatch, free, expected):
    (tmp_path / "config.json").write_text("{}")
    for part in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / part).write_bytes(bytes(5_000))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: X86)
    monkeypatch.setattr(precision, "free_memory", lambda: free)
    assert engine_dtype("auto", tmp_path) == expected


def test_control_group_bounds_the_memory(tmp_path):
    everything = free_memory(tmp_path)
    assert everything > 1 << 20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 1 << 20
