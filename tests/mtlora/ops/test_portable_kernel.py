"""The portable kernel on aarch64 (NEON), cross-compiled and run by qemu, against the same kernel on this processor.

On this processor test_cpu.py holds it to the formula.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "mtlora" / "ops" / "csrc"
CROSS = "aarch64-linux-gnu-g++"


def built(compiler: str, folder: Path) -> Path:
    binary = folder / compiler
    driver = Path(__file__).with_name("kernel_driver.cpp")
    flags = ["-O1", "-std=c++17", "-fopenmp", "-static", "-w"]
    subprocess.run([compiler, *flags, SOURCES / "serving.cpp", driver, "-o", binary], check=True, capture_output=True)
    return binary


def numbers(*command: str | Path) -> list[float]:
    return [float(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("g++", CROSS, "qemu-aarch64"))), reason="no cross compiler for aarch64, or no qemu-user"
)
def test_the_kernel_on_aarch64_computes_the_same(tmp_path: Path) -> None:
    here = numbers(built("g++", tmp_path))
    there = numbers("qemu-aarch64", built(CROSS, tmp_path))
    # Five tokens of 96 in float32, and in bfloat16.
    assert len(here) == len(there) == 2 * 5 * 96
    assert there == pytest.approx(here, abs=1e-2)
    assert there[:480] == pytest.approx(here[:480], abs=1e-5)
    assert len(set(here)) > 400


def test_it_compiles_for_aarch64(tmp_path: Path) -> None:
    if not shutil.which(CROSS):
        pytest.skip("no cross compiler for aarch64")
    for name in ("training.cpp", "elementwise.cpp"):
        subprocess.run(
            [CROSS, "-O0", "-std=c++17", "-fopenmp", "-w", "-c", SOURCES / name, "-o", tmp_path / "o"], check=True
        )
