"""The Triton kernels against the oracle: compiled on a GPU, else through the interpreter."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton")

from benchmarks import gpu  # noqa: E402
from mtlora.ops import triton_gpu  # noqa: E402
from mtlora.ops.plan import DevicePlan  # noqa: E402
from mtlora.ops.table import TableLimits  # noqa: E402
from mtlora.ops.tuning import Launch, default  # noqa: E402
from tests.mtlora.ops.cases import SHAPE_CLASSES, Batch, Case, Shape, mixed, random_rows  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = not isinstance(triton_gpu._shrink, triton.JITFunction)
pytestmark = pytest.mark.skipif(not GPU and not INTERPRETED, reason="no GPU, and Triton came without its interpreter")

DECODE = Launch(parts=3, block_d=16, block_s=16, block_k=16, block_e=16)
PREFILL = Launch(parts=1, block_d=32, block_s=64, block_k=64, block_e=64)
# The interpreter is slow. 80 tokens still fill tiles of both sizes, and a part of one at 64.
FEWER_TOKENS = {
    "many-tokens-of-one": Case(32, (Shape(4, 2, 2, 2),), (0,) * 80, (1, -1, 0, 1) * 20),
    "many-tokens-of-many": mixed(40, 64),
}
CLASSES = SHAPE_CLASSES if GPU else SHAPE_CLASSES | FEWER_TOKENS


def run(batch: Batch, launch: Launch | None, limits: TableLimits | None = None) -> None:
    triton_gpu.add_mixed_paths_(batch.mix, limits or batch.limits, batch.plan.tile_size, launch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("launch", "tile_size"), [(DECODE, 16), (PREFILL, 64)], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", list(CLASSES))
def test_shape_classes_equal_the_formula(name: str, launch: Launch, tile_size: int, dtype: torch.dtype) -> None:
    batch = Batch(CLASSES[name], dtype, DEVICE, tile_size, as_given=True)
    run(batch, launch)
    batch.check()


@pytest.mark.parametrize("seed", range(6 if not GPU else 60))
def test_random_batches_equal_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    D = int(rng.choice([24, 60, 96]))
    divisors = [g for g in range(1, 33 if GPU else 9) if D % g == 0]
    shapes = tuple(
        None if rng.random() < 0.2 else Shape(int(rng.integers(1, 20)), int(rng.integers(1, 9)),
                                              int(rng.choice(divisors)), int(rng.integers(0, 3)))
        for _ in range(rng.integers(1, 5))
    )  # fmt: skip
    case = Case(D, shapes, *random_rows(shapes, int(rng.integers(1, 24)), seed), seed=seed)
    batch = Batch(case, [torch.float32, torch.bfloat16][seed % 2], DEVICE, 16, as_given=True)
    run(batch, DECODE)
    batch.check()


def test_default_launch_and_wider_limits_equal_the_formula() -> None:
    batch = Batch(mixed(5, 48), torch.float32, DEVICE, 16, as_given=True)
    run(batch, None, batch.limits | TableLimits(rank=20, experts=9, groups=6))
    batch.check()


def test_defaults_fill_a_card() -> None:
    assert default(4096, tiles=1).parts == 16
    assert default(4096, tiles=1000).parts == 1
    assert default(128, tiles=1).parts == 1


def test_padding_tiles_do_nothing() -> None:
    batch = Batch(mixed(7, 48), torch.float32, DEVICE, 16, as_given=True)
    case = mixed(7, 48)
    batch.plan = DevicePlan(12, len(case.shapes), tile_size=16, device=torch.device(DEVICE)).set(
        np.array(case.rows), np.array(case.bias_rows)
    )
    run(batch, DECODE)
    batch.check()


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_graph_serves_another_mix_than_it_was_captured_with() -> None:
    device = torch.device("cuda")
    shapes = (Shape(4, 3, 2), Shape(16, 8, 4, 5), Shape(5, 1, 1))
    first = Batch(mixed(12, 96, shapes, seed=1), torch.bfloat16, "cuda", 16)
    buffers = DevicePlan(12, len(shapes), tile_size=16, device=device)
    first.plan = buffers.set(*(np.array(a) for a in random_rows(shapes, 12, 1)))
    run(first, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(first, None)
    for seed in (2, 3):
        case = mixed(12, 96, shapes, seed=seed)
        other = Batch(case, torch.bfloat16, "cuda", 16)
        for row in range(len(shapes)):
            first.table.place(row, other.table.held(row))
        buffers.set(np.array(case.rows), np.array(case.bias_rows))
        first.x_TD.copy_(other.x_TD)
        first.y_TD.copy_(other.y_TD)
        graph.replay()
        other.y_TD = first.y_TD
        other.check()


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_operator_equals_the_formula_on_a_gpu() -> None:
    batch = Batch(mixed(40, 96), torch.bfloat16, "cuda", 16)
    limits = batch.limits
    torch.ops.mtlora.add_mixed_paths_(*batch.mix, [limits.rank, limits.experts, limits.groups, limits.alignment], 16)
    batch.check()


def test_kernels_compile_for_cards() -> None:
    """With wide loads and tensor cores, on any machine: compiling needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.mtlora.ops.compile_kernels"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 8


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_gpu_benchmark_fails_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="there is no GPU here, so nothing was measured"):
        gpu.main()


def test_gpu_benchmark_runs_at_tiny_sizes() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--smoke"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all parts ran" in done.stdout
