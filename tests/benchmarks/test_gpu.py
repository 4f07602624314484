"""`make bench-gpu` where there is no GPU: what it counts, predicts and imports, and its smoke run."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, serving, work
from benchmarks.gpu.adapters import Adapters
from benchmarks.gpu.backbones import AdapterShape
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
