"""Rotary positions of patches: queries and keys are turned by angles of their patch's row and column.

Shape suffixes: T positions of one image or several, K size of a head, H = K/2 angles of a head, G patches of a side.
"""

import math
from functools import lru_cache

import torch

from mtlora.vision.families import VisionConfig

# Cosines and sines of the angles.
Rotation = tuple[torch.Tensor, torch.Tensor]


@lru_cache(maxsize=64)
def image_rotation(config: VisionConfig, T: int, dtype: torch.dtype, device: torch.device) -> Rotation:
    """cos, sin [T, H] of one image of T positions, whose side follows from T."""
    # Training must be able to keep what an evaluation made.
    with torch.inference_mode(False):
        positions_T = torch.arange(T, device=device)
        cos_TH, sin_TH = rotation(config, positions_T, torch.full_like(positions_T, T))
        return cos_TH.to(dtype), sin_TH.to(dtype)


def rotation(config: VisionConfig, positions_T: torch.Tensor, lengths_T: torch.Tensor) -> Rotation:
    """cos, sin [T, H] in float32; 1 and 0 for class token and registers, which are not turned.

    positions_T: int64, places in the sequence of the position's own image. lengths_T: int64, that sequence's length.
    Mirrors transformers' `DINOv3ViTRopePositionEmbedding` in evaluation: an image spans -1 to 1, whatever its size.
    """
    assert config.rope_theta is not None
    patch_T = positions_T - config.num_prefix
    # An engine's warm-up has sequences of any length.
    G_T = (lengths_T - config.num_prefix).clamp(min=1).float().sqrt().round().long()
    place_T2 = torch.stack([patch_T // G_T, patch_T % G_T], dim=-1).float()
    centre_T2 = (place_T2 + 0.5) / G_T.unsqueeze(-1) * 2 - 1
    K = config.hidden_size // config.num_heads
    frequency = config.rope_theta ** (torch.arange(K // 4, device=positions_T.device).float() * -4 / K)
    angle_TH = (2 * math.pi * centre_T2.unsqueeze(-1) * frequency).flatten(1)
    angle_TH = torch.where(patch_T.unsqueeze(-1) < 0, 0.0, angle_TH)
    return angle_TH.cos(), angle_TH.sin()


def image_lengths(positions_T: torch.Tensor) -> torch.Tensor:
    """lengths_T of images that lie one behind the other. Each begins at position 0, as does each row of padding.

    No size depends on values, so compilers and captured graphs take it.
    """
    image_T = (positions_T == 0).cumsum(0)
    counts = positions_T.new_zeros(len(positions_T) + 1).scatter_add(0, image_T, torch.ones_like(positions_T))
    return counts[image_T]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys [..., K], turned; cos, sin: [..., H] that broadcast. Zeros may stand behind a head's K."""
    H = cos.shape[-1]
    first, second, rest = x.split([H, H, x.shape[-1] - 2 * H], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
