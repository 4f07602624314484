"""`make bench-gpu`: the routed path on one GPU at LLaMA-2-7B sizes, a layer at a time. Needs torch, triton and numpy.

    python -m benchmarks.gpu [--json FILE] [--tune]     on a GPU
    python -m benchmarks.gpu --smoke                    tiny sizes, through Triton's interpreter where there is none

Serving runs as CUDA graphs over several layers, each with weights of its own, so that no cache holds them. It is
compared with the roofline (least bytes and FLOPs, at ceilings measured in the same run), with the loop over experts as
the paper's authors write it, and with a decoder layer's matrix products. Training is forward and backward of one layer,
compared with the loop.

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.ops import TrainingSizes, expert_loop, training_variants
from mtlora.ops import tuning
from mtlora.ops.mix import Mix
from mtlora.ops.packed_block import pack_block
from mtlora.ops.plan import DevicePlan
from mtlora.ops.reference import ReferenceAdapter, routed_lora_batch_reference
from mtlora.ops.table import AdapterRows, AdapterTable

Run = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """A model's and an adapter's sizes, and the batches to time."""

    D: int = 4096
    intermediate: int = 11008
    r: int = 16
    N: int = 16
    G: int = 2
    layers: int = 16
    tokens: tuple[int, ...] = (1, 64, 256, 2048)
    adapters: tuple[int, ...] = (1, 25, 64)
    training_tokens: int = 2048

    @property
    def weights(self) -> int:
        """Number of weights in one adapter's block."""
        return self.D * (self.r + self.G * self.N + self.N * self.r)

    @property
    def training(self) -> TrainingSizes:
        """Sizes of the training step."""
        return TrainingSizes(self.training_tokens, self.D, self.r, self.N, self.G)


TINY = Sizes(D=64, intermediate=96, r=4, N=4, G=2, layers=2, tokens=(1, 9), adapters=(1, 3), training_tokens=16)


class Batch:
    """One batch over one set of adapters, ready to run layer after layer."""

    def __init__(self, sizes: Sizes, tokens: int, adapters: int, device: torch.device) -> None:
        self.sizes, self.tokens, self.adapters = sizes, tokens, min(tokens, adapters)
        dtype, (D, r, N, G) = torch.bfloat16, (sizes.D, sizes.r, sizes.N, sizes.G)

        def randn(*size: int, scale: float) -> torch.Tensor:
            return torch.randn(*size, device=device, dtype=dtype) * scale

        self.table = AdapterTable(sizes.layers, self.adapters, hidden_size=D, dtype=dtype, device=device)
        self.first_layer: list[ReferenceAdapter] = []
        for row in range(self.adapters):
            blocks = []
            for _ in range(sizes.layers):
                A, R = randn(r, D, scale=D**-0.5), randn(G * N, D, scale=D**-0.5)
                B = randn(N, D, r, scale=r**-0.5)
                blocks.append(pack_block(A, B, R, num_groups=G, scaling=4.0, dtype=dtype))
                if len(blocks) == 1:
                    self.first_layer.append(ReferenceAdapter(A, B, R, None, G, 4.0))
            self.table.place(row, AdapterRows(blocks, as_given=True))
        tile_size = tuning.tile_size(tokens)
        self.row_T = np.arange(tokens) % self.adapters
        self.plan = DevicePlan(tokens, self.adapters, tile_size=tile_size, device=device).set(
            self.row_T, np.full(tokens, -1)
        )
        self.x_TD, self.y_TD = randn(tokens, D, scale=1.0), torch.zeros(tokens, D, device=device, dtype=dtype)

    def run_layer(self, layer: int, launch: tuning.Launch | None = None) -> None:
        """Add the path of one layer to y."""
        from mtlora.ops import triton_gpu

        mix = Mix.of(self.y_TD, self.x_TD, self.table, layer, self.plan)
        triton_gpu.add_mixed_paths_(mix, self.table.limits, self.plan.tile_size, launch)

    def run(self, launch: tuning.Launch | None = None) -> None:
        """Run the path of every layer."""
        for layer in range(self.sizes.layers):
            self.run_layer(layer, launch)

    def error(self) -> float:
        """Relative error of the first layer against the oracle, on up to 16 tokens."""
        self.y_TD.zero_()
        self.run_layer(0)
        some = slice(0, min(16, self.tokens))
        cpu = [
            ReferenceAdapter(a.lora_A_rD.cpu(), a.lora_B_NDr.cpu(), a.lora_route.cpu(), *a[3:])
            for a in self.first_layer
        ]
        expected = routed_lora_batch_reference(
            self.x_TD[some].cpu(), cpu, self.row_T[some].tolist(), [-1] * len(self.row_T[some])
        )
        return float((self.y_TD[some].cpu().double() - expected).norm() / expected.norm())

    def roofline(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The least seconds a layer can take: weights read once, x read once, y read and written."""
        D = self.sizes.D
        moved = 2 * (self.adapters * self.sizes.weights + 3 * self.tokens * D)
        return max(moved / bytes_per_second, 2 * self.tokens * self.sizes.weights / flops_per_second)


def graph_seconds(run: Run, repeats: int = 30) -> float:
    """Median seconds of one replay of `run`, captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return event_seconds(graph.replay, repeats)


def event_seconds(run: Run, repeats: int = 30) -> float:
    """Median seconds of `run`, between two events on the device."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def ceilings() -> tuple[float, float]:
    """(bytes a second of a large copy, FLOPs a second of a large bfloat16 product), on this card, now."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / event_seconds(lambda: target.copy_(source))
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return bandwidth, 2 * n**3 / event_seconds(lambda: torch.mm(a, b, out=c))


def decoder_products(sizes: Sizes, tokens: int, device: torch.device) -> Run:
    """The matrix products of `layers` decoder layers: q, k, v, o, gate, up, down."""
    D, wide = sizes.D, sizes.intermediate
    shapes = [(D, D)] * 4 + [(wide, D)] * 2 + [(D, wide)]
    layers = min(4, sizes.layers)
    weights = [torch.randn(*s, device=device, dtype=torch.bfloat16) for _ in range(layers) for s in shapes]
    inputs = {n: torch.randn(tokens, n, device=device, dtype=torch.bfloat16) for n in (D, wide)}

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return run


def authors_loop(batch: Batch) -> Run:
    """The loop over experts, adapter by adapter, on the first layer."""
    groups = [torch.from_numpy(np.flatnonzero(batch.row_T == a)).to(batch.x_TD.device) for a in range(batch.adapters)]

    def run() -> None:
        for tokens, adapter in zip(groups, batch.first_layer, strict=True):
            A, B, R, _, num_groups, scaling = adapter
            batch.y_TD.index_add_(0, tokens, expert_loop(batch.x_TD[tokens], A, B, R, num_groups, scaling))

    return run


def tune(sizes: Sizes, device: torch.device) -> Path:
    """Time many launches for every shape and keep the best of each in the card's file."""
    entries = []
    for tokens, adapters in itertools.product(sizes.tokens, sizes.adapters):
        batch = Batch(sizes, tokens, adapters, device)
        best, seconds = tuning.Launch(), float("inf")
        for launch in tuning.candidates():
            try:
                measured = graph_seconds(lambda c=batch, way=launch: c.run(way), repeats=8)  # type: ignore[misc]
            except (RuntimeError, ValueError):  # needs more shared memory or registers than this card has
                torch.cuda.synchronize()
                continue
            if measured < seconds:
                best, seconds = launch, measured
        print(f"{tokens:>5} tokens {adapters:>3} adapters {seconds / sizes.layers * 1e6:8.1f} us  {best}")
        entries.append(tuning.Tuned(sizes.D, tokens, len(batch.plan.tiles_M3), best))
    return tuning.save(tuning.card(device), entries)


def measure(sizes: Sizes) -> dict[str, object]:
    """Measure everything; print each row when it is done."""
    device = torch.device("cuda")
    bandwidth, flops = ceilings()
    name = torch.cuda.get_device_name()
    print(f"{name}: {bandwidth / 1e12:.2f} TB/s copied, {flops / 1e12:.0f} TFLOP/s in bfloat16 products; us a layer")
    print(f"{'tokens':>7}{'adapters':>9}{'path':>9}{'roofline':>10}{'of it':>7}{'loop':>10}{'layer':>9}{'share':>7}")
    rows = []
    for tokens in sizes.tokens:
        layer = graph_seconds(decoder_products(sizes, tokens, device)) / min(4, sizes.layers)
        for adapters in sizes.adapters:
            batch = Batch(sizes, tokens, adapters, device)
            error = batch.error()
            if error > 1e-2:
                raise SystemExit(f"{tokens} tokens, {adapters} adapters: relative error {error:.1e}")
            path = graph_seconds(batch.run) / sizes.layers
            floor = batch.roofline(bandwidth, flops)
            loop = event_seconds(authors_loop(batch))
            rows.append(
                {"tokens": tokens, "adapters": adapters, "path": path, "roofline": floor, "loop": loop, "layer": layer}
            )
            print(
                f"{tokens:>7}{adapters:>9}{path * 1e6:>9.1f}{floor * 1e6:>10.1f}{floor / path:>7.0%}"
                f"{loop * 1e6:>10.1f}{layer * 1e6:>9.1f}{path / layer:>7.1%}",
                flush=True,
            )
    training = {}
    for label, run in training_variants(sizes.training, device.type).items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = event_seconds(run)
        training[label] = {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() - before}
        print(f"training, {sizes.training_tokens} tokens, {label}: {seconds * 1e3:.2f} ms, "
              f"{training[label]['peak_bytes'] / 2**20:.0f} MiB more at peak")  # fmt: skip
    return {
        "card": name,
        "bytes_per_second": bandwidth,
        "flops_per_second": flops,
        "serving": rows,
        "training": training,
    }


def smoke() -> None:
    """Run every part once at tiny sizes, on the GPU or through Triton's interpreter. Times nothing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for tokens, adapters in itertools.product(TINY.tokens, TINY.adapters):
        batch = Batch(TINY, tokens, adapters, device)
        error = batch.error()
        batch.run()
        authors_loop(batch)()
        print(f"smoke: {tokens} tokens, {adapters} adapters: relative error {error:.1e}")
        if error > 1e-2:
            raise SystemExit("smoke: the kernels do not compute the formula")
    decoder_products(TINY, 2, device)()
    for run in training_variants(TINY.training, device.type).values():
        run()
    print(f"smoke: all parts ran on {device}; nothing was timed")


def main() -> None:
    """Run the parts that the flags select."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--tune", action="store_true", help="time many launches and keep the best for this card")
    parser.add_argument("--smoke", action="store_true", help="run everything once at tiny sizes")
    options = parser.parse_args()
    if options.smoke:
        smoke()
        return
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: there is no GPU here, so nothing was measured (--smoke runs tiny sizes without one)")
    if options.tune:
        print(f"wrote {tune(Sizes(), torch.device('cuda'))}")
    results = measure(Sizes())
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    torch.manual_seed(0)
    main()
