"""A captured graph without a GPU: records launches and replays them later unchanged.

Shape suffixes: T rows of x and y (tokens and padding), D hidden size, A rows of the table, L blocks, r rank, N experts,
G groups.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from benchmarks.gpu.cases import TOLERANCE, ReferenceAdapter, Shape, routed_lora_batch_reference
from mtlora.ops import tuning
from mtlora.ops.packed_block import pack_block
from mtlora.ops.plan import DevicePlan, plan_step
from mtlora.ops.table import AdapterRows, AdapterTable, Field, Layout
from mtlora.ops.triton_gpu import Buffers, Launch, Path
from mtlora.ops.tuning import KernelConfig

NAN = float("nan")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Value of poisoned words behind a plan: an index outside every buffer.
STALE = 2**30
# Extra columns behind every row of x and y, so that the row stride exceeds the row length.
MARGIN = 16


class Graph:
    """Launches and other work, in the order in which they were given while it was captured."""

    capturing: ClassVar["Graph | None"] = None

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.launched: list[tuple[Launch, dict[str, Any]]] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Write launches down instead of launching."""
        launch_now = Launch.run

        def write_down(launch: Launch, values: dict[str, Any]) -> None:
            self.launched.append((launch, values))
            self.work.append(lambda: launch_now(launch, values))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "run", write_down)
            patch.setattr(Graph, "capturing", self)
            yield

    @staticmethod
    def do(work: Callable[[], object]) -> None:
        """Do other work than launches of this project, or record it while capturing."""
        if Graph.capturing is None:
            work()
        else:
            Graph.capturing.work.append(work)

    def replay(self) -> None:
        """Run the recorded work with the recorded arguments."""
        for run in self.work:
            run()

    def signature(self, static: Sequence[torch.Tensor] = ()) -> list[tuple[object, ...]]:
        """Kernel, grid, constants, options and arguments of every launch: tensors by address, or as `static` ones."""
        names = {tensor.data_ptr(): f"static {i}" for i, tensor in enumerate(static)}
        return [
            (
                launch.kernel.fn.__name__, launch.grid, sorted(launch.constants.items(), key=str), launch.num_warps,
                launch.num_stages,
                [(k, names.get(v.data_ptr(), v.data_ptr()) if isinstance(v, torch.Tensor) else v)
                 for k, v in values.items()],
            )
            for launch, values in self.launched
        ]  # fmt: skip


class Adapter:
    """A random adapter of several blocks, None for a block without a path, and the oracle's form of each block."""

    def __init__(self, shapes: Sequence[Shape | None], D: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        self.references: list[ReferenceAdapter | None] = []
        blocks = []
        for shape in shapes:
            if shape is None:
                self.references.append(None)
                blocks.append(None)
                continue
            A, R = (randn(n, D).div(D**0.5).to(dtype) for n in (shape.r, shape.G * shape.N))
            B = randn(shape.N, D, shape.r).div(shape.r**0.5).to(dtype)
            bias = randn(shape.bias_rows, shape.G, shape.N) if shape.bias_rows else None
            # A power of two, so that scaled experts round as experts do.
            self.references.append(ReferenceAdapter(A, B, R, bias, shape.G, 2.0))
            blocks.append(pack_block(A, B, R, num_groups=shape.G, scaling=2.0, dtype=dtype, bias_bGN=bias))
        self.rows = AdapterRows(blocks, layout=Layout.PADDED).to(DEVICE)
        for fields in self.rows.rows_LF.tolist():
            if fields[Field.RANK]:
                self._poison(fields, D, dtype)

    def _poison(self, fields: list[int], D: int, dtype: torch.dtype) -> None:
        """Write NaN behind the end of every row of weights, where rows are padded."""
        r, N, G = (fields[field] for field in (Field.RANK, Field.EXPERTS, Field.GROUPS))
        for field, rows, width in ((Field.SHRINK, D, r + G * N), (Field.EXPAND, G * N * r, D // G)):
            start, length = fields[field] - self.rows._bytes.data_ptr(), tuning.padded(width)
            held = self.rows._bytes[start : start + rows * length * dtype.itemsize].view(dtype).view(rows, length)
            held[:, width:] = NAN


class Engine:
    """Static buffers as an engine has them, and a graph of all its blocks captured over them.

    Every block computes y = 0 + path(x), each from an x of its own.
    """

    def __init__(self, config: KernelConfig, padded_tokens: int, rows_behind: int = 3) -> None:
        self.config, self.T = config, padded_tokens
        D, L, A = config.hidden_size, config.num_blocks, config.max_adapters
        self.table = AdapterTable(L, A, hidden_size=D, dtype=config.dtype, device=DEVICE, config=config)
        self.plan = DevicePlan(config, DEVICE)
        self.path = Path(config, Buffers.of(config, self.plan.words_W, self.table.rows_LAF.transpose(0, 1)))
        self.adapters: list[Adapter | None] = [None] * A
        # Rows of other tensors follow those of x and y in memory, columns of others every row.
        self._wide_x, self._wide_y = (
            torch.zeros(L, padded_tokens + rows_behind, D + MARGIN, dtype=config.dtype, device=DEVICE) for _ in range(2)
        )
        self.x_LTD, self.y_LTD = self._wide_x[..., :D], self._wide_y[..., :D]
        self.static = [*self.path.buffers, *self.x_LTD, *self.y_LTD]
        self.graph = Graph()
        with self.graph.capture():
            self.launch()

    def launch(self) -> None:
        """Launch every block."""
        for block in range(self.config.num_blocks):
            self.path.begin(self.x_LTD[block, : self.T], block)
            self.path.finish_(self.y_LTD[block, : self.T], block)

    def place(self, row: int, adapter: Adapter | None) -> None:
        """Put an adapter in a row of the table."""
        self.table.place(row, adapter and adapter.rows)
        self.adapters[row] = adapter

    def set(self, rows: Sequence[int], bias_rows: Sequence[int], sample: tuple[int, int] | None = None) -> None:
        """Plan a step, as an engine does before a replay."""
        self.rows, self.bias_rows = list(rows), list(bias_rows)
        plan = plan_step(
            np.array(rows, dtype=int), np.array(bias_rows, dtype=int), num_rows=len(self.adapters),
            tile_size=tuning.tile_size(len(rows)),
        )  # fmt: skip
        self.words_W = plan.words_W
        self.plan.words_W.fill_(STALE)
        self.plan.set(plan, self.table.counts_AC, sample)

    @contextlib.contextmanager
    def checked_addresses(self) -> Iterator[None]:
        """Hold every load and store of the interpreter to the buffers, the live words of the plan, and live weights."""
        if DEVICE.type == "cuda":
            yield
            return
        plan_W, *buffers = self.path.buffers
        used = plan_W[: len(self.words_W)]
        held = [adapter.rows._bytes for adapter in self.adapters if adapter]
        given = [tensor for _, values in self.graph.launched for name, tensor in values.items() if name in ("x", "y")]
        tensors = [used, *buffers, *held, *given]
        starts = np.array([t.data_ptr() for t in tensors], dtype=np.uint64)
        lengths = [1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) for t in tensors]
        ends = starts + np.array([n * t.itemsize for n, t in zip(lengths, tensors, strict=True)], dtype=np.uint64)
        stock = interpreter._interpreter

        def check(pointers: np.ndarray, mask: np.ndarray) -> None:
            live = pointers[mask]
            if live.size:
                inside = (starts <= live.min()) & (live.max() < ends)
                assert inside.any(), "a kernel left the buffers"

        def load(pointers: np.ndarray, mask: np.ndarray, *rest: object) -> object:
            check(pointers, mask)
            return stock.load(pointers, mask, *rest)

        def store(pointers: np.ndarray, values: object, mask: np.ndarray, *rest: object) -> object:
            check(pointers, mask)
            return stock.store(pointers, values, mask, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=store))
            yield

    def step(self, seed: int) -> None:
        """Give x and y new values in place, poison the rest, replay, and compare with the oracle."""
        T, planned = self.T, min(self.T, len(self.rows))
        generator = torch.Generator().manual_seed(seed)
        self.path.buffers.scratch_QC.fill_(NAN)
        self._wide_x.fill_(NAN)
        self._wide_y.fill_(7)
        for tensor in (self.x_LTD, self.y_LTD):
            tensor[:, :planned] = torch.randn(
                len(tensor), planned, tensor.shape[2], generator=generator
            ).to(tensor.dtype).to(DEVICE)  # fmt: skip
        before_LTD = self.y_LTD.cpu().clone()
        with self.checked_addresses():
            self.graph.replay()
        assert (self._wide_y[..., self.config.hidden_size :] == 7).all(), "a kernel wrote behind a row's end"
        for block in range(self.config.num_blocks):
            x_TD, y_TD, before_TD = (t[block].cpu() for t in (self.x_LTD, self.y_LTD, before_LTD))
            adapters = [adapter and adapter.references[block] for adapter in self.adapters]
            rows, bias_rows = self.rows[:planned], self.bias_rows[:planned]
            delta_TD = routed_lora_batch_reference(x_TD[:planned], adapters, rows, bias_rows)
            untouched_T = torch.tensor(
                [row < 0 or adapters[row] is None for row in rows] + [True] * (len(y_TD) - planned)
            )
            assert torch.equal(y_TD[untouched_T], before_TD[untouched_T]), "a row without an adapter was changed"
            expected_TD = before_TD[:planned].double() + delta_TD
            if planned:
                error = (y_TD[:planned].double() - expected_TD).norm() / expected_TD.norm()
                assert error < TOLERANCE[self.config.dtype], f"relative error {error:.2e} of {T} rows"
