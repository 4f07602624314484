"""Drawing tools of generated pictures: a canvas with a background, contrasting colours, and fonts.

Coordinates and lengths are shares of the picture's side, from its top left.
"""

import colorsys
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mtlora.suite.base import Split

SIZE = 112
# Draw at a higher resolution and reduce it, so that edges are smooth.
_FINE = 2 * SIZE

Colour = tuple[int, int, int]
Point = tuple[float, float]

HUES = {"red": 0, "orange": 27, "yellow": 54, "green": 125, "cyan": 183, "blue": 225, "purple": 276, "pink": 322}
BLACK, WHITE = (20, 20, 20), (245, 245, 245)
SANS, BOLD, SERIF, MONO = "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono"


@dataclass(frozen=True)
class PictureTask:
    """A generated task. `draw(rng, label, split)` gives a picture, uint8 [SIZE, SIZE, 3], from `rng` alone."""

    id: str
    description: str
    labels: tuple[str, ...]
    draw: Callable[[random.Random, str, Split], np.ndarray]


def colour(hue: float, saturation: float, value: float) -> Colour:
    """An RGB colour from hue in degrees, and saturation and value (HSV) from 0 to 1."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def named(rng: random.Random, name: str) -> Colour:
    """A shade of one of `HUES`."""
    return colour(HUES[name] + rng.uniform(-7, 7), rng.uniform(0.75, 1), rng.uniform(0.75, 0.98))


def ring(x: float, y: float, radius: float, corners: int, turn: float = 0.0) -> list[Point]:
    """The corners of a regular polygon, the first at the top where `turn`, in degrees, is 0."""
    angles = [math.radians(turn - 90 + 360 * i / corners) for i in range(corners)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def star(x: float, y: float, radius: float, turn: float = 0.0, points: int = 5, inner: float = 0.42) -> list[Point]:
    """The corners of a star."""
    outer, within = ring(x, y, radius, points, turn), ring(x, y, radius * inner, points, turn + 180 / points)
    return [corner for pair in zip(outer, within, strict=True) for corner in pair]


def placed(points: Sequence[Point], x: float, y: float, scale: float, turn: float = 0.0) -> list[Point]:
    """Points around (0, 0) scaled, turned clockwise by degrees, and moved to (x, y)."""
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return [(x + scale * (c * px - s * py), y + scale * (s * px + c * py)) for px, py in points]


@lru_cache(maxsize=512)
def font(name: str, size: float) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts, `size` high."""
    import matplotlib

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), round(size * _FINE)
    )


@dataclass
class Canvas:
    """A picture that is being drawn. dark: whether its background is dark."""

    rng: random.Random
    dark: bool = False
    ground: Colour = field(init=False)

    def __post_init__(self) -> None:
        rng, value = self.rng, self.rng.uniform(0.08, 0.3) if self.dark else self.rng.uniform(0.8, 1)
        self.ground = colour(rng.uniform(0, 360), rng.uniform(0, 0.3 if self.dark else 0.18), value)
        # A slightly uneven background, as under a lamp.
        shade = np.array([[rng.uniform(-14, 14) for _ in range(3)] for _ in range(3)], dtype=np.float32)
        uneven = np.asarray(Image.fromarray(shade).resize((_FINE, _FINE), Image.Resampling.BILINEAR))
        pixels = np.clip(np.array(self.ground, np.float32) + uneven[..., None], 0, 255).astype(np.uint8)
        self.image = Image.fromarray(pixels)
        self.pen = ImageDraw.Draw(self.image)

    @classmethod
    def any(cls, rng: random.Random) -> "Canvas":
        """A canvas with a light or, sometimes, a dark background."""
        return cls(rng, dark=rng.random() < 0.3)

    def ink(self) -> Colour:
        """A colour with contrast to the background."""
        rng = self.rng
        if self.dark:
            return colour(rng.uniform(0, 360), rng.uniform(0, 0.8), rng.uniform(0.8, 1))
        return colour(rng.uniform(0, 360), rng.uniform(0.4, 1), rng.uniform(0.1, 0.6))

    def polygon(
        self, points: Sequence[Point], fill: Colour | None, line: Colour | None = None, width: float = 0.0
    ) -> None:
        """A closed figure: filled, outlined, or both."""
        flat = [(x * _FINE, y * _FINE) for x, y in points]
        if fill is not None:
            self.pen.polygon(flat, fill=fill)
        if line is not None:
            self.line([*points, points[0], points[1]], line, width)

    def disc(
        self, x: float, y: float, radius: float, fill: Colour | None, line: Colour | None = None, width: float = 0.0
    ) -> None:
        """A circle."""
        self.oval(x, y, radius, radius, fill, line, width)

    def oval(
        self, x: float, y: float, wide: float, high: float,
        fill: Colour | None, line: Colour | None = None, width: float = 0.0,
    ) -> None:  # fmt: skip
        """An ellipse of two half-axes."""
        box = ((x - wide) * _FINE, (y - high) * _FINE, (x + wide) * _FINE, (y + high) * _FINE)
        self.pen.ellipse(box, fill=fill, outline=line, width=max(1, round(width * _FINE)) if line else 0)

    def box(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        fill: Colour | None,
        line: Colour | None = None,
        width: float = 0.0,
        corner: float = 0.0,
    ) -> None:
        """A rectangle, its corners rounded by `corner`."""
        box = (left * _FINE, top * _FINE, right * _FINE, bottom * _FINE)
        self.pen.rounded_rectangle(
            box, corner * _FINE, fill=fill, outline=line, width=max(1, round(width * _FINE)) if line else 0
        )

    def line(self, points: Sequence[Point], fill: Colour, width: float) -> None:
        """A line through points."""
        flat = [(x * _FINE, y * _FINE) for x, y in points]
        self.pen.line(flat, fill=fill, width=max(1, round(width * _FINE)), joint="curve")

    def arc(self, x: float, y: float, radius: float, start: float, end: float, fill: Colour, width: float) -> None:
        """Part of a circle's line, degrees clockwise from the right."""
        box = ((x - radius) * _FINE, (y - radius) * _FINE, (x + radius) * _FINE, (y + radius) * _FINE)
        self.pen.arc(box, start, end, fill=fill, width=max(1, round(width * _FINE)))

    def wedge(self, x: float, y: float, radius: float, start: float, end: float, fill: Colour) -> None:
        """A slice of a disc, degrees clockwise from the right."""
        box = ((x - radius) * _FINE, (y - radius) * _FINE, (x + radius) * _FINE, (y + radius) * _FINE)
        self.pen.pieslice(box, start, end, fill=fill)

    def text(self, x: float, y: float, text: str, name: str, size: float, fill: Colour, turn: float = 0.0) -> None:
        """Text around (x, y), turned clockwise by degrees."""
        face = font(name, round(size, 2))
        if not turn:
            self.pen.text((x * _FINE, y * _FINE), text, font=face, fill=fill, anchor="mm")
            return
        mask = Image.new("L", (_FINE, _FINE))
        ImageDraw.Draw(mask).text((_FINE / 2, _FINE / 2), text, font=face, fill=255, anchor="mm")
        mask = mask.rotate(-turn, Image.Resampling.BILINEAR)
        self.image.paste(fill, (round((x - 0.5) * _FINE), round((y - 0.5) * _FINE)), mask)

    def turn(self, degrees: float) -> None:
        """Turn all that is drawn clockwise."""
        self._replace(self.image.rotate(-degrees, Image.Resampling.BILINEAR, fillcolor=self.ground))

    def blur(self, radius: float) -> None:
        """Blur all that is drawn."""
        self._replace(self.image.filter(ImageFilter.GaussianBlur(radius * _FINE)))

    def _replace(self, image: Image.Image) -> None:
        self.image, self.pen = image, ImageDraw.Draw(image)

    def specks(self, number: int) -> None:
        """Draw small random marks as distractions."""
        for _ in range(number):
            x, y, length, angle = (self.rng.random() for _ in range(4))
            end = (x + 0.06 * length * math.cos(6.3 * angle), y + 0.06 * length * math.sin(6.3 * angle))
            self.line([(x, y), end], self.ink(), 0.008)

    def done(self, noise: float | None = None) -> np.ndarray:
        """The picture, uint8 [SIZE, SIZE, 3], with a sensor's noise."""
        noise = self.rng.uniform(2, 8) if noise is None else noise
        fine = np.asarray(self.image.reduce(2), dtype=np.float32)
        drawn = np.random.default_rng(self.rng.getrandbits(63)).standard_normal((SIZE, SIZE, 1), dtype=np.float32)
        return np.clip(fine + noise * drawn, 0, 255).astype(np.uint8)
