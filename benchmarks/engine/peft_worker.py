"""A worker: Hugging Face PEFT with mixed-adapter batches. Messages and replies are `benchmarks.engine.worker`'s.

Settings: {"model": folder, "dtype": name, "batch": sequences}. The prompts of a message run in static batches of up to
`batch` sequences, padded on the left, through `generate(adapter_names=...)`, each row with the adapter of its slot.
Adapters are loaded before the clock starts.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.worker import Handle, serve


class MixedBatches:
    """A transformers model with any number of PEFT adapters; each row of a batch has its own."""

    def __init__(self, backbone: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(backbone, dtype=dtype).eval()
        self._loaded: set[str] = set()

    def load(self, adapters: Mapping[str, str]) -> None:
        """Load those adapters, given as folders by name, that are not loaded yet."""
        from peft import PeftModel

        # Adapters in the backbone's dtype, as in vLLM. PEFT's default is float32, even for inference.
        options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
        for name, path in adapters.items():
            if not self._loaded:
                self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name, **options).eval()
            elif name not in self._loaded:
                self._model.load_adapter(path, name, **options)
            self._loaded.add(name)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], names: Sequence[str], new_tokens: int) -> list[list[int]]:
        """`new_tokens` greedy token ids for each prompt, in one batch. names: the adapter of each row."""
        length = max(map(len, prompts))
        found = self._model.generate(
            input_ids=torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            adapter_names=list(names),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        tokens: list[list[int]] = found[:, length:].tolist()
        return tokens


def start(settings: dict[str, Any]) -> Handle:
    """Load the backbone."""
    model = MixedBatches(Path(settings["model"]), getattr(torch, settings["dtype"]))

    def generate(case: dict[str, Any]) -> dict[str, Any]:
        model.load({name: path for name, _, path in case["slots"]})
        names = [name for name, _, _ in case["slots"]]
        began, tokens = time.perf_counter(), 0
        for first in range(0, len(names), settings["batch"]):
            rows = slice(first, first + settings["batch"])
            answers = model.generate(case["prompts"][rows], names[rows], case["new_tokens"])
            tokens += sum(map(len, answers))
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    return generate


if __name__ == "__main__":
    serve(start)
