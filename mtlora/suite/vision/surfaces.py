"""Generated tasks about whole surfaces: patterns, defects, pages, photographic faults."""

import math
import random

import numpy as np
from PIL import Image

from mtlora.suite.base import Split
from mtlora.suite.vision.canvas import (
    BLACK,
    BOLD,
    HUES,
    SANS,
    SERIF,
    SIZE,
    WHITE,
    Canvas,
    PictureTask,
    colour,
    named,
    placed,
)
from mtlora.suite.vision.figures import OUTLINES, figure


def _pattern(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    ink, step, phase = canvas.ink(), rng.uniform(0.09, 0.18), rng.uniform(0, 1)
    lines = [(k + phase) * step - 0.5 for k in range(-8, 22)]
    turns = {
        "upright stripes": (90,), "level stripes": (0,), "rising stripes": (-45,), "falling stripes": (45,),
        "grid": (0, 90), "lattice": (45, -45),
    }  # fmt: skip
    if label in turns:
        width = step * rng.uniform(0.25, 0.5)
        for turn in turns[label]:
            for at in lines:
                canvas.line(placed([(-1, at - 0.2), (1, at - 0.2)], 0.5, 0.5, 1, turn + rng.uniform(-1, 1)), ink, width)
    elif label == "waves":
        height, length = step * rng.uniform(0.3, 0.45), rng.uniform(12, 24)
        for at in lines:
            points = [(t, at + 0.5 + height * math.sin(length * t)) for t in np.linspace(0, 1, 60)]
            canvas.line(points, ink, step * rng.uniform(0.25, 0.3))
    else:
        for i in range(-1, 13):
            for j in range(-1, 13):
                x, y = (i + phase) * step, (j + phase) * step
                if label == "dots":
                    canvas.disc(x + (j % 2) * step / 2, y, 0.3 * step, ink)
                elif label == "chequers" and (i + j) % 2:
                    canvas.box(x, y, x + step, y + step, ink)
                elif label == "bricks":
                    shift = (j % 2) * step
                    canvas.box(2 * x + shift - 0.4, y, 2 * x + 2 * step + shift - 0.4, y + step, None, ink, 0.014)
    return canvas.done()


def _defect(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """What is wrong with a woven cloth."""
    canvas = Canvas(rng, dark=rng.random() < 0.4)
    thread, step = canvas.ink(), rng.uniform(0.035, 0.06)
    upright = rng.random() < 0.5
    number = int(1.2 / step)
    missing = rng.randrange(number // 4, 3 * number // 4) if label == "missing thread" else None
    for turn in (0, 90):
        for k in range(number):
            if k == missing and (turn == 90) == upright:
                continue
            at = -0.55 + k * step
            canvas.line(placed([(-0.7, at), (0.7, at)], 0.5, 0.5, 1, turn), thread, step * 0.35)
    x, y = rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75)
    if label == "hole":
        around = np.linspace(0, 2 * math.pi, 16)
        radius = rng.uniform(0.07, 0.11)
        edge = [
            (x + radius * rng.uniform(0.7, 1.2) * math.cos(t), y + radius * rng.uniform(0.7, 1.2) * math.sin(t))
            for t in around
        ]
        canvas.polygon(edge, BLACK if not canvas.dark else WHITE)
    elif label == "stain":
        wide, high = rng.uniform(0.1, 0.18), rng.uniform(0.1, 0.18)
        side = canvas.image.size[0]
        ys, xs = np.mgrid[0:side, 0:side] / side
        soft = np.clip(1.6 - ((xs - x) / wide) ** 2 - ((ys - y) / high) ** 2, 0, 1) * rng.uniform(0.5, 0.75)
        stain = Image.new("RGB", canvas.image.size, colour(rng.uniform(15, 50), 0.7, rng.uniform(0.3, 0.55)))
        canvas.image.paste(stain, (0, 0), Image.fromarray((255 * soft).astype(np.uint8)))
    elif label == "scratch":
        points = [(x, y)]
        heading = rng.uniform(0, 6.3)
        for _ in range(6):
            heading += rng.uniform(-0.35, 0.35)
            points.append((points[-1][0] + 0.07 * math.cos(heading), points[-1][1] + 0.07 * math.sin(heading)))
        canvas.line(points, WHITE if canvas.dark else BLACK, 0.02)
    canvas.turn(rng.uniform(-4, 4))
    return canvas.done()


def _page(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The kind of a page, from its layout."""
    canvas = Canvas(rng, dark=rng.random() < 0.4)
    left, right, top, bottom = (
        rng.uniform(0.06, 0.16),
        rng.uniform(0.84, 0.94),
        rng.uniform(0.03, 0.09),
        rng.uniform(0.91, 0.97),
    )
    if label == "receipt":
        left, right = rng.uniform(0.26, 0.33), rng.uniform(0.67, 0.74)
    canvas.box(left, top, right, bottom, WHITE, BLACK, 0.004)
    grey, wide, thin = colour(0, 0, rng.uniform(0.15, 0.5)), right - left, rng.uniform(0.011, 0.015)
    margin = 0.1 * wide

    def text(x1: float, x2: float, y1: float, y2: float, step: float = 0.035, ragged: bool = True) -> None:
        for y in np.arange(y1, y2, step).tolist():
            end = x2 - (rng.uniform(0, 0.25) * (x2 - x1) if ragged else 0)
            canvas.line([(x1, y), (end, y)], grey, thin)

    x1, x2 = left + margin, right - margin
    if label == "letter":
        text(x1, x1 + 0.3 * wide, top + 0.06, top + 0.17)
        text(x2 - 0.25 * wide, x2, top + 0.2, top + 0.22)
        for k in range(3):
            text(x1, x2, top + 0.3 + 0.15 * k, top + 0.41 + 0.15 * k)
        canvas.line([(x1 + 0.03 * k, bottom - 0.07 + 0.02 * math.sin(4 * k)) for k in range(8)], BLACK, 0.01)
    elif label == "newspaper":
        canvas.text(
            (x1 + x2) / 2, top + 0.08, rng.choice(["The Herald", "Daily News", "The Times"]), SERIF, 0.11, BLACK
        )
        columns = rng.choice([2, 3])
        each = (x2 - x1) / columns
        for k in range(columns):
            text(x1 + k * each, x1 + (k + 0.9) * each, top + 0.2, bottom - 0.05, 0.028, ragged=False)
        canvas.box(x1, top + 0.22, x1 + 0.9 * each, top + rng.uniform(0.38, 0.48), colour(0, 0, rng.uniform(0.5, 0.7)))
    elif label == "invoice":
        canvas.text(x1 + 0.2 * wide, top + 0.07, "INVOICE", BOLD, 0.08, BLACK)
        text(x2 - 0.3 * wide, x2, top + 0.05, top + 0.15)
        rows, y = rng.randint(5, 8), top + 0.25
        for k in range(rows + 1):
            canvas.line([(x1, y + 0.065 * k), (x2, y + 0.065 * k)], grey, 0.008)
        for share in (0, 0.55, 0.75, 1):
            canvas.line([(x1 + share * (x2 - x1), y), (x1 + share * (x2 - x1), y + 0.065 * rows)], grey, 0.008)
        text(x2 - 0.2 * wide, x2, y + 0.065 * rows + 0.04, y + 0.065 * rows + 0.1, ragged=False)
    elif label == "receipt":
        canvas.text((x1 + x2) / 2, top + 0.06, "SHOP", BOLD, 0.07, BLACK)
        for y in np.arange(top + 0.14, bottom - 0.16, 0.04).tolist():
            canvas.line([(x1, y), (x1 + rng.uniform(0.3, 0.6) * (x2 - x1), y)], grey, thin)
            canvas.line([(x2 - 0.18 * (x2 - x1), y), (x2, y)], grey, thin)
        for k in range(20):
            canvas.line(
                [(x1 + (x2 - x1) * k / 19, bottom - 0.11), (x1 + (x2 - x1) * k / 19, bottom - 0.03)],
                BLACK,
                rng.choice([0.004, 0.011]),
            )
    elif label == "form":
        for y in np.arange(top + 0.1, bottom - 0.06, rng.uniform(0.09, 0.12)).tolist():
            canvas.line([(x1, y), (x1 + 0.2 * wide, y)], grey, thin)
            canvas.box(x1 + 0.3 * wide, y - 0.025, x2, y + 0.025, None, grey, 0.008)
    elif label == "slide":
        canvas.text(
            (x1 + x2) / 2,
            top + 0.13,
            rng.choice(["Results", "Overview", "Our plan"]),
            SANS,
            0.14,
            named(rng, rng.choice(list(HUES))),
        )
        for y in np.arange(top + 0.33, bottom - 0.1, 0.14).tolist():
            canvas.disc(x1, y, 0.018, BLACK)
            canvas.line([(x1 + 0.06, y), (x1 + rng.uniform(0.4, 0.7), y)], grey, 2 * thin)
    else:
        text(x1, x1 + 0.5 * wide, top + 0.06, top + 0.08)
        canvas.line([(x1, top + 0.15), (x1, bottom - 0.35), (x2, bottom - 0.35)], BLACK, 0.01)
        for k in range(5):
            x = x1 + (k + 0.3) * (x2 - x1) / 5
            canvas.box(
                x, bottom - 0.35 - rng.uniform(0.08, 0.35), x + 0.08, bottom - 0.35, named(rng, rng.choice(list(HUES)))
            )
        text(x1, x2, bottom - 0.25, bottom - 0.08)
    canvas.turn(rng.uniform(-6, 6))
    return canvas.done()


def _scene(rng: random.Random) -> Canvas:
    canvas = Canvas.any(rng)
    for _ in range(rng.randint(5, 9)):
        kind = rng.choice(list(OUTLINES))
        figure(
            canvas,
            kind,
            rng.random(),
            rng.random(),
            rng.uniform(0.08, 0.2),
            named(rng, rng.choice(list(HUES))),
            rng.uniform(0, 360),
        )
    canvas.text(
        rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.choice(["Open", "Sale", "Exit"]), BOLD, 0.2, canvas.ink()
    )
    return canvas


def _fault(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """What is wrong with a photograph."""
    canvas = _scene(rng)
    if label == "blurred":
        canvas.blur(rng.uniform(0.014, 0.03))
    picture = canvas.done(rng.uniform(28, 45) if label == "noisy" else rng.uniform(1, 4)).astype(np.float32)
    if label == "too dark":
        picture *= rng.uniform(0.15, 0.32)
    elif label == "too bright":
        picture = 255 - (255 - picture) * rng.uniform(0.15, 0.35)
    elif label == "coarse":
        cell = rng.choice([7, 8, 14])
        small = picture.reshape(SIZE // cell, cell, SIZE // cell, cell, 3).mean(axis=(1, 3))
        picture = small.repeat(cell, axis=0).repeat(cell, axis=1)
    elif label == "colour cast":
        picture *= np.array(rng.choice([(1, 0.6, 0.5), (0.5, 0.7, 1), (0.65, 1, 0.55)]), np.float32)
    elif label == "no colour":
        picture = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return np.clip(picture, 0, 255).astype(np.uint8)


TASKS = (
    PictureTask(
        "patterns",
        "The pattern.",
        (
            "upright stripes",
            "level stripes",
            "rising stripes",
            "falling stripes",
            "grid",
            "lattice",
            "waves",
            "dots",
            "chequers",
            "bricks",
        ),
        _pattern,
    ),
    PictureTask(
        "cloth_defects",
        "What is wrong with the cloth.",
        ("none", "missing thread", "hole", "stain", "scratch"),
        _defect,
    ),
    PictureTask(
        "page_kinds",
        "The kind of page.",
        ("letter", "newspaper", "invoice", "receipt", "form", "slide", "report"),
        _page,
    ),
    PictureTask(
        "photo_faults",
        "What is wrong with the photograph.",
        ("nothing", "blurred", "noisy", "too dark", "too bright", "coarse", "colour cast", "no colour"),
        _fault,
    ),
)
