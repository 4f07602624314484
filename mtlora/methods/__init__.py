"""Baselines for comparison with mtLoRA: other methods, trained beside the same backbone with the same trainer."""

from typing import Annotated, Any

from pydantic import Field

from mtlora.adapter import Attachment, Nothing
from mtlora.methods.config import HeadsConfig, HydraLoRAConfig, LoRAConfig

BaselineConfig = HydraLoRAConfig | LoRAConfig | HeadsConfig
# The type of a configuration field; `method` selects the baseline.
AnyBaseline = Annotated[BaselineConfig, Field(discriminator="method")]

__all__ = ["AnyBaseline", "BaselineConfig", "HeadsConfig", "HydraLoRAConfig", "LoRAConfig", "attach_baseline"]


def attach_baseline(config: BaselineConfig, model: Any) -> Attachment:
    """Attach a fresh baseline to a transformers causal language model. Raises MtLoRAError if no module matches."""
    if isinstance(config, HeadsConfig):
        return Nothing()
    if isinstance(config, HydraLoRAConfig):
        from mtlora.methods.hydralora import HydraLoRA

        return HydraLoRA(config, model)
    from mtlora.methods.peft_lora import PeftLoRA

    return PeftLoRA(config, model)
