"""Masks of instruction sets, as `make test ISA=...` sets them: our kernels, torch, its libraries, vLLM's questions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtlora.ops.cpu_kernel import INSTRUCTION_SETS, compiled_kernel

ROOT = Path(__file__).parents[3]
KERNEL = compiled_kernel()
PROGRAM = """
import json, torch
from mtlora.ops.cpu_kernel import ISA
from mtlora.vllm_cpu.precision import multiplies_bfloat16
names = ("_is_avx2_supported", "_is_avx512_supported", "_is_amx_tile_supported")
found = {name: getattr(torch.cpu, name)() for name in names}
found |= {"kernel": ISA, "aten": torch.backends.cpu.get_cpu_capability()}
found["bfloat16"] = multiplies_bfloat16(torch.cpu.get_capabilities())
found["unmasked"] = torch.cpu.get_capabilities()["avx2"]
# Each library says at its first call which instruction set it takes.
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
torch.ones(1, 1, 8).to_mkldnn()
print(json.dumps(found))
"""
# What oneDNN calls the most that a mask leaves.
MASKS = {
    "avx2": "Intel AVX2",
    "avx512": "Intel AVX-512 with Intel DL Boost",
    "avx512_bf16": "Intel AVX-512 with Intel DL Boost and bfloat16 support",
}


def variables(isa: str) -> dict[str, str]:
    """The Makefile's, of one mask."""
    line = re.search(rf"^ISA_ENV_{isa} *:= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    return dict(each.split("=") for each in line[1].split())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="x86-64 alone")
@pytest.mark.parametrize("isa", MASKS)
def test_a_process_sees_no_more_than_the_mask_lets_it(isa: str) -> None:
    import torch

    if KERNEL is None or not KERNEL.mtlora_supported(INSTRUCTION_SETS[isa]):
        pytest.skip(f"this processor has no {isa}, or the kernel is not built")
    masks = ("MTLORA_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    environment = {name: value for name, value in os.environ.items() if name not in masks}
    path = f"{ROOT / 'tests/instruction_sets'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    said = {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1", "MTLORA_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**environment, **said, **variables(isa)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernel"] == INSTRUCTION_SETS[isa]
    assert not found["_is_amx_tile_supported"]
    assert found["_is_avx512_supported"] == (isa != "avx2")
    assert found["bfloat16"] == (isa == "avx512_bf16")
    assert found["_is_avx2_supported"] == found["unmasked"] == torch.cpu._is_avx2_supported()
    assert ("512" in found["aten"]) == (isa != "avx2")
    one_dnn = re.search(r"onednn_verbose.*,cpu,isa:(.*)", done.stdout)
    assert one_dnn is not None
    # oneDNN says less where the processor has less.
    assert MASKS[isa].startswith(one_dnn[1].strip())
    mkl = re.search("MKL_VERBOSE .*MKL.*", done.stdout)
    if mkl and "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        assert ("AVX-512" in mkl[0]) == (isa != "avx2")
        assert "AMX" not in mkl[0]


def test_the_makefile_masks_every_library_of_torch() -> None:
    for isa in MASKS:
        assert {"ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"} <= variables(isa).keys()
