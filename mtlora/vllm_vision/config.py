"""What vLLM reads of a vision backbone: one configuration for all families, made from the folder's own."""

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from mtlora.vision.families import VisionConfig, is_vision, vision_config
from mtlora.vision.image_input import ImageInput

ARCHITECTURE = "MtLoRAVisionModel"
# Sizes of an attention head that vLLM's kernels for CPUs have. A smaller head is padded with zeros.
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_LARGEST_IMAGE = next(each.le for each in ImageInput.model_fields["size"].metadata if hasattr(each, "le"))


class EngineVisionConfig(PretrainedConfig):
    """A vision backbone to vLLM: a stack of layers without a vocabulary.

    vision: the fields of its `VisionConfig`. backbone_architecture: the folder's own, which adapters name.
    """

    model_type = "mtlora_vision"
    # Class attributes: transformers makes an empty configuration to compare with.
    vision: dict[str, Any] | None = None
    backbone_architecture: str | None = None
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 0
    vocab_size: int = 1
    is_causal: bool = False

    @property
    def backbone(self) -> VisionConfig:
        """The backbone's architecture."""
        return VisionConfig(**(self.vision or {}))


def engine_config(config: Any) -> Any:
    """vLLM's `hf_overrides` for a folder of any family. Raises BackboneError."""
    # vLLM also calls it with an empty configuration and with its own result.
    if not is_vision(config.model_type):
        return config
    vision = vision_config(config)
    return EngineVisionConfig(
        architectures=[ARCHITECTURE],
        backbone_architecture=(config.architectures or [""])[0],
        vision=dataclasses.asdict(vision),
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        head_dim=_head_size(vision.hidden_size // vision.num_heads),
        max_position_embeddings=vision.num_positions(_LARGEST_IMAGE // vision.patch_size * vision.patch_size),
        dtype=config.dtype,
    )


def _head_size(size: int) -> int:
    """The size of a head that the attention's kernels run."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return size
    return next(each for each in _CPU_HEADS if each >= size)
