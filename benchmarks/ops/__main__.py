"""`make bench-ops`: time of the routed path on the CPU, a layer in serving and in training; Python between GPU steps.

    python -m benchmarks.ops [--rounds 40] [--json FILE]

Variants take turns within every round, so that other load on the machine affects all of them alike.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.layer import LAYERS, Variant, peak_bytes, serving_variants, training_variants
from benchmarks.ops.mapping import mapping_variants, plan_of, processor_seconds
from mtlora.ops import cpu_kernel

SERVING = ((1, 1), (64, 1), (64, 25), (64, 64), (1024, 1), (1024, 25))


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


def _report(title: str, seconds: dict[str, list[float]], layers: int) -> dict[str, float]:
    ours, theirs = seconds
    ratio = statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))
    row = {name: statistics.median(times) / layers * 1e6 for name, times in seconds.items()}
    best = {name: min(times) / layers * 1e6 for name, times in seconds.items()}
    print(f"{title:<34}" + "".join(f"{row[name]:>10.0f} ({best[name]:.0f})" for name in seconds) + f"{ratio:>9.1f}x")
    return {**{f"{name}, us": value for name, value in row.items()}, "ratio": ratio}


def _between_steps(rounds: int) -> dict[str, dict[str, float]]:
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
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
