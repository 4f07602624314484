"""Data parallel training with torchrun: every process has the whole schedule and works on its share of each batch.

Processes exchange sums, not means: each first divides its loss by the answer tokens of the whole batch, so that results
equal those of one process.
"""

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")
# The other processes wait this long while one validates or writes.
_PATIENCE = timedelta(hours=6)


class Ranks:
    """This process among those that torchrun started; a single process without torchrun."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=_PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: Sequence[_T]) -> tuple[Sequence[_T], bool]:
        """(this process' part of a batch, whether it counts). An empty part is one example of weight zero."""
        mine = batch[self.rank :: self.world]
        return (mine, True) if mine else (batch[:1], False)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the sum of all processes' gradients, in one exchange."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; its gradient is that of this process' part."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return tensor + (total - tensor.detach())

    def gather(self, value: Any) -> list[Any]:
        """Every process' value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            dist.barrier()
