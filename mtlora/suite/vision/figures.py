"""Generated tasks about figures: what they are, how many, where, how large, and how they relate."""

import math
import random
from itertools import pairwise

import numpy as np

from mtlora.suite.base import Split
from mtlora.suite.vision.canvas import HUES, Canvas, Colour, PictureTask, Point, named, placed, ring, star

_HEART = [
    (
        16 * math.sin(t) ** 3 / 17,
        -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
    )
    for t in np.linspace(0, 2 * math.pi, 40)
]
_CROSS = [
    (-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
    (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3),
]  # fmt: skip
_MOON = [(math.cos(t), math.sin(t)) for t in np.linspace(0.9, 5.4, 24)] + [
    (0.35 + 0.78 * math.cos(t), 0.78 * math.sin(t)) for t in np.linspace(5.2, 1.1, 20)
]
OUTLINES: dict[str, list[Point]] = {
    "circle": ring(0, 0, 0.95, 40),
    "triangle": ring(0, 0, 1, 3),
    "square": ring(0, 0, 1.05, 4, 45),
    "pentagon": ring(0, 0, 1, 5),
    "star": star(0, 0, 1.1),
    "heart": _HEART,
    "cross": _CROSS,
    "crescent": _MOON,
    "hexagon": ring(0, 0, 1, 6),
    "drop": [
        (0, -1.2),
        *[(0.75 * math.cos(t), 0.35 + 0.75 * math.sin(t)) for t in np.linspace(-0.5, math.pi + 0.5, 24)],
    ],
}
_DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def figure(canvas: Canvas, kind: str, x: float, y: float, radius: float, fill: Colour, turn: float = 0.0) -> None:
    """A filled figure."""
    canvas.polygon(placed(OUTLINES[kind], x, y, radius, turn), fill)


def _shapes(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    canvas.specks(12)
    radius = rng.uniform(0.16, 0.3)
    x, y, turn = rng.uniform(0.32, 0.68), rng.uniform(0.32, 0.68), rng.uniform(-35, 35)
    points = placed(OUTLINES[label], x, y, radius, turn)
    if rng.random() < 0.5:
        canvas.polygon(points, canvas.ink())
    else:
        canvas.polygon(points, None, canvas.ink(), rng.uniform(0.02, 0.045))
    return canvas.done()


def _colours(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The circle's colour; others have other shapes."""
    canvas = Canvas.any(rng)
    others = [kind for kind in OUTLINES if kind not in ("circle", "drop", "crescent")]
    spots = _spots(rng, 4, 0.27)
    for x, y in spots[1:]:
        figure(canvas, rng.choice(others), x, y, 0.1, named(rng, rng.choice(list(HUES))), rng.uniform(0, 360))
    figure(canvas, "circle", *spots[0], rng.uniform(0.11, 0.15), named(rng, label))
    return canvas.done()


def _spots(rng: random.Random, number: int, apart: float, margin: float = 0.14) -> list[Point]:
    """Places at least `apart` from each other, or as far as many attempts get."""
    while True:
        found: list[Point] = []
        for _ in range(200):
            spot = (rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin))
            if all(math.dist(spot, other) >= apart for other in found):
                found.append(spot)
                if len(found) == number:
                    return found
        apart *= 0.95


def _counting(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    kind, fill = rng.choice(["circle", "square", "star", "triangle"]), canvas.ink()
    for x, y in _spots(rng, int(label), 0.25, 0.12):
        figure(canvas, kind, x, y, rng.uniform(0.065, 0.1), fill, rng.uniform(0, 360))
    return canvas.done()


def _relation(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """Where the circle is, seen from the square."""
    canvas = Canvas.any(rng)
    dx, dy = _DIRECTIONS[label]
    gap, aside = rng.uniform(0.26, 0.42), rng.uniform(-0.12, 0.12)
    step = (dx * gap + abs(dy) * aside, dy * gap + abs(dx) * aside)
    x, y = rng.uniform(0.45, 0.55) - step[0] / 2, rng.uniform(0.45, 0.55) - step[1] / 2
    one, two = rng.uniform(0.09, 0.13), rng.uniform(0.09, 0.13)
    figure(canvas, "square", x, y, one, canvas.ink(), rng.uniform(-15, 15))
    figure(canvas, "circle", x + step[0], y + step[1], two, canvas.ink())
    return canvas.done()


def _inside(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """Where a spot lies: in a closed outline, on its line, or outside."""
    canvas = Canvas.any(rng)
    x, y, phase = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58), rng.uniform(0, 6.3)
    lobes, depth, radius = rng.choice([2, 3, 4]), rng.uniform(0.1, 0.25), rng.uniform(0.2, 0.27)

    def edge(angle: float) -> float:
        return radius * (1 + depth * math.sin(lobes * angle + phase))

    around = np.linspace(0, 2 * math.pi, 60)
    canvas.line([(x + edge(t) * math.cos(t), y + edge(t) * math.sin(t)) for t in around], canvas.ink(), 0.022)
    angle = rng.uniform(0, 2 * math.pi)
    far = {"inside": rng.uniform(0, 0.55), "on the line": 1.0, "outside": 1 + rng.uniform(0.4, 0.6)}[label] * edge(
        angle
    )
    canvas.disc(x + far * math.cos(angle), y + far * math.sin(angle), 0.042, named(rng, "red"))
    return canvas.done()


def _largest(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    places, kind = ["left", "middle", "right"], rng.choice(list(OUTLINES))
    small = rng.uniform(0.075, 0.1)
    for i, place in enumerate(places):
        radius = small * (rng.uniform(1.4, 1.6) if place == label else rng.uniform(0.9, 1.1))
        figure(canvas, kind, 0.2 + 0.3 * i, 0.5 + rng.uniform(-0.2, 0.2), radius, canvas.ink(), rng.uniform(-20, 20))
    return canvas.done()


def _odd_one(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """Which of nine figures differs, in shape or in colour."""
    canvas = Canvas(rng, dark=False)
    rows, columns = ["top", "middle", "bottom"], ["left", "centre", "right"]
    usual, other = rng.sample(["circle", "square", "triangle", "star", "cross", "heart"], 2)
    hue, hue_of_odd = rng.sample(list(HUES), 2)
    by_colour = rng.random() < 0.5
    for i in range(3):
        for j in range(3):
            odd = label == f"{rows[i]} {columns[j]}"
            fill = named(rng, hue_of_odd if odd and by_colour else hue)
            kind = other if odd and not by_colour else usual
            x, y = 0.2 + 0.3 * j + rng.uniform(-0.02, 0.02), 0.2 + 0.3 * i + rng.uniform(-0.02, 0.02)
            figure(canvas, kind, x, y, 0.1, fill)
    return canvas.done()


def _symmetry(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """A pattern of squares that is its own mirror image, left and right or up and down, or neither."""
    canvas = Canvas.any(rng)
    n = 6
    cells = [[rng.random() < 0.45 for _ in range(n)] for _ in range(n)]
    for i in range(n):
        for j in range(n):
            if label == "left-right" and j >= n // 2:
                cells[i][j] = cells[i][n - 1 - j]
            if label == "up-down" and i >= n // 2:
                cells[i][j] = cells[n - 1 - i][j]
    fill, x, y, side = canvas.ink(), rng.uniform(0.05, 0.15), rng.uniform(0.05, 0.15), rng.uniform(0.125, 0.14)
    for i, row in enumerate(cells):
        for j, on in enumerate(row):
            if on:
                canvas.box(x + j * side, y + i * side, x + (j + 0.92) * side, y + (i + 0.92) * side, fill)
    return canvas.done()


def _hidden(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """Which figure stands behind bars."""
    canvas = Canvas.any(rng)
    x, y, radius = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58), rng.uniform(0.26, 0.34)
    figure(canvas, label, x, y, radius, canvas.ink(), rng.uniform(-25, 25))
    bar, turn = canvas.ink(), rng.choice([0, 45, 90, 135]) + rng.uniform(-10, 10)
    offset = rng.uniform(0, 0.2)
    for k in range(-4, 5):
        ends = placed([(-1, 0.2 * k + offset), (1, 0.2 * k + offset)], 0.5, 0.5, 1, turn)
        canvas.line(ends, bar, rng.uniform(0.06, 0.085))
    return canvas.done()


def _crossing(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """How often two curves cross."""
    canvas = Canvas.any(rng)
    crossings = int(label)
    xs = np.linspace(0.08, 0.92, 60)
    at = sorted(rng.uniform(0.2, 0.8) for _ in range(crossings))
    while any(b - a < 0.17 for a, b in pairwise(at)):
        at = sorted(rng.uniform(0.17, 0.83) for _ in range(crossings))
    between = np.ones_like(xs) * rng.uniform(0.1, 0.2)
    for place in at:
        between *= np.tanh((xs - place) * 12)
    middle = 0.5 + rng.uniform(-0.1, 0.1) + rng.uniform(-0.2, 0.2) * np.sin(xs * rng.uniform(2, 6))
    turn = rng.choice([0, 90])
    for sign, fill in ((1, canvas.ink()), (-1, canvas.ink())):
        points = [(float(a) - 0.5, float(b) - 0.5) for a, b in zip(xs, middle + sign * between, strict=True)]
        canvas.line(placed(points, 0.5, 0.5, 1, turn), fill, 0.025)
    return canvas.done()


def _same(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """What two figures have in common."""
    canvas = Canvas(rng, dark=False)
    kinds = rng.sample(["circle", "square", "triangle", "star", "cross", "heart"], 2)
    hues = rng.sample(list(HUES), 2)
    same_shape, same_colour = label in ("shape", "both"), label in ("colour", "both")
    for i, x in enumerate((0.28, 0.72)):
        kind, hue = kinds[0 if same_shape else i], hues[0 if same_colour else i]
        figure(canvas, kind, x + rng.uniform(-0.03, 0.03), 0.5 + rng.uniform(-0.15, 0.15), 0.15, named(rng, hue))
    return canvas.done()


TASKS = (
    PictureTask("shapes", "The kind of figure.", tuple(OUTLINES), _shapes),
    PictureTask("circle_colour", "The colour of the only circle.", tuple(HUES), _colours),
    PictureTask("counting", "How many figures there are.", tuple(map(str, range(1, 8))), _counting),
    PictureTask("spatial_relation", "Where the circle is, seen from the square.", tuple(_DIRECTIONS), _relation),
    PictureTask("inside_outside", "Where the red spot lies.", ("inside", "on the line", "outside"), _inside),
    PictureTask("largest", "Which of three figures is the largest.", ("left", "middle", "right"), _largest),
    PictureTask(
        "odd_one_out",
        "Which of nine figures differs.",
        tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")),
        _odd_one,
    ),
    PictureTask("symmetry", "The pattern's symmetry.", ("left-right", "up-down", "none"), _symmetry),
    PictureTask(
        "occlusion", "The figure behind the bars.", ("circle", "triangle", "square", "star", "heart", "cross"), _hidden
    ),
    PictureTask("crossings", "How often the two curves cross.", ("0", "1", "2", "3"), _crossing),
    PictureTask("in_common", "What two figures have in common.", ("shape", "colour", "both", "nothing"), _same),
)
