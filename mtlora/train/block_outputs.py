"""Measures how large the outputs of a backbone's blocks are, to make steps of their paths as large in proportion.

Shape suffixes: B sequences or images, L positions, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mtlora.adapter import AdapterSet, BlockAdapter
from mtlora.families import decoder_layers
from mtlora.train.modality import Modality
from mtlora.train.parallel import Ranks

# An output of zero has no logarithm.
_LEAST = 1e-6


@torch.no_grad()
def block_outputs(work: Modality, ranks: Ranks) -> dict[BlockAdapter, float]:
    """The size of the output of each block with a path, without that path, on the run's first batch.

    A token's size is the root mean square over its dimensions. Of all tokens, this is the geometric mean, because a few
    tokens of a language backbone have outputs a thousand times as large. The same in every process. Raises TypeError
    unless `work` trains an adapter.
    """
    if not isinstance(work.adapters, AdapterSet):
        raise TypeError(f"only an adapter's paths have blocks: found {type(work.adapters).__name__}")
    sums: dict[BlockAdapter, torch.Tensor] = {}
    work.trained.eval()
    with ExitStack() as hooks:
        for path, block in _blocks(work.adapters, work.adapted.model):
            sums[path] = torch.zeros(2, dtype=torch.float64, device=ranks.device)
            # Before the path's own hook, which adds its output.
            hook = block.register_forward_hook(_adding_to(sums[path]), prepend=True)
            hooks.callback(hook.remove)
        part = work.part(0, ranks)
        with work.adapters.context.use(part.bias_index):
            part.loss()
    # Leave out the example that stands in for an empty part.
    weight = 1.0 if part.tokens else 0.0
    found = ranks.sum(torch.stack(list(sums.values())) * weight)
    logarithms, tokens = found.unbind(-1)
    return dict(zip(sums, (logarithms / tokens).exp().tolist(), strict=True))


def _blocks(adapters: AdapterSet, model: nn.Module) -> Iterator[tuple[BlockAdapter, nn.Module]]:
    """Every path that is trained, and its block."""
    for paths, layer in zip(adapters.layers, decoder_layers(model), strict=True):
        assert isinstance(paths, nn.ModuleDict)
        for name, path in paths.items():
            if isinstance(path, BlockAdapter) and path.lora_B.requires_grad:
                yield path, layer.get_submodule(name)


def _adding_to(sums: torch.Tensor) -> Callable[..., None]:
    """A forward hook that adds to `sums`: logarithms of the tokens' sizes, and their number."""

    def add(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        out_BLD = output[0] if isinstance(output, tuple) else output
        size_BL = out_BLD.double().square().mean(-1).sqrt().clamp(min=_LEAST)
        sums.add_(torch.stack([size_BL.log().sum(), sums.new_tensor(size_BL.numel())]))

    return add
