"""Masks of instruction sets, as `make test ISA=...` sets them: our kernels, torch and what vLLM asks of torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, torch
from mtlora.ops.cpu_kernel import ISA
from mtlora.vllm_cpu.precision import multiplies_bfloat16
names = ("_is_avx2_supported", "_is_avx512_supported", "_is_amx_tile_supported")
found = {name: getattr(torch.cpu, name)() for name in names}
found |= {"kernel": ISA, "aten": torch.backends.cpu.get_cpu_capability()}
found["bfloat16"] = multiplies_bfloat16(torch.cpu.get_capabilities())
found["unmasked"] = torch.cpu.get_capabilities()["avx2"]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="x86-64 alone")
def test_a_process_sees_no_more_than_avx2() -> None:
    import torch

    environment = {name: value for name, value in os.environ.items() if not name.startswith("MTLORA_ISA")}
    mask = {"MTLORA_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}
    path = f"{ROOT / 'tests/instruction_sets'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**environment, **mask, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernel"] == 2
    assert not any(found[name] for name in ("_is_avx512_supported", "_is_amx_tile_supported", "bfloat16"))
    assert found["_is_avx2_supported"] == found["unmasked"] == torch.cpu._is_avx2_supported()
    assert "512" not in found["aten"]
