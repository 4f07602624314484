"""Hyper-parameters of the baselines. Names follow PEFT where it has them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _LinearLayers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(16, ge=1, le=512)
    lora_alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="the path is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), min_length=1, description="names of the linear layers that get a path"
    )

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.lora_alpha / self.r


class LoRAConfig(_LinearLayers):
    """One LoRA for all tasks, through PEFT (Hu et al., 2021)."""

    method: Literal["lora"] = "lora"


class HydraLoRAConfig(_LinearLayers):
    """HydraLoRA (Tian et al., 2024) at component level: each linear layer has one A, N experts B and a router."""

    method: Literal["hydralora"] = "hydralora"
    num_experts: int = Field(8, ge=2, le=256)
    products: Literal["fused", "loop"] = Field(
        "fused", description="experts as one product, as for blocks; or one after the other, as HydraLoRA's authors do"
    )


class HeadsConfig(BaseModel):
    """No adapter: linear heads on the backbone's features, for images only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["heads"] = "heads"
