"""The portable kernels on aarch64 (NEON), cross-compiled and run by qemu, against the same kernels on this processor.

On this processor test_cpu.py and test_cpu_elementwise.py hold them to their formulas. Training's kernel is compiled.
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
    sources = [SOURCES / "serving.cpp", SOURCES / "elementwise.cpp", driver]
    subprocess.run([compiler, *flags, *sources, "-o", binary], check=True, capture_output=True)
    return binary


def numbers(*command: str | Path) -> list[float]:
    return [float(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("g++", CROSS, "qemu-aarch64"))), reason="no cross compiler for aarch64, or no qemu-user"
)
def test_the_kernels_on_aarch64_compute_the_same(tmp_path: Path) -> None:
    here = numbers(built("g++", tmp_path))
    there = numbers("qemu-aarch64", built(CROSS, tmp_path))
    # Five tokens of 96; nine outputs of 37 rows of 37 and one of 37. In float32, and in bfloat16.
    routed, elementwise = 5 * 96, 9 * 37 * 37 + 37
    assert len(here) == len(there) == 2 * (routed + elementwise)
    exact, rounded = slice(2 * routed, 2 * routed + elementwise), slice(2 * routed + elementwise, None)
    assert there[:routed] == pytest.approx(here[:routed], abs=1e-5)
    assert there[routed : 2 * routed] == pytest.approx(here[routed : 2 * routed], abs=1e-2)
    assert there[exact] == pytest.approx(here[exact], rel=1e-5, abs=1e-5)
    assert there[rounded] == pytest.approx(here[rounded], rel=2**-7, abs=1e-3)
    assert len(set(here[:routed])) > 400
    assert len(set(here[exact])) > 8_000


@pytest.mark.skipif(not shutil.which(CROSS), reason="no cross compiler for aarch64")
def test_training_compiles_for_aarch64(tmp_path: Path) -> None:
    flags = ["-O0", "-std=c++17", "-fopenmp", "-w", "-c"]
    subprocess.run([CROSS, *flags, SOURCES / "training.cpp", "-o", tmp_path / "o"], check=True)
