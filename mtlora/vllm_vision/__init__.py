"""Vision backbones in vLLM: an encoder outside vLLM's tree, whose blocks the plugin wraps as a language model's.

A request's prompt is an image as embeddings (`VisionEncoder.embed`), one position a patch; its output is the image's
feature. config.py  what vLLM reads of a backbone.  model.py  the model.
"""

import json
from pathlib import Path
from typing import Any

import torch

from mtlora.vision.families import read_config
from mtlora.vllm_vision.config import ARCHITECTURE, engine_config

_MODEL = "mtlora.vllm_vision.model:VisionModel"


def register() -> None:
    """Add the model to vLLM's registry, in every process of vLLM."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, _MODEL)


def vision_engine_args(
    folder: Path, *, max_images: int = 64, size: int = 112, largest_size: int | None = None
) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for the vision backbone in `folder`; `engine_overrides` adds those of adapters.

    max_images: images of `size` pixels that run at the same time. largest_size: the largest image, by default `size`.
    Raises BackboneError.
    """
    config = read_config(folder)
    longest = config.num_positions(largest_size or size)
    return {
        "model": str(folder),
        "runner": "pooling",
        "hf_overrides": engine_config,
        "skip_tokenizer_init": True,
        "enable_prompt_embeds": True,
        "max_model_len": longest,
        "max_num_seqs": max_images,
        # An image runs in one step: each position attends to all.
        "max_num_batched_tokens": max(longest, max_images * config.num_positions(size)),
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
    }


def vision_dtype(asked: str, folder: Path) -> str:
    """vLLM's `dtype` of a vision backbone: for "auto" on a CPU, the weights' own; else `asked`.

    vLLM's "auto" makes float16 of a pooling model's float32, which loses what features are compared by and is slow on
    most CPUs. As for language, bfloat16 becomes float32 on a processor without bfloat16 products.
    """
    from vllm.platforms import current_platform

    from mtlora.vllm_cpu.precision import engine_dtype

    if asked != "auto" or not current_platform.is_cpu():
        return asked
    stored = json.loads((folder / "config.json").read_text())
    if stored.get("dtype", stored.get("torch_dtype", "float32")) == "float32":
        return "float32"
    return engine_dtype(asked, folder)


def image_prompt(x_TD: torch.Tensor) -> Any:
    """An image's embeddings [T, D] as an input of vLLM's engines."""
    from vllm.inputs.engine import embeds_input

    return embeds_input(x_TD)


def feature_params() -> Any:
    """The PoolingParams that ask for an image's feature."""
    from vllm import PoolingParams

    return PoolingParams(task="embed")


def state_params() -> Any:
    """The PoolingParams that ask for all states of an image."""
    from vllm import PoolingParams

    return PoolingParams(task="token_embed")
