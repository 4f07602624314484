"""Augments training images in the ways that their task allows (`ImageInput.augment`).

Shape suffixes: H height, W width, C channels.
"""

import random
from collections.abc import Collection

import numpy as np
from PIL import Image, ImageEnhance


def augmented(pixels_HWC: np.ndarray, allowed: Collection[str], rng: random.Random) -> np.ndarray:
    """An image [H, W, 3] changed at random: mirrored, turned by up to 15 degrees, cropped, recoloured."""
    if not allowed:
        return pixels_HWC
    image = Image.fromarray(pixels_HWC)
    if "flip" in allowed and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "rotate" in allowed:
        fill = tuple(int(value) for value in pixels_HWC.mean(axis=(0, 1)))
        image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor=fill)
    if "crop" in allowed:
        width, height = image.size
        share = rng.uniform(0.8, 1.0)
        left, top = rng.uniform(0, 1 - share) * width, rng.uniform(0, 1 - share) * height
        image = image.resize(
            (width, height), Image.Resampling.BILINEAR, (left, top, left + share * width, top + share * height)
        )
    if "colour" in allowed:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(rng.uniform(0.75, 1.25))
    return np.asarray(image)
