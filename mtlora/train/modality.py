"""The interface between the trainer's loop and its two kinds of data: texts and images."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from mtlora.adapter import Attachment
from mtlora.evaluation.answerers import Answerer
from mtlora.suite.base import Suite
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingConfig
from mtlora.train.parallel import Ranks


class Part(NamedTuple):
    """One process's part of a step's batch.

    bias_index: the row of the task biases of each sequence, image or token; None if the adapter does not get the tasks.
    loss: a function that returns the mean loss of this part. answers, tokens: this part's share of the terms in the
    loss's mean, and of the tokens with a path. num_tokens: tokens of the whole batch.
    """

    bias_index: torch.Tensor | None
    loss: Callable[[], torch.Tensor]
    answers: float
    tokens: float
    num_tokens: int


class Modality(Protocol):
    """The examples of a run with the model that learns them."""

    # The backbone with its adapter or baseline.
    adapted: Any
    # The examples' indices of every batch of the run.
    batches: list[list[int]]
    # Whether a run ends with its best state by validation, not with its last.
    ends_with_best: bool

    @property
    def adapters(self) -> Attachment:
        """The adapter or baseline at the backbone."""
        ...

    @property
    def trained(self) -> nn.Module:
        """All that the optimizer moves: the adapters, and heads where there are any. Its state is the run's."""
        ...

    def move(self, device: torch.device) -> None:
        """Move the model to the training device."""
        ...

    def begin(self) -> None:
        """Prepare the run's first step. The model is already on its device."""
        ...

    def part(self, step: int, ranks: Ranks) -> Part:
        """This process' part of a batch."""
        ...

    def images(self) -> dict[str, tuple[int, int, int | None]]:
        """Numbers of images of each task: for training, validation and test (None: any number). Empty for texts."""
        ...

    def speed(self, num_tokens: int, seconds: float) -> str:
        """A step's speed in the unit that its examples are counted in."""
        ...

    def validate(self) -> dict[str, Any]:
        """Loss and accuracy on the validation split: cheap, many times a run. Empty without one."""
        ...

    def evaluate(self) -> dict[str, Any]:
        """The manifest's `evaluation`."""
        ...

    def answerer(self, *, alone: bool = False) -> Answerer:
        """An answerer with the model as trained so far. alone: with the backbone alone."""
        ...

    def digest(self) -> str:
        """A digest of the training examples and of their batches."""
        ...

    def provenance(self) -> dict[str, Any]:
        """The examples' part of the manifest's `training`."""
        ...

    def write(self, folder: Path, training: dict[str, Any], evaluation: dict[str, Any]) -> None:
        """Write the checkpoint. Raises CheckpointError."""
        ...


def digest(examples: Iterable[object], batches: Iterable[Sequence[int]]) -> str:
    """The SHA-256 of the Python representation of examples and batches, in hexadecimal."""
    found = hashlib.sha256()
    for each in chain(examples, batches):
        found.update(repr(each).encode())
    return found.hexdigest()


def open_modality(
    config: TrainingConfig, suite: Suite, tasks: Sequence[TaskSpec], backbone: Path, vision: Path | None
) -> Modality:
    """The modality, text or images, of the suite's tasks. Raises MtLoRAError if they cannot be trained.

    vision: the vision backbone's folder, for tasks of text that take an image.
    """
    if any(task.image for task in tasks):
        from mtlora.train.images import Images

        return Images(config, suite, tasks, backbone)
    from mtlora.train.text import Text

    return Text(config, suite, tasks, backbone, vision)
