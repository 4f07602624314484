"""Generated tasks about readings: clocks, gauges, charts, displays, dice."""

import random

import numpy as np

from mtlora.suite.base import Split
from mtlora.suite.vision.canvas import BLACK, SANS, WHITE, Canvas, PictureTask, Point, colour, named, placed

_SEGMENTS = dict(
    zip(
        "0123456789",
        ["abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg"],
        strict=True,
    )
)
# The seven segments: whether one lies flat, and its middle in half-heights of the digit.
_PLACES = {"a": (True, 0, -1), "b": (False, 0.5, -0.5), "c": (False, 0.5, 0.5), "d": (True, 0, 1),
           "e": (False, -0.5, 0.5), "f": (False, -0.5, -0.5), "g": (True, 0, 0)}  # fmt: skip
_PIPS: dict[str, list[Point]] = {
    "1": [(0, 0)],
    "2": [(-1, -1), (1, 1)],
    "3": [(-1, -1), (0, 0), (1, 1)],
    "4": [(-1, -1), (1, -1), (-1, 1), (1, 1)],
    "5": [(-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0)],
    "6": [(-1, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (1, 1)],
}
_LEVELS = ("empty", "low", "half", "high", "full")


def _hand(
    canvas: Canvas, x: float, y: float, degrees: float, length: float, width: float, fill: tuple[int, int, int]
) -> None:
    """A hand, degrees clockwise from the top."""
    (end,) = placed([(0, -length)], x, y, 1, degrees)
    canvas.line([(x, y), end], fill, width)


def _clock(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The full hour on a clock's face."""
    canvas = Canvas.any(rng)
    x, y, radius = rng.uniform(0.45, 0.55), rng.uniform(0.45, 0.55), rng.uniform(0.34, 0.42)
    face, hands = (WHITE, canvas.ink() if not canvas.dark else BLACK) if rng.random() < 0.7 else (BLACK, WHITE)
    canvas.disc(x, y, radius, face, canvas.ink(), 0.02)
    hours = rng.random() < 0.5
    for hour in range(1, 13):
        (at,) = placed([(0, -0.84 * radius)], x, y, 1, 30 * hour)
        if hours:
            canvas.text(*at, str(hour), SANS, 0.07, hands)
        else:
            canvas.disc(*at, 0.02 if hour % 3 == 0 else 0.011, hands)
    _hand(canvas, x, y, 0, 0.8 * radius, 0.018, hands)
    _hand(canvas, x, y, 30 * int(label), 0.5 * radius, 0.045, hands)
    canvas.disc(x, y, 0.03, hands)
    return canvas.done()


def _gauge(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The fifth of its range that a needle points at."""
    canvas = Canvas.any(rng)
    x, y, radius, fifth = (
        0.5 + rng.uniform(-0.05, 0.05),
        0.62 + rng.uniform(-0.05, 0.05),
        rng.uniform(0.33, 0.42),
        _LEVELS.index(label),
    )
    canvas.arc(x, y, radius, 180, 360, canvas.ink(), 0.03)
    for tick in range(6):
        (inner, outer) = placed([(0, -0.85 * radius), (0, -radius)], x, y, 1, -90 + 36 * tick)
        canvas.line([inner, outer], canvas.ink(), 0.015)
    _hand(
        canvas,
        x,
        y,
        -90 + 36 * (fifth + rng.uniform(0.12, 0.88)),
        0.82 * radius,
        0.024,
        named(rng, rng.choice(["red", "orange", "blue"])),
    )
    canvas.disc(x, y, 0.04, canvas.ink())
    return canvas.done()


def _tallest(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    best = "ABCDE".index(label)
    top = rng.uniform(0.5, 0.7)
    heights = [top if i == best else top * rng.uniform(0.25, 0.85) for i in range(5)]
    same, fill = rng.random() < 0.6, canvas.ink()
    canvas.line([(0.1, 0.08), (0.1, 0.86), (0.95, 0.86)], canvas.ink(), 0.01)
    for i, height in enumerate(heights):
        left = 0.14 + 0.162 * i
        canvas.box(left, 0.86 - height, left + 0.11, 0.86, fill if same else canvas.ink())
        canvas.text(left + 0.055, 0.92, "ABCDE"[i], SANS, 0.08, BLACK if not canvas.dark else WHITE)
    return canvas.done()


def _trend(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The course of a noisy line."""
    canvas = Canvas.any(rng)
    t = np.linspace(0, 1, 24)
    steep = rng.uniform(0.6, 1)
    course = {
        "rising": t, "falling": 1 - t, "peak": 1 - np.abs(2 * t - 1), "valley": np.abs(2 * t - 1),
        "flat": np.full_like(t, 0.5), "step up": (t > rng.uniform(0.35, 0.65)).astype(float),
    }[label]  # fmt: skip
    wobble = np.array([rng.gauss(0, 0.06) for _ in t])
    values = 0.5 + steep * (course - 0.5) + wobble
    canvas.line([(0.1, 0.08), (0.1, 0.9), (0.95, 0.9)], canvas.ink(), 0.012)
    points = [(0.14 + 0.76 * float(a), 0.82 - 0.66 * float(b)) for a, b in zip(t, values, strict=True)]
    fill = canvas.ink()
    if rng.random() < 0.6:
        canvas.line(points, fill, 0.02)
    else:
        for point in points:
            canvas.disc(*point, 0.018, fill)
    return canvas.done()


def _pie(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The share of the red slice."""
    canvas = Canvas.any(rng)
    share = {"an eighth": 0.125, "a quarter": 0.25, "three eighths": 0.375, "half": 0.5, "three quarters": 0.75}[label]
    x, y, radius, start = rng.uniform(0.45, 0.55), rng.uniform(0.45, 0.55), rng.uniform(0.3, 0.4), rng.uniform(0, 360)
    parts, at = rng.randint(1, 3), start + 360 * share
    canvas.wedge(x, y, radius, start, start + 360 * share, named(rng, "red"))
    for i in range(parts):
        end = start + 360 if i == parts - 1 else at + (start + 360 - at) * rng.uniform(0.3, 0.6)
        canvas.wedge(x, y, radius, at, end, colour(rng.uniform(90, 260), rng.uniform(0.3, 0.8), rng.uniform(0.4, 0.9)))
        at = end
    return canvas.done()


def _display(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """A digit of seven segments, one or two of them dim."""
    canvas = Canvas(rng, dark=True)
    lit = named(rng, rng.choice(["red", "green", "cyan", "orange", "yellow"]))
    dim = (lit[0] // 4, lit[1] // 4, lit[2] // 4)
    x, y, half, slant = rng.uniform(0.4, 0.6), rng.uniform(0.45, 0.55), rng.uniform(0.2, 0.33), rng.uniform(-6, 12)
    for name, (flat, dx, dy) in _PLACES.items():
        ends = [(dx - 0.38, dy), (dx + 0.38, dy)] if flat else [(dx, dy - 0.38), (dx, dy + 0.38)]
        canvas.line(placed(ends, x, y, half, slant), lit if name in _SEGMENTS[label] else dim, 0.2 * half)
    canvas.blur(rng.uniform(0.002, 0.02))
    return canvas.done()


def _dice(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The sum of two dice."""
    canvas = Canvas.any(rng)
    total = int(label)
    first = rng.choice([n for n in range(1, 7) if 1 <= total - n <= 6])
    for i, value in enumerate((first, total - first)):
        x, y, turn, half = (
            0.27 + 0.46 * i,
            0.5 + rng.uniform(-0.12, 0.12),
            rng.uniform(-25, 25),
            rng.uniform(0.165, 0.185),
        )
        face, pip = (WHITE, BLACK) if rng.random() < 0.6 else (named(rng, rng.choice(["red", "blue", "green"])), WHITE)
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        canvas.polygon(placed(corners, x, y, half, turn), face, BLACK, 0.01)
        for spot in placed(_PIPS[str(value)], x, y, 0.54 * half, turn):
            canvas.disc(*spot, 0.16 * half + 0.005, pip)
    return canvas.done()


def _fill(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """How full a glass is."""
    canvas = Canvas.any(rng)
    fifth = _LEVELS.index(label)
    wide, slope, top, bottom, x = (
        rng.uniform(0.16, 0.25),
        rng.uniform(0, 0.08),
        rng.uniform(0.1, 0.2),
        rng.uniform(0.8, 0.9),
        rng.uniform(0.4, 0.6),
    )

    def half(y: float) -> float:
        return wide - slope * (y - top) / (bottom - top)

    level = bottom - (bottom - top) * (0.2 * fifth + rng.uniform(0.03, 0.15))
    drink = [(x - half(level), level), (x + half(level), level), (x + half(bottom), bottom), (x - half(bottom), bottom)]
    canvas.polygon(drink, named(rng, rng.choice(["blue", "orange", "red", "green", "purple"])))
    sides = [(x - half(top), top), (x - half(bottom), bottom), (x + half(bottom), bottom), (x + half(top), top)]
    canvas.line(sides, canvas.ink(), 0.022)
    return canvas.done()


def _angle(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The angle between two lines, to 30 degrees."""
    canvas = Canvas.any(rng)
    start, opening = rng.uniform(0, 360), int(label.split()[0]) + rng.uniform(-6, 6)
    x, y, ink = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58), canvas.ink()
    for degrees in (start, start + opening):
        _hand(canvas, x, y, degrees, rng.uniform(0.3, 0.42), 0.025, ink)
    canvas.arc(x, y, rng.uniform(0.09, 0.13), start - 90, start - 90 + opening, canvas.ink(), 0.014)
    return canvas.done()


TASKS = (
    PictureTask("clock_hours", "The full hour on the clock.", tuple(map(str, range(1, 13))), _clock),
    PictureTask("gauges", "Where in its range the needle points.", _LEVELS, _gauge),
    PictureTask("bar_charts", "The tallest of five bars.", tuple("ABCDE"), _tallest),
    PictureTask(
        "line_trends", "The course of the line.", ("rising", "falling", "peak", "valley", "flat", "step up"), _trend
    ),
    PictureTask(
        "pie_shares",
        "The share of the red slice.",
        ("an eighth", "a quarter", "three eighths", "half", "three quarters"),
        _pie,
    ),
    PictureTask("segment_digits", "The digit on the display.", tuple("0123456789"), _display),
    PictureTask("dice_sum", "The sum of the two dice.", tuple(map(str, range(2, 13))), _dice),
    PictureTask("fill_level", "How full the glass is.", _LEVELS, _fill),
    PictureTask(
        "angles", "The angle between the lines.", tuple(f"{a} degrees" for a in (30, 60, 90, 120, 150)), _angle
    ),
)
