"""A step on a GPU: its plan goes to a buffer of fixed address, and every block launches the same kernels.

Graphs are captured in warm-up runs, whose slots are empty: they hold the launches because the mapping names slots, and
replay them for any later plan. Replaying never comes here, so the plan on the device is what counts, a step without
adapters has an empty one, and it stays where vLLM leaves the mapping as it was.

Shape suffixes: T tokens of the step, D hidden size, G groups, N experts.
"""

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from mtlora.ops import tuning
from mtlora.ops.plan import DevicePlan, StepPlan, plan_step
from mtlora.ops.table import AdapterTable, Field
from mtlora.ops.triton_gpu import SAMPLE_TOKENS, Buffers, Path
from mtlora.ops.tuning import KernelConfig
from mtlora.vllm_plugin.packed import Slot
from mtlora.vllm_plugin.sampling import RoutingSampler
from mtlora.vllm_plugin.seams import available
from mtlora.vllm_plugin.step import StepMapping


class _Sample(NamedTuple):
    """Where the routing of a step's sample is: of which adapter version, and its shape [T, G, N]."""

    name: str
    shape: tuple[int, int, int]


class _Beside:
    """A second stream, which the block's own stream waits for before it goes on."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._start, self._done = torch.cuda.Event(), torch.cuda.Event()

    def begin(self, path: Path, x_TD: torch.Tensor, block: int) -> None:
        """Launch the shrink there, after what the running stream has been given so far."""
        self._start.record()
        with torch.cuda.stream(self._stream):
            self._start.wait()
            path.begin(x_TD, block)
            self._done.record()

    def join(self) -> None:
        """Make the running stream wait for it."""
        self._done.wait()


class GpuStep(StepMapping):
    """A model's steps on a GPU. side_stream: whether a shrink that may run beside its block does."""

    begins = True

    def __init__(
        self,
        table: AdapterTable,
        config: KernelConfig,
        sampler: RoutingSampler | None = None,
        *,
        side_stream: bool = False,
    ) -> None:
        device = table.rows_LAF.device
        self._plan = DevicePlan(config, device)
        self.path = Path(config, Buffers.of(config, self._plan.words_W, table.rows_LAF.transpose(0, 1)))
        self.scratch = self.path.buffers.scratch_QC
        self._beside = _Beside(device) if side_stream and available("second stream") else None
        # Whether the shrink of the running block is on the second stream.
        self._forked = False
        self._sample_due = False
        self._sample: _Sample | None = None
        self._copied: deque[tuple[_Sample, torch.Tensor, torch.cuda.Event | None]] = deque()
        super().__init__(table, sampler)
        self.path.warm_up()

    def _take(self, row_T: np.ndarray, bias_row_T: np.ndarray, slots: dict[int, Slot], *, any_slot: bool) -> None:
        self._launches = any_slot
        plan = plan_step(row_T, bias_row_T, num_rows=self._table.num_rows, tile_size=tuning.tile_size(len(row_T)))
        self._plan.set(plan, self._table.counts_AC, self._choose_sample(plan, slots) if self._sample_due else None)
        self._sample_due = False

    def begin(self, x_TD: torch.Tensor, block: int, *, beside: bool) -> None:
        """Launch the shrink, on the second stream where it may run beside the block."""
        if not self._launches:
            return
        self._forked = beside and self._beside is not None and not _graph_is_broken()
        if self._forked:
            assert self._beside is not None
            self._beside.begin(self.path, x_TD, block)
        else:
            self.path.begin(x_TD, block)

    def finish_(self, y_TD: torch.Tensor, x_TD: torch.Tensor, block: int) -> None:
        """Launch the expand, after the shrink. x is named so that nothing takes its memory before that."""
        if not self._launches:
            return
        if self._forked:
            assert self._beside is not None
            self._beside.join()
        self.path.finish_(y_TD, block)

    def next_step(self) -> bool:
        """Take the last sample, if a step made one, without waiting for it; say whether this step makes one."""
        if self.sampler is None:
            return False
        while self._copied and ((event := self._copied[0][2]) is None or event.query()):
            sample, values, _ = self._copied.popleft()
            self.sampler.add(sample.name, values.view(sample.shape))
        last, self._sample = self._sample, None
        if last is not None:
            self._copy(last)
        self._sample_due = self.sampler.next_step()
        # After a sample, a new plan must clear its flag.
        return self._sample_due or last is not None

    def _choose_sample(self, plan: StepPlan, slots: dict[int, Slot]) -> tuple[int, int] | None:
        assert self.sampler is not None
        block, tile = self.sampler.place(plan.num_tiles)
        if not plan.num_tiles:
            return None
        row, _, count = plan.tiles_M3[tile].tolist()
        held = self._table.held(row)
        assert held is not None
        fields = held.rows_LF[block].tolist()
        if not fields[Field.RANK]:
            return None
        self._sample = _Sample(
            slots[row].version, (min(count, SAMPLE_TOKENS), fields[Field.GROUPS], fields[Field.EXPERTS])
        )
        return block, tile

    def _copy(self, sample: _Sample) -> None:
        T, G, N = sample.shape
        values = self.path.buffers.samples[:T, : G * N]
        on_gpu = values.device.type == "cuda"
        host = torch.empty(values.shape, pin_memory=on_gpu).copy_(values, non_blocking=True)
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        self._copied.append((sample, host, event))


def _graph_is_broken() -> bool:
    """Whether a graph is being captured that breaks off at attention; vLLM uses no second stream in such."""
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture

    return bool(BreakableCUDAGraphCapture.is_active())
