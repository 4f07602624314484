"""Serving on a card: a decoder's graph with and without the path, checked and timed.

Shape suffixes: T tokens, D hidden size.
"""

import gc
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import triton

from benchmarks.gpu import decoder, timing
from benchmarks.gpu.adapters import Adapters, config_for
from benchmarks.gpu.backbones import LLAMA_3_8B, SHAPE, TINY, AdapterShape, Backbone
from benchmarks.gpu.decoder import Decoder, Step
from benchmarks.gpu.timing import Ceilings
from mtlora.ops.tuning import tile_size

# Relative error of the final hidden state: a compiled step against plain torch ops with the path in float64. The step's
# own rounding to bfloat16 is a third of it; a wrong adapter gives ten times as much.
TOLERANCE = 3e-2
# Rows of the table; more than any step uses.
ROWS = 32
# Seconds that the measurements need.
TO_MEASURE = 240
# Scenarios in which replays of a step are checked.
MIXES = ("as captured", "another mix", "an adapter swapped", "no adapter")


@dataclass(frozen=True)
class Load:
    """What to run. tokens: of decode steps; prompt: of a prefill; layers: at most; adapters: live ones in a step."""

    backbone: Backbone = LLAMA_3_8B
    shape: AdapterShape = SHAPE
    tokens: tuple[int, ...] = (64, 1, 256, 16)
    prompt: int = 1024
    adapters: tuple[int, ...] = (1, 25)
    layers: int = 32
    compiled: str = "inductor"
    rounds: int = 15

    @property
    def steps(self) -> list[tuple[int, bool]]:
        """(tokens, whether it is a decode step), the most important first."""
        first, *further = self.tokens
        return [(first, True), (self.prompt, False), *((tokens, True) for tokens in further)]


# Compiled as on a card where there is a compiler for C++, which Inductor needs on CPUs.
SMALL = Load(
    TINY, AdapterShape(4, 4, 2), (2,), 3, (1, 2), 2, "inductor" if shutil.which("g++") else "aot_eager", 1
)  # fmt: skip


class Serving:
    """A decoder and adapters beside it, on a device."""

    def __init__(self, load: Load, device: torch.device, layers: int) -> None:
        self.load, self.device = load, device
        self._on_gpu = device.type == "cuda"
        before = self._allocated()
        self.decoder = Decoder(load.backbone, layers, device)
        self.backbone_bytes = self._allocated() - before
        config = config_for(
            device, hidden_size=load.backbone.hidden, dtype=torch.bfloat16, num_blocks=layers, max_adapters=ROWS,
            max_tokens=max(*load.tokens, load.prompt),
        )  # fmt: skip
        before = self._allocated()
        self.adapters = Adapters(config, device, load.shape)
        self.fixed_bytes = self._allocated() - before
        for row in range(max(load.adapters)):
            self.adapters.place(row, seed=row)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._on_gpu else 0

    def halves(self) -> dict[str, decoder.Halves]:
        """The ways to run a path, by name."""
        ways = {"one stream": decoder.on_one_stream(self.adapters)}
        if self._on_gpu:
            ways["side stream"] = decoder.on_two_streams(self.adapters)
        return ways

    @contextmanager
    def steps(self, tokens: int, *, decode: bool) -> Iterator[tuple[dict[str, Step], Callable[..., Step]]]:
        """(steps with the path by the way they run it, a function that makes others over the same tensors)."""
        inputs_TD = torch.randn(tokens, self.load.backbone.hidden, device=self.device).to(self.decoder.dtype)
        caches = self.decoder.caches(tokens) if decode else None

        def step(*, path: bool, plain: bool = False) -> Step:
            return Step(
                self.decoder, inputs_TD, caches, path=path, compiled=None if plain else self.load.compiled,
                captured=self._on_gpu and not plain,
            )  # fmt: skip

        self.plan(np.arange(tokens) % max(self.load.adapters))
        with_path = {}
        for name, way in self.halves().items():
            decoder.run_with(way)
            with_path[name] = step(path=True)
        yield with_path, step
        torch._dynamo.reset()
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()

    def plan(self, row_T: np.ndarray) -> None:
        """Plan a step's rows."""
        self.adapters.plan_tokens(row_T)

    def check(self, tokens: int, *, decode: bool) -> list[tuple[str, float]]:
        """(what, relative error) of replays: the captured mix, other mixes, a replaced adapter, no adapter."""
        rng = np.random.default_rng(tokens)
        found = []
        most = max(self.load.adapters)
        with self.steps(tokens, decode=decode) as (with_path, step):
            for way, captured in with_path.items():
                decoder.run_with(self.halves()[way])
                rows = (
                    np.arange(tokens) % most, rng.integers(-1, most, tokens), np.arange(tokens) % most,
                    np.full(tokens, -1),
                )  # fmt: skip
                for mix, row_T in zip(MIXES, rows, strict=True):
                    if mix == "an adapter swapped":
                        self.adapters.place(0, seed=int(rng.integers(1000, 2000)))
                    self.plan(row_T)
                    captured.replay()
                    hidden_TD = captured.hidden_TD.double()
                    expected = step(path=True, plain=True)
                    decoder.run_with(decoder.in_float64(self.adapters, row_T))
                    expected.run()
                    decoder.run_with(self.halves()[way])
                    error = (hidden_TD - expected.hidden_TD.double()).norm() / expected.hidden_TD.double().norm()
                    kind = "decode" if decode else "prefill"
                    found.append((f"{kind} of {tokens} tokens, {way}, {mix}", float(error)))
        return found

    def measure(self, tokens: int, *, decode: bool) -> dict[str, float]:
        """Median seconds of a step by variant; the path's as ratios of rounds, times the backbone's median."""
        with self.steps(tokens, decode=decode) as (with_path, step):
            variants: dict[str, tuple[timing.Run, timing.Run]] = {"backbone": (lambda: None, step(path=False).replay)}
            for way, captured in with_path.items():
                for live in (0, *self.load.adapters):
                    row_T = np.arange(tokens) % live if live else np.full(tokens, -1)
                    variants[f"{live} adapters, {way}"] = (lambda row_T=row_T: self.plan(row_T), captured.replay)  # type: ignore[misc]
            seconds = timing.interleaved(variants, self.load.rounds)
        alone = seconds["backbone"]
        medians = {
            name: statistics.median(alone) * statistics.median(s / a for s, a in zip(measured, alone, strict=True))
            for name, measured in seconds.items()
        }
        return medians


def floors(serving: Serving, tokens: int, live: int, top: Ceilings, *, decode: bool) -> tuple[float, float]:
    """Least seconds of a step, by bytes and operations: (backbone, path with `live` adapters)."""
    of, shape, D = serving.load.backbone, serving.load.shape, serving.load.backbone.hidden
    layers = len(serving.decoder.layers)
    rows = tokens if decode else 1
    cached = 2 * 2 * tokens * serving.decoder.context * of.kv_heads * of.head * layers if decode else 0
    products = 2 * (tokens * layers * of.layer_weights + rows * of.vocabulary * D)
    backbone = max((serving.decoder.weight_bytes() + cached) / top.bytes, products / top.operations)
    weights = shape.block_weights(D)
    moved = 2 * layers * (min(live, tokens) * weights + 3 * tokens * D)
    path = max(moved / top.bytes, 2 * layers * tokens * weights / top.operations)
    return backbone, path


def layers_that_fit(load: Load) -> int:
    """Layers of the backbone, with the adapters beside them and room for a step, in the card's free memory."""
    free, _ = torch.cuda.mem_get_info()
    of = load.backbone
    context = max(load.tokens) * 256 * 4 * of.kv_heads * of.head
    # Count adapters twice, because the oracle holds a copy.
    a_layer = 2 * of.layer_weights + context + 4 * max(load.adapters) * load.shape.block_weights(of.hidden)
    fixed = 2 * of.vocabulary * of.hidden + 4 * 2**30
    return max(1, min(load.layers, (free - fixed) // a_layer))


def check_all(load: Load, device: torch.device, seconds_left: Callable[[], float]) -> tuple[int, int]:
    """(right, all) of the checks of replays, over two layers; prints what is wrong. One without time is not right."""
    serving = Serving(load, device, min(2, load.layers))
    found: list[tuple[str, float]] = []
    skipped = 0
    for tokens, decode in load.steps:
        if seconds_left() < TO_MEASURE:
            print(f"no time to check steps of {tokens} tokens")
            skipped += len(serving.halves()) * len(MIXES)
            continue
        found += serving.check(tokens, decode=decode)
    wrong = [(what, error) for what, error in found if not error < TOLERANCE]
    for what, error in wrong:
        print(f"wrong: {what}: relative error {error:.1e}")
    worst = max((error for _, error in found), default=0.0)
    right, count = len(found) - len(wrong), len(found) + skipped
    print(f"decoder: {right} of {count} replays right, {skipped} skipped, largest relative error {worst:.1e}")
    return right, count


def measure_all(load: Load, device: torch.device, seconds_left: Callable[[], float]) -> dict[str, float]:
    """Ratios of throughput with the path to without, by the name of the last lines; prints a table."""
    top = timing.ceilings()
    layers, card = load.layers, "no GPU, so these times say nothing"
    if device.type == "cuda":
        torch.cuda.empty_cache()
        layers, card = layers_that_fit(load), torch.cuda.get_device_name()
    serving = Serving(load, device, layers)
    held = serving.adapters.table.held(0)
    assert held is not None
    print(
        f"\n{card}, torch {torch.__version__}, Triton {triton.__version__}: "
        f"{top.bytes / 1e12:.2f} TB/s copied, {top.operations / 1e12:.0f} TFLOP/s in bfloat16 products\n"
        f"{load.backbone.name}: {layers} of {load.backbone.layers} layers, {serving.backbone_bytes / 2**30:.1f} GiB; "
        f"an adapter {held.num_bytes / 2**20:.1f} MiB; table, plan and scratch space "
        f"{serving.fixed_bytes / 2**20:.1f} MiB\n"
        "ms a step; ratio: throughput with the path ÷ without; of roofline: least time ÷ measured\n"
        f"{'step':<16}{'backbone':>10}{'of roofline':>13}  {'path':<28}{'with path':>10}{'ratio':>8}{'of roofline':>13}"
    )
    ratios = {}
    for tokens, decode in load.steps:
        if seconds_left() < 60:
            print(f"no time for {tokens} tokens")
            continue
        begin = time.monotonic()
        step = f"{'decode' if decode else 'prefill'} {tokens}"
        seconds = serving.measure(tokens, decode=decode)
        alone = seconds.pop("backbone")
        for name, with_path in seconds.items():
            live = int(name.split()[0])
            floor, of_path = floors(serving, tokens, live, top, decode=decode)
            share = f"{of_path / (with_path - alone):13.0%}" if live and with_path > alone else f"{'':>13}"
            print(
                f"{step:<16}{alone * 1e3:>10.3f}{floor / alone:>13.0%}  {name:<28}{with_path * 1e3:>10.3f}"
                f"{alone / with_path:>8.3f}{share}"
            )
            ratios[f"{step}, {name}"] = alone / with_path
        tile = tile_size(tokens)
        print(f"{'':<16}tiles of {tile}; {time.monotonic() - begin:.0f} s", flush=True)
    return ratios
