"""The kernels' machine code for cards that this machine lacks."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.assembly import loaded_bytes, overlaps_register_products, stages


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Nothing compiled before.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.generated_code"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_card_gets_sound_code_without_spills(found: dict[str, list]) -> None:
    of_classes = {name: faults for name, faults in found.items() if name.startswith("sm_")}
    assert len(of_classes) == 10
    assert any("one stage" in name for name in of_classes)
    assert not any(of_classes.values()), of_classes


@pytest.mark.slow
def test_a_stage_too_many_for_an_unsound_assembler_is_found(found: dict[str, list]) -> None:
    assert found["overlaps"] == [False, True]
    assert found["a stage too many"] == ["_expand: WGMMA with A in registers is left running"]


@pytest.mark.slow
def test_a_stage_too_few_is_found(found: dict[str, list]) -> None:
    assert found["one stage"] == [
        "_shrink: loads in 1 stages, 3 are needed", "_expand: loads in 1 stages, 2 are needed",
    ]  # fmt: skip


@pytest.mark.slow
def test_stores_wider_than_groups_are_aligned_are_found(found: dict[str, list]) -> None:
    assert "_expand: stores of 8 bytes, y is aligned to 4" in found["wide stores"]


@pytest.mark.slow
def test_loads_of_few_bytes_are_found(found: dict[str, list]) -> None:
    aligned, odd = found["wide loads"]
    assert odd < aligned


REGISTERS = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2}, {%r3,%r4}, %rd1, %p1, 1, 1, 1;\n"
MEMORY = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2}, %rd2, %rd1, %p1, 1, 1, 1, 0;\n"


@pytest.mark.parametrize(
    ("ptx", "overlaps"),
    [
        (REGISTERS + "wgmma.wait_group.sync.aligned 1;", True),
        (REGISTERS + "wgmma.wait_group.sync.aligned 1;\nwgmma.wait_group.sync.aligned 0;", True),
        (REGISTERS + "wgmma.wait_group.sync.aligned 0;", False),
        (MEMORY + "wgmma.wait_group.sync.aligned 1;", False),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};", False),
    ],
)
def test_running_products_from_registers_are_told_from_others(ptx: str, overlaps: bool) -> None:
    assert overlaps_register_products(ptx) is overlaps


def test_loads_are_counted_by_width() -> None:
    ptx = """
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.b32 { %r1 }, [ %rd1 + 0 ];
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
    """
    assert loaded_bytes(ptx, 4, width=16) == 2 * 16 * 128
    assert loaded_bytes(ptx, 4, width=4) == 4 * 128


def test_stages_are_told_by_the_copies_that_a_wait_leaves_running() -> None:
    copy = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\n"
    found = {n: stages(f"{copy}cp.async.wait_group {n};") for n in ("0", "2", "0x1")}
    assert found == {"0": 2, "2": 3, "0x1": 3}
    assert stages("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];") == 1
