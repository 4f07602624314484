"""`make bench-gpu` where there is no GPU: what it counts, predicts and imports, and its smoke run."""

import contextlib
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, serving, step_model, work
from benchmarks.gpu.adapters import Adapters
from benchmarks.gpu.assembly import Assembly
from benchmarks.gpu.backbones import LLAMA_3_8B, AdapterShape
from benchmarks.gpu.cases import SHAPE_CLASSES
from mtlora.ops import triton_gpu  # noqa: F401  these tests run the interpreter, which makes them slow ones
from mtlora.ops.tuning import KernelConfig
from tests.benchmarks import traffic

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so no interpreter")


def counted(
    config: KernelConfig, shape: AdapterShape, tokens: int, live: int
) -> tuple[traffic.Traffic, traffic.Traffic]:
    adapters = Adapters(config, CPU, shape)
    for row in range(live):
        adapters.place(row, seed=row)
    adapters.plan_tokens(np.arange(tokens) % live)
    return traffic.of_a_block(adapters, tokens)


def config_of(hidden: int, *, slots: int = 4, num_sms: int = 1) -> KernelConfig:
    return KernelConfig(
        hidden_size=hidden, dtype=torch.bfloat16, num_blocks=1, max_adapters=slots, max_tokens=1024, num_sms=num_sms
    )


@pytest.mark.parametrize(
    ("hidden", "shape", "tokens", "live", "most"),
    [
        (256, AdapterShape(16, 8, 2), 3, 2, 1.1),
        (128, AdapterShape(32, 4, 1), 40, 1, 1.1),
        (128, AdapterShape(16, 4, 2), 520, 1, 1.3),
    ],
    ids=["decode", "decode-larger", "prefill"],
)
def test_kernels_move_the_bytes_that_the_model_counts_and_weights_once_a_tile(
    hidden: int, shape: AdapterShape, tokens: int, live: int, most: float
) -> None:
    config = config_of(hidden, num_sms=2)
    tiles = work.step_plan(config, shape, tokens, live).num_tiles
    needed = 2 * shape.block_weights(hidden)
    loaded = 0
    for found, counts in zip(
        counted(config, shape, tokens, live), work.of_block(config, shape, tokens, live), strict=True
    ):
        loaded += found.loaded_bytes("weights")
        assert found.loaded_bytes("weights") == counts.weights
        assert found.touched_bytes("weights") == counts.memory
        assert found.loaded_bytes("x") + found.loaded_bytes("y") == counts.inputs
        assert found.loaded_bytes("scratch") == counts.scratch
        assert traffic.SECTOR * sum(found.stored.values()) == counts.stored
        assert not found.loaded["elsewhere"]
        assert sum(found.products.values()) == counts.items * counts.products
    assert loaded <= most * needed * tiles


def test_programs_that_load_weights_do_not_depend_on_slots() -> None:
    shape = AdapterShape(16, 4, 2)
    few, many = (counted(config_of(128, slots=slots, num_sms=4), shape, 2, 1) for slots in (1, 256))
    for one, other in zip(few, many, strict=True):
        assert one.programs["weights"] == other.programs["weights"]
        assert one.loaded == other.loaded


def test_a_wrong_adapter_fails_the_check() -> None:
    case = SHAPE_CLASSES["ragged-sizes"]
    assert correctness.run("", case, torch.bfloat16, CPU).right
    other = replace(case, rows=tuple(1 if row == 0 else row for row in case.rows), bias_rows=(-1,) * len(case.rows))
    batch_of = correctness.Batch

    class Wrong(batch_of):
        def __init__(self, case: object, *args: object, **kwargs: object) -> None:
            super().__init__(case, *args, **kwargs)
            self.expected_TD = batch_of(other, *args, **kwargs).expected_TD

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correctness, "Batch", Wrong)
        assert not correctness.run("", case, torch.bfloat16, CPU).right


def test_checks_without_time_are_not_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert correctness.check_all(CPU, lambda: 0.0, small=True) == (0, 4)
    assert serving.check_all(serving.SMALL, CPU, lambda: 0.0) == (0, 8)
    assert "4 skipped" in capsys.readouterr().out


def test_the_model_prefers_less_work() -> None:
    shape = AdapterShape()
    config = KernelConfig(4096, torch.bfloat16, 32, 256, 8192)
    for few, many in zip(work.of_block(config, shape, 64, 1), work.of_block(config, shape, 64, 25), strict=True):
        assert many.memory == 25 * few.memory
        assert many.weights > few.weights


CODE = Assembly(90, 4, registers=96, shared=40960, stack=0, instructions=1000, in_product_loop=100, ptx="")


def test_a_prediction_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_model, "_assembled", lambda *_: (CODE, CODE))
    card, by = step_model.CARDS[1], step_model.ASSUMED
    found = step_model.predict(LLAMA_3_8B, card, 64, 1)
    # Bytes of bfloat16 weights through 90 % of the memory's rate; 7 small kernels and 11 gaps a layer, of 1 µs each.
    weights = 2 * (32 * (4096 * (6144 + 4096) + 3 * 4096 * 14336) + 128256 * 4096)
    assert found.backbone == pytest.approx(weights / (0.9 * 3.35e12) + 32 * 18e-6)
    # Two launches a layer: gap, three loads from the L2 cache, two from memory, a thousand instructions and more.
    least = 32 * 2 * (by.gap + 3 * by.l2_latency + 2 * by.memory_latency + 1000 * 3 / card.clock)
    assert least < found.path["one stream"] < 1.5 * least
    assert found.path["both"] == pytest.approx(found.path["one stream"] + 32 * 2 * 2e-6)
    assert found.path["side stream"] < found.path["one stream"] < found.path["piecewise"]
    alone = step_model.predict(LLAMA_3_8B, card, 64, 1, ranks=2)
    assert alone.path["one stream"] == found.path["one stream"]
    assert alone.ratio("one stream") < found.ratio("one stream")


def test_the_documents_table_is_the_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compares the columns that need no compiler, and the rows above it."""
    monkeypatch.setattr(step_model, "_assembled", lambda *_: (CODE, CODE))
    monkeypatch.setattr(step_model, "PICTURE", tmp_path / "model.png")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        step_model.report()
    assert (tmp_path / "model.png").stat().st_size > 10_000

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip("|").split("|")]

    model = {tuple(row[1:4]): row[4:] for row in map(cells, printed.getvalue().splitlines()) if row[0] == "Llama-3-8B"}
    text = Path("docs/benchmarks.md").read_text()
    rows = [cells(line) for line in text.splitlines() if line.startswith(("| A100 |", "| H100 |", "| B200 |"))]
    assert len(rows) > 20
    for card, step, live, alone, *ways, bound in rows:
        found = model[card, step, live]
        assert [alone, bound] == [found[0], found[-1]]
        assert len(ways) == len(found) - 2
    both, one_stream = next(row[5:7] for row in rows if row[:3] == ["H100", "decode 64", "1"])
    assert f"| the same on one stream, `--adapter-blocks ffn` | {one_stream} |" in text
    assert f"| the same on one stream, `--adapter-blocks both`, as by default | {both} |" in text


BARE = """
import sys
allowed = sys.stdlib_module_names | {"torch", "triton", "numpy", "mtlora", "benchmarks", "tests", *%r}
class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and not top.startswith("_"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
import torch, triton, numpy
import torch._dynamo
sys.meta_path.insert(0, Block())
for module in [name for name in sys.modules if name.partition(".")[0] in ("mtlora", "benchmarks", "tests")]:
    del sys.modules[module]
import benchmarks.gpu.__main__
from benchmarks.gpu import correctness, decoder, serving, training, timing, vllm_sources
import mtlora.ops.training
print("imported")
"""


def test_a_bare_machine_needs_torch_triton_and_numpy_alone() -> None:
    done = subprocess.run([sys.executable, "-c", BARE % []], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="there is no GPU here, so nothing was measured"):
        command.main()


def test_the_smoke_run_ends_in_the_line_for_machines() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--smoke"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "bench-gpu: correct 12 of 12"
