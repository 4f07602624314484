"""The Triton kernels against the oracle: compiled on a GPU, else through the interpreter."""

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton")

from benchmarks.gpu.cases import SHAPE_CLASSES, Batch, Case, Shape, mixed, random_rows  # noqa: E402
from mtlora.ops import triton_gpu  # noqa: E402
from mtlora.ops.plan import DevicePlan  # noqa: E402
from mtlora.ops.table import Layout  # noqa: E402
from mtlora.ops.triton_gpu import Buffers, Path  # noqa: E402
from mtlora.ops.tuning import KernelConfig  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = not isinstance(triton_gpu._shrink, triton.JITFunction)
pytestmark = pytest.mark.skipif(not GPU and not INTERPRETED, reason="no GPU, and Triton came without its interpreter")

# The interpreter is slow. 40 tokens still fill tiles of both sizes.
FEWER_TOKENS = {
    "many-tokens-of-one": Case(32, (Shape(4, 2, 2, 2),), (0,) * 40, (1, -1, 0, 1) * 10),
    "many-tokens-of-many": mixed(40, 64),
}
KINDS = [(16, torch.float32), (16, torch.bfloat16), (64, torch.float32), (64, torch.float16)]
CLASSES = SHAPE_CLASSES if GPU else SHAPE_CLASSES | FEWER_TOKENS


def run(case: Case, dtype: torch.dtype, tile_size: int) -> None:
    """A case through the kernels for its number of tokens, or for so many that tiles are large."""
    padded = len(case.rows) if tile_size == 16 else 513
    live = [shape for shape in case.shapes if shape] or [Shape(1, 1, 1)]
    config = KernelConfig(
        case.D, dtype, num_blocks=1, max_adapters=len(case.shapes), max_tokens=max(padded, len(case.rows)),
        max_rank=max(s.r for s in live), max_experts=max(s.N for s in live), max_groups=max(s.G for s in live),
        num_sms=132 if GPU else 1, max_parts=2,
    )  # fmt: skip
    batch = Batch(case, dtype, DEVICE, tile_size, layout=Layout.PADDED, config=config)
    plan = DevicePlan(config, batch.device)
    plan.set(batch.plan, batch.table.counts_AC)
    path = Path(config, Buffers.of(config, plan.words_W, batch.table.rows_LAF.transpose(0, 1)))
    T = len(case.rows)
    x_TD, y_TD = (torch.zeros(max(padded, T), case.D, dtype=dtype, device=DEVICE) for _ in range(2))
    x_TD[:T], y_TD[:T] = batch.x_TD, batch.y_TD
    path.begin(x_TD, 0)
    path.finish_(y_TD, 0)
    batch.y_TD = y_TD[:T]
    batch.check()
    assert not y_TD[T:].any()


@pytest.mark.parametrize(("tile_size", "dtype"), KINDS)
@pytest.mark.parametrize("name", list(CLASSES))
def test_shape_classes_equal_the_formula(name: str, tile_size: int, dtype: torch.dtype) -> None:
    run(CLASSES[name], dtype, tile_size)


@pytest.mark.parametrize("seed", range(4 if not GPU else 60))
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
    run(case, [torch.float32, torch.bfloat16][seed % 2], 16)


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_graph_serves_another_mix_than_it_was_captured_with() -> None:
    from tests.mtlora.ops.replay import Adapter, Engine

    config = KernelConfig(576, torch.bfloat16, num_blocks=2, max_adapters=3, max_tokens=24)
    engine = Engine(config, 24)
    engine.set([], [])
    engine.launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.launch()
    engine.graph.work = [graph.replay]
    for seed in range(3):
        for row in range(3):
            shape = Shape(4 * (row + 1), 3, 4, 2)
            engine.place(row, Adapter([shape, shape], 576, torch.bfloat16, seed=10 * seed + row))
        engine.set([(t + seed) % 4 - 1 for t in range(20)], [t % 3 - 1 for t in range(20)])
        engine.step(seed)
