"""Checkpoint format, versions 1 and 2: a folder of `adapter.json`, the manifest, and `adapter.safetensors`.

Tensors of layer l and module m (`self_attn` or `mlp`), where T = tasks, N = experts, g = groups, d = hidden size:

    layers.{l}.{m}.lora_A       [r, d]       down-projection shared by the experts
    layers.{l}.{m}.lora_B       [N, d, r]    experts
    layers.{l}.{m}.lora_route   [g*N, d]     router, group-major: row j*N + i is expert i in group j
    layers.{l}.{m}.task_bias    [T, g, N]    router bias per task, if the config has task_bias

An adapter for images has a head for each task; `row` is the task's index in the manifest's `tasks`. Classes are in the
order of the task's labels, F is the length of a feature (`ImageInput.pooling`). The weights include the features'
standardisation:

    heads.{row}.weight          [classes, F]
    heads.{row}.bias            [classes]

An adapter with text tasks that take an image has a projector. It maps the last states of merge x merge neighbouring
patches, concatenated row by row to K numbers, to a soft token: an input embedding of the language backbone. A prompt
holds the soft tokens row by row. The weights include the states' standardisation:

    projector.weight            [d, K]       K = merge² times the vision backbone's hidden size
    projector.bias              [d]

Version 2 is version 1 with documents (`activation` in the config, `document_template` in a task), images (`image` in
every task) or texts with images (`picture` in a task, `projector`). Only adapters with any of these are written as
version 2, so readers of version 1 still read all others.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mtlora.backbone import BackboneIdentity
from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError
from mtlora.task import TaskId, TaskSpec, check_activation
from mtlora.vision.image_input import num_features

FORMAT_VERSIONS: Final = (1, 2)
MANIFEST_FILE = "adapter.json"
TENSORS_FILE = "adapter.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(MtLoRAError):
    """A checkpoint that cannot be written or read."""


class TaskEntry(TaskSpec):
    """An entry of the task table."""

    bias_index: int | None = Field(None, ge=0, description="row of the router's task biases; null without task biases")


def format_version(config: MtLoRAConfig, tasks: Sequence[TaskSpec]) -> Literal[1, 2]:
    """The lowest version that can hold an adapter of this config with these tasks."""
    later = any(task.document_template or task.image or task.picture for task in tasks)
    return 2 if config.activation != "all" or later else 1


class ProjectorConfig(BaseModel):
    """How the projector turns an image into soft tokens of a language backbone.

    backbone: the vision backbone that the projector was trained with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: BackboneIdentity
    merge: int = Field(2, ge=1, le=8, description="patches of a side of the square that becomes one soft token")


PROJECTOR_NAMES: Final = ("projector.weight", "projector.bias")


def head_names(row: int) -> tuple[str, str]:
    """Names of the head's weight and bias of the task in this row of the task table."""
    return f"heads.{row}.weight", f"heads.{row}.bias"


class AdapterManifest(BaseModel):
    """A checkpoint's manifest, as `adapter.json` holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1, 2] = 1
    backbone: BackboneIdentity
    config: MtLoRAConfig
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    projector: ProjectorConfig | None = Field(
        None,
        description="how images become soft tokens, if a task takes text and an image",
        exclude_if=lambda projector: projector is None,
    )
    tensors_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    training: dict[str, Any] = Field(default_factory=dict, description="provenance: how the adapter was made")
    evaluation: dict[str, Any] = Field(
        default_factory=dict, description="its scores, from training or `mtlora eval --record`"
    )
    calibration: dict[TaskId, Annotated[float, Field(ge=0.05, le=20)]] = Field(
        default_factory=dict,
        description="the temperature of the probabilities of a task's labels, from `mtlora eval --record`",
        exclude_if=lambda calibration: not calibration,
    )

    @model_validator(mode="after")
    def _consistent(self) -> "AdapterManifest":
        if self.format_version != (needed := format_version(self.config, self.tasks)):
            raise ValueError(f"format_version: expected {needed}, found {self.format_version}")
        check_activation(self.config, self.tasks)
        self.config.check_hidden_size(self.backbone.hidden_size)
        seen: set[str] = set()
        for task in self.tasks:
            if task.id in seen:
                raise ValueError(f"tasks: id: expected each once, found {task.id!r} twice")
            seen.add(task.id)
        if self.images and (text := next((task.id for task in self.tasks if task.image is None), None)):
            raise ValueError(f"tasks: image: expected in every task or in none, found none in task {text!r}")
        if (task_id := next((task.id for task in self.tasks if task.picture), None)) and self.projector is None:
            raise ValueError(f"projector: expected one, as task {task_id!r} has a picture, found none")
        if self.projector is not None and task_id is None:
            raise ValueError("projector: expected none, as no task has a picture, found one")
        if unknown := sorted(self.calibration.keys() - seen):
            raise ValueError(f"calibration: expected tasks of this adapter, found {unknown[0]!r}")
        indices = [task.bias_index for task in self.tasks]
        expected = list(range(len(self.tasks))) if self.config.task_bias else [None] * len(self.tasks)
        if sorted(indices, key=lambda i: -1 if i is None else i) != expected:
            wanted = f"0 to {len(self.tasks) - 1}, each once" if self.config.task_bias else "null, as task_bias is off"
            raise ValueError(f"tasks: bias_index: expected {wanted}, found {reprlib.repr(indices)}")
        return self

    @property
    def images(self) -> bool:
        """Whether the adapter's tasks take images."""
        return any(task.image for task in self.tasks)

    def task(self, task_id: str) -> TaskEntry:
        """The entry of one task. Raises KeyError for an unknown task."""
        for task in self.tasks:
            if task.id == task_id:
                return task
        raise KeyError(task_id)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors that this manifest requires."""
        config, d = self.config, self.backbone.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.backbone.num_layers):
            for module in config.modules:
                prefix = f"layers.{layer}.{module}"
                shapes[f"{prefix}.lora_A"] = (config.r, d)
                shapes[f"{prefix}.lora_B"] = (config.num_experts, d, config.r)
                shapes[f"{prefix}.lora_route"] = (config.router_rows, d)
                if config.task_bias:
                    shapes[f"{prefix}.task_bias"] = (len(self.tasks), config.num_groups, config.num_experts)
        for row, task in enumerate(self.tasks):
            if task.image is not None:
                classes, (weight, bias) = len(task.labels or ()), head_names(row)
                shapes[weight] = (classes, num_features(task.image.pooling, d))
                shapes[bias] = (classes,)
        if self.projector is not None:
            weight, bias = PROJECTOR_NAMES
            shapes[weight] = (d, self.projector.merge**2 * self.projector.backbone.hidden_size)
            shapes[bias] = (d,)
        return shapes


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint in memory. Tensors are on the CPU, in the dtype they are stored in."""

    manifest: AdapterManifest
    tensors: dict[str, torch.Tensor]

    @property
    def paths(self) -> dict[str, torch.Tensor]:
        """The tensors of the paths beside the blocks: all except heads and projector."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith("layers.")}

    @property
    def projector(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight [d, K], bias [d]) of the projector. Raises KeyError for an adapter without one."""
        weight, bias = PROJECTOR_NAMES
        return self.tensors[weight], self.tensors[bias]

    def head(self, task_id: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight [classes, F], bias [classes]) of an image task. Raises KeyError for any other task."""
        row = next((row for row, task in enumerate(self.manifest.tasks) if task.id == task_id), -1)
        weight, bias = head_names(row)
        return self.tensors[weight], self.tensors[bias]


def and_more(names: Sequence[object]) -> str:
    """The end of an error message that lists only the first of `names`."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
