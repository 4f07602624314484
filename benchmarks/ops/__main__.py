"""`make bench-ops`: time of the routed path on the CPU, a layer in serving and in training; Python between GPU steps.

    python -m benchmarks.ops [--rounds 40] [--json FILE]

Variants take turns within every round, so that other load on the machine affects all of them alike.

Shape suffixes: T tokens, D hidden size, r rank, N experts, G groups.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mtlora.ops import cpu, cpu_kernel
from mtlora.ops.mix import Mix
from mtlora.ops.packed_block import pack_block
from mtlora.ops.plan import plan_step
from mtlora.ops.table import AdapterRows, AdapterTable
from mtlora.ops.training import path_with_gradients

# The default backbone and its adapters.
LAYERS, D, R, N, G = 30, 576, 16, 8, 4
SERVING = ((1, 1), (64, 1), (64, 25), (64, 64), (1024, 1), (1024, 25))

Variant = Callable[[], None]


class TrainingSizes(NamedTuple):
    """One layer's sizes in training."""

    T: int
    D: int
    r: int
    N: int
    G: int


TRAINING = TrainingSizes(T=1024, D=576, r=16, N=16, G=2)


def interleaved(variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round. One round before them does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def serving_variants(tokens: int, adapters: int, layers: int) -> dict[str, Variant]:
    """The operator, and torch ops one adapter after another, over `layers` layers, each with its own weights."""
    dtype, device = torch.bfloat16, torch.device("cpu")
    table = AdapterTable(layers, adapters, hidden_size=D, dtype=dtype, device=device)
    for row in range(adapters):
        blocks = [
            pack_block(
                torch.randn(R, D) / D**0.5, torch.randn(N, D, R) / 100, torch.randn(G * N, D) / D**0.5,
                num_groups=G, scaling=2.0, dtype=dtype, bias_bGN=torch.randn(1, G, N),
            )
            for _ in range(layers)
        ]  # fmt: skip
        table.place(row, AdapterRows(blocks))
    row_T = np.arange(tokens) % adapters
    plan = plan_step(row_T, np.zeros_like(row_T), num_rows=adapters, tile_size=cpu_kernel.TILE_SIZE)
    x_TD, y_TD = torch.randn(tokens, D).to(dtype), torch.zeros(tokens, D, dtype=dtype)

    def operator() -> None:
        add_path_ = cpu.bind(table, plan)
        for layer in range(layers):
            add_path_(y_TD, x_TD, layer)

    def torch_ops() -> None:
        for layer in range(layers):
            cpu.in_torch_ops(Mix.of(y_TD, x_TD, table, layer, plan))

    return {"operator": operator, "torch ops, one adapter after another": torch_ops}


def expert_loop(
    x_TD: torch.Tensor, A: torch.Tensor, B_NDr: torch.Tensor, route: torch.Tensor, num_groups: int, scaling: float
) -> torch.Tensor:
    """The path as the paper's authors write it: a product and a weighted sum for each expert, N tensors [T, D]."""
    T, num_experts = len(x_TD), len(B_NDr)
    h_Tr = x_TD @ A.t()
    weights_TGN = torch.softmax((x_TD @ route.t()).view(T, num_groups, num_experts), dim=-1)
    out = torch.zeros_like(x_TD).view(T, num_groups, -1)
    for i in range(num_experts):
        out = out + weights_TGN[:, :, i, None] * (h_Tr @ B_NDr[i].t()).view(T, num_groups, -1)
    return out.view(T, -1) * scaling


def training_variants(sizes: TrainingSizes = TRAINING, device: str = "cpu") -> dict[str, Variant]:
    """Forward and backward of one layer, in float32."""
    T, D, r, N, G = sizes
    x_TD = torch.randn(T, D, device=device, requires_grad=True)
    shapes = ((r, D), (N, D, r), (G * N, D))
    A, B_NDr, route = (torch.randn(*shape, device=device).div_(10).requires_grad_() for shape in shapes)
    inputs = [x_TD, A, B_NDr, route]
    grad_TD = torch.randn(T, D, device=device)

    def ours() -> None:
        out, _ = path_with_gradients(x_TD, A, B_NDr, route, None, num_groups=G, scaling=2.0)
        torch.autograd.grad(out, inputs, grad_TD)

    def loop() -> None:
        torch.autograd.grad(expert_loop(x_TD, A, B_NDr, route, G, 2.0), inputs, grad_TD)

    return {"operator": ours, "loop over experts": loop}


def peak_bytes(run: Variant) -> int:
    """Peak bytes of the tensors that `run` allocates."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _report(title: str, seconds: dict[str, list[float]], layers: int) -> dict[str, float]:
    ours, theirs = seconds
    ratio = statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))
    row = {name: statistics.median(times) / layers * 1e6 for name, times in seconds.items()}
    best = {name: min(times) / layers * 1e6 for name, times in seconds.items()}
    print(f"{title:<34}" + "".join(f"{row[name]:>10.0f} ({best[name]:.0f})" for name in seconds) + f"{ratio:>9.1f}x")
    return {**{f"{name}, us": value for name, value in row.items()}, "ratio": ratio}


def _between_steps(rounds: int) -> dict[str, dict[str, float]]:
    # Import here: it imports vLLM, which the training benchmark and a bare GPU machine do not need.
    from benchmarks.ops.mapping import mapping_variants, plan_of, processor_seconds

    print("Python between steps on a GPU, without one: ms of processor time, median (best)")
    variants = {
        f"64 tokens, {adapters} adapters, changed: {what}": run
        for adapters in (1, 25)
        for what, run in mapping_variants(64, adapters).items()
    }
    results = {}
    for name, run in {**variants, "plan_step, 256 tokens, 25 adapters": plan_of(256, 25)}.items():
        seconds = processor_seconds(run, rounds)
        median, best = statistics.median(seconds) * 1e3, min(seconds) * 1e3
        print(f"{name:<56}{median:>8.3f} ({best:.3f})")
        results[name] = {"median, ms": median, "best, ms": best}
    return results


def main() -> None:
    """Print the table, and write it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    # For the GPU steps' kernels. Set it first: Triton reads it when it is imported, which PyTorch may cause.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.manual_seed(0)
    kernel = "the compiled kernel" if cpu_kernel.compiled_kernel() else "torch ops: the kernel is not built"
    print(f"{torch.get_num_threads()} threads, {kernel}; us a layer, median (best) of {options.rounds} rounds")
    print(f"{'':<34}{'operator':>16}{'loop':>16}{'':>10}")
    results: dict[str, dict[str, Any]] = {}
    for tokens, adapters in SERVING:
        layers = options.layers if tokens <= 64 else max(1, options.layers // 10)
        title = f"serving, {tokens} tokens, {adapters} adapters"
        with torch.inference_mode():
            seconds = interleaved(serving_variants(tokens, adapters, layers), options.rounds)
        results[title] = _report(title, seconds, layers)
    title = "training, 1024 tokens, N 16"
    results[title] = _report(title, interleaved(training_variants(), options.rounds), 1)
    memory = {name: peak_bytes(run) for name, run in training_variants().items()}
    ours, loop = memory.values()
    print(f"training, peak extra memory: {ours / 2**20:.1f} MiB, loop {loop / 2**20:.1f} MiB: {ours / loop:.3f}")
    results["training, peak extra bytes"] = {**memory, "ratio": ours / loop}
    results |= _between_steps(10 * options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
