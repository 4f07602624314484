"""Baselines to compare mtLoRA with: other methods, trained beside the same backbone by the same trainer."""

from typing import Annotated, Any

from pydantic import Field

from mtlora.adapter import Attachment
from mtlora.methods.config import HydraLoRAConfig, LoRAConfig

BaselineConfig = HydraLoRAConfig | LoRAConfig
# As a field of a configuration: its `method` tells the two apart.
AnyBaseline = Annotated[BaselineConfig, Field(discriminator="method")]

__all__ = ["AnyBaseline", "BaselineConfig", "HydraLoRAConfig", "LoRAConfig", "attach_baseline"]


def attach_baseline(config: BaselineConfig, model: Any) -> Attachment:
    """Attach a fresh baseline to a transformers causal language model. Raises MtLoRAError if no module matches."""
    if isinstance(config, HydraLoRAConfig):
        from mtlora.methods.hydralora import HydraLoRA

        return HydraLoRA(config, model)
    from mtlora.methods.peft_lora import PeftLoRA

    return PeftLoRA(config, model)
