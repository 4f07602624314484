"""Requests with a seed on a CPU, whose prompt takes several steps.

vLLM draws a token for every sequence of a step and drops those of unfinished prompts. It then rewinds the sequence's
generator by an offset, which only CUDA's generators have. On a CPU, vLLM 0.32 makes the same call; it raises and ends
the engine.
"""

from typing import Any

import torch


def rewind_cpu_generators() -> None:
    """Have model runners on CPUs rewind generators by their state. Takes effect for this process, once."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    # The base class defines both, and other devices' runners share it: change the CPU's own class alone.
    if "_sample" in vars(CPUModelRunner):
        return
    sample, bookkeeping_sync = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def _sample(self: Any, *arguments: Any, **named: Any) -> Any:
        drawn_for_nothing = [
            generator
            for row, generator in self.input_batch.generators.items()
            if row < self.input_batch.num_reqs and self.discard_request_mask.np[row]
        ]
        states = [generator.get_state() for generator in drawn_for_nothing]
        try:
            return sample(self, *arguments, **named)
        finally:
            for generator, state in zip(drawn_for_nothing, states, strict=True):
                generator.set_state(state)

    def _bookkeeping_sync(self: Any, *arguments: Any, **named: Any) -> Any:
        generators: dict[int, torch.Generator] = self.input_batch.generators
        self.input_batch.generators = {}  # nothing left to rewind
        try:
            return bookkeeping_sync(self, *arguments, **named)
        finally:
            self.input_batch.generators = generators

    CPUModelRunner._sample = _sample
    CPUModelRunner._bookkeeping_sync = _bookkeeping_sync
