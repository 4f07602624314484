"""Tiny random vision backbones of every family, saved as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

SIZE, PATCH = 56, 14
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": PATCH,
}  # fmt: skip
_TWO_LAYERS = {"intermediate_size": 64}
_DINO = {"mlp_ratio": 2}
_OTHER_BIASES = {"key_bias": True, "query_bias": False, "value_bias": False, "proj_bias": False, "mlp_bias": False}
# Family, and what differs from its configuration's defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", _TWO_LAYERS),
    "vit without biases": ("vit", _TWO_LAYERS | {"qkv_bias": False}),
    "dinov2": ("dinov2", _DINO),
    "dinov2 with gates": ("dinov2", _DINO | {"use_swiglu_ffn": True}),
    "dinov2 with registers": ("dinov2_with_registers", _DINO | {"num_register_tokens": 3}),
    "dinov3": ("dinov3_vit", _TWO_LAYERS | {"num_register_tokens": 3}),
    "dinov3 with gates": ("dinov3_vit", _TWO_LAYERS | {"use_gated_mlp": True, "hidden_act": "silu"}),
    "dinov3 with other biases": ("dinov3_vit", _TWO_LAYERS | _OTHER_BIASES),
    "siglip": ("siglip_vision_model", _TWO_LAYERS),
    "siglip2": ("siglip2_vision_model", _TWO_LAYERS | {"num_patches": (SIZE // PATCH) ** 2}),
    "clip": ("clip_vision_model", _TWO_LAYERS),
}


def new_model(name: str, **changes: Any) -> Any:
    """A changed model of transformers. Every weight is random: biases, norms, scales and tokens too."""
    from transformers import AutoConfig, AutoModel

    family, own = MODELS[name]
    model = AutoModel.from_config(AutoConfig.for_model(family, **_SIZES | own | changes)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model


def write_model(folder: Path, name: str = "dinov2", **changes: Any) -> Path:
    """Save a model; returns its folder."""
    new_model(name, **changes).save_pretrained(folder)
    return folder
