"""Hyper-parameters of an mtLoRA adapter, and the parameter counts that follow from them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mtlora.errors import MtLoRAError
from mtlora.families import BLOCK_MODULES, Blocks


class MtLoRAConfig(BaseModel):
    """Hyper-parameters of an mtLoRA adapter. Names follow PEFT (`r`, `lora_alpha`, `lora_dropout`) where it has them.

    Raises pydantic.ValidationError naming the field, what was found and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(16, ge=1, le=512, description="rank of the shared down-projection and of every expert")
    lora_alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="the path is scaled by lora_alpha / r")
    num_experts: int = Field(8, ge=1, le=256, description="N, experts per block")
    num_groups: int = Field(4, ge=1, le=4096, description="g, groups of d/g dimensions, each routed by itself")
    blocks: Blocks = Field("ffn", description="transformer blocks that get a path beside them")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the path's input while training")
    task_bias: bool = Field(True, description="one learned router bias per task")
    activation: Literal["all", "task"] = Field(
        "all",
        description="tokens that the path is added for: all, or those from the task's own part of the prompt on",
        exclude_if=lambda activation: activation == "all",
    )

    @property
    def scaling(self) -> float:
        """alpha / r, the factor on the path's output."""
        return self.lora_alpha / self.r

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of a decoder layer's submodules that have a path, in the order in which the layer runs them."""
        return BLOCK_MODULES[self.blocks]

    @property
    def router_rows(self) -> int:
        """g * N, rows of the router, group-major: row j * N + i is expert i in group j."""
        return self.num_groups * self.num_experts

    def check_hidden_size(self, hidden_size: int) -> None:
        """Raise MtLoRAError unless the groups divide `hidden_size` evenly."""
        if hidden_size % self.num_groups:
            raise MtLoRAError(f"num_groups {self.num_groups} does not divide the backbone's hidden size {hidden_size}")

    @model_validator(mode="after")
    def _one_expert_needs_no_router(self) -> "MtLoRAConfig":
        if self.num_experts == 1 and self.task_bias:
            raise ValueError("task_bias steers the router between experts: it needs num_experts > 1")
        return self


def block_adapter_parameters(config: MtLoRAConfig, hidden_size: int) -> int:
    """Trainable parameters of one block's path without task biases: A [r, d], B N x [d, r], R [g*N, d]."""
    config.check_hidden_size(hidden_size)
    return hidden_size * (config.r + config.num_experts * config.r + config.router_rows)


def adapter_parameters(config: MtLoRAConfig, hidden_size: int, num_layers: int, num_tasks: int = 0) -> int:
    """Trainable parameters of a whole adapter; `num_tasks` counts the rows of the task biases [T, g, N], if any."""
    per_block = block_adapter_parameters(config, hidden_size)
    if config.task_bias:
        per_block += num_tasks * config.router_rows
    return per_block * len(config.modules) * num_layers
