"""The configuration of a training run, complete and stored in the checkpoint as provenance."""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError
from mtlora.methods import AnyBaseline, BaselineConfig
from mtlora.suite.mix import ExampleCounts, SuitePart


class TrainingError(MtLoRAError):
    """Training that cannot start or cannot go on."""


class DivergedError(TrainingError):
    """Training whose loss or gradients are not finite."""


class TrainingConfig(BaseModel):
    """One training run. The same config, code, machine, thread and process count give the same weights, bit for bit.

    Defaults are those of texts; `mtlora.train.defaults` has those of images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: MtLoRAConfig = MtLoRAConfig()
    baseline: AnyBaseline | None = Field(None, description="train this baseline in place of the adapter")
    init_from: str | None = Field(
        None, description="a checkpoint of the same adapter config to start from; tasks are matched by id"
    )
    suite: str | Annotated[tuple[SuitePart, ...], Field(min_length=1)] = Field(
        "builtin",
        description='"builtin", "bbh-generated", "documents", "builtin-vision", "builtin-pictures", a folder in '
        "BIG-Bench-Hard layout or of images, a file of JSON lines, or parts to mix",
    )
    tasks: tuple[str, ...] | None = Field(None, description="train on these tasks of the suite; null means all")
    examples_per_task: ExampleCounts = Field(
        1000,
        description="training examples per task: a number, null for all of a finite suite, or numbers by task id, * "
        "for the rest; at most this many of each part of a mix",
    )
    validation_per_task: int = Field(16, ge=0, description="validation examples per task; 0: no validation")
    epochs: int = Field(1, ge=1, description="passes over the training examples")
    max_steps: int | None = Field(None, ge=1, description="stop after this many steps")
    schedule_steps: int | None = Field(
        None, ge=1, description="steps that the learning rate's schedule spans; null means the steps of the run"
    )
    batch_size: int = Field(16, ge=1, description="sequences per step, at most")
    batch_tokens: int | None = Field(
        None, ge=8, description="tokens per step with padding, at most; a longer example is a batch by itself"
    )
    document_tasks: int = Field(
        8, ge=1, description="examples of one document in a step, at most: they share its pass (activation task)"
    )
    max_length: int = Field(512, ge=8, description="tokens of prompt and answer")
    longer_examples: Literal["error", "skip"] = Field(
        "error", description="what to do with a training example above max_length; skipped ones are counted"
    )
    unreadable_images: Literal["error", "skip"] = Field(
        "error",
        description="of images: what to do with files that cannot be decoded; skipped ones are told by class",
    )
    learning_rate: float = Field(2e-3, gt=0, description="the peak of the schedule")
    relative_expert_rate: float | None = Field(
        None,
        gt=0,
        description="the rate of a path's experts B is the learning rate times this and times the size of its block's "
        "output (root mean square), so that a step changes every block's output in proportion; null: the learning rate",
    )
    router_learning_rate_scale: float = Field(1.0, gt=0, description="factor on the rate of routers and task biases")
    head_learning_rate_scale: float = Field(1.0, gt=0, description="factor on the rate of heads (images)")
    projector_learning_rate_scale: float = Field(
        0.1, gt=0, description="factor on the rate of the projector (tasks of text and an image)"
    )
    merge_patches: int = Field(
        2,
        ge=1,
        le=8,
        description="of tasks of text and an image: patches of a side of the square that becomes one soft token",
    )
    heads: Literal["own", "all classes", "label words"] = Field(
        "own",
        description="of images. own: each task's labels, the task told; all classes: one classifier over all tasks' "
        "classes, the task not told; label words: one classifier over words that tasks share",
    )
    probe_examples: int | None = Field(
        None,
        ge=10,
        description="of images: examples of each task that its head starts from; null: all. Others show the "
        "adapter what a head does not know",
    )
    frozen_layers: int = Field(
        0,
        ge=0,
        description="of images: layers, from the first, whose paths stay zero; images pass them once",
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises")
    final_learning_rate_fraction: float = Field(0.05, ge=0, le=1, description="where the cosine ends")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's; routers and task biases have none")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients of a larger norm are scaled down to it")
    spectral: Literal["off", "pairwise", "gram"] = Field(
        "pairwise",
        description="the spectral loss: between experts, as in the paper (pairwise), or within each (gram)",
    )
    spectral_weight: float = Field(1e-3, ge=0, description="factor on the spectral loss")
    balance_weight: float = Field(0.01, ge=0, description="factor on the routers' balance loss")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="the frozen backbone's; the adapter is float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep one activation per layer and compute the rest again in the backward pass"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, examples, their order and dropout")
    save_every: int = Field(50, ge=1, description="steps between resumable states")
    validate_every: int = Field(200, ge=1, description="steps between validations")
    threads: int | None = Field(None, ge=1, description="CPU threads; null leaves torch's choice")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the frozen backbone."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def method(self) -> MtLoRAConfig | BaselineConfig:
        """The configuration of the adapter or baseline that is trained."""
        return self.adapter if self.baseline is None else self.baseline

    @model_validator(mode="after")
    def _documents_keep_their_keys(self) -> "TrainingConfig":
        if self.gradient_checkpointing and self.baseline is None and self.adapter.activation == "task":
            raise ValueError(
                "gradient_checkpointing: found it with activation 'task'; allowed: activation 'all', as a layer that "
                "is computed again would lose the documents' keys and values"
            )
        return self

    @model_validator(mode="after")
    def _tasks_not_told_have_no_bias(self) -> "TrainingConfig":
        if self.heads == "all classes" and self.baseline is None and self.adapter.task_bias:
            raise ValueError('heads "all classes": the task is not told, so adapter.task_bias must be false')
        return self

    @model_validator(mode="after")
    def _baselines_have_no_paths(self) -> "TrainingConfig":
        if self.baseline is not None and self.relative_expert_rate is not None:
            raise ValueError("relative_expert_rate is for the adapter's paths: it cannot be combined with a baseline")
        return self

    @model_validator(mode="after")
    def _baselines_start_anew(self) -> "TrainingConfig":
        if self.baseline is not None and self.init_from is not None:
            raise ValueError("init_from is a checkpoint of the adapter: it cannot start a baseline")
        return self
