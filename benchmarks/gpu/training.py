"""A training step of one layer on a GPU: the operator beside the loop over experts, as the paper's authors write it."""

import torch

from benchmarks.gpu.timing import median_seconds
from benchmarks.ops.layer import TrainingSizes, training_variants

LLAMA = TrainingSizes(T=2048, D=4096, r=16, N=16, G=2)


def measure(sizes: TrainingSizes = LLAMA) -> None:
    """Print milliseconds and peak memory of forward and backward, of both."""
    print(f"\ntraining a layer, {sizes.T} tokens, hidden size {sizes.D}, float32")
    for name, run in training_variants(sizes, "cuda").items():
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = median_seconds(run)
        peak = torch.cuda.max_memory_allocated() - before
        print(f"{name:<24}{seconds * 1e3:>8.2f} ms{peak / 2**20:>8.0f} MiB more at peak", flush=True)
