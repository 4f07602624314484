"""Generated tasks about signs: letters, typefaces, cards, road signs, arrows, map symbols, strokes, faces."""

import math
import random

import numpy as np

from mtlora.suite.base import Split
from mtlora.suite.vision.canvas import (
    BLACK,
    BOLD,
    MONO,
    SANS,
    SERIF,
    WHITE,
    Canvas,
    Colour,
    PictureTask,
    Point,
    colour,
    named,
    placed,
    ring,
    star,
)
from mtlora.suite.vision.figures import OUTLINES

# Fonts of training pictures; tests use other fonts.
_SEEN = (
    SANS, BOLD, SERIF, MONO, "DejaVuSans-Oblique", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic", "cmr10",
    "DejaVuSansMono-Oblique",
)  # fmt: skip
_UNSEEN = ("cmss10", "cmtt10", "DejaVuSerif-Bold", "STIXGeneralBol", "DejaVuSans-BoldOblique")
_TYPEFACES = {
    "sans": (SANS, "cmss10"),
    "serif": (SERIF, "STIXGeneral", "cmr10"),
    "mono": (MONO, "cmtt10"),
    "bold": (BOLD, "DejaVuSerif-Bold", "STIXGeneralBol", "DejaVuSansMono-Bold"),
    "italic": ("DejaVuSans-Oblique", "DejaVuSerif-Italic", "STIXGeneralItalic", "cmti10"),
}
_WORDS = (
    "river",
    "stone",
    "green",
    "paper",
    "night",
    "glass",
    "quiet",
    "orange",
    "mother",
    "window",
    "garden",
    "signal",
)
_COMPASS = ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west")
_ARROW = [(0, -1), (0.6, -0.35), (0.22, -0.35), (0.22, 0.9), (-0.22, 0.9), (-0.22, -0.35), (-0.6, -0.35)]
_HAND: dict[str, list[list[Point]]] = {
    "0": [[(math.sin(t) * 0.6, -math.cos(t)) for t in np.linspace(0.1, 6.3, 9)]],
    "1": [[(-0.35, -0.6), (0.1, -1), (0.05, 0), (0.1, 1)]],
    "2": [[(-0.55, -0.6), (-0.2, -1), (0.4, -0.9), (0.5, -0.4), (0, 0.3), (-0.6, 1), (0, 0.9), (0.6, 1)]],
    "3": [[(-0.5, -0.8), (0.1, -1), (0.5, -0.6), (0.2, -0.1), (-0.15, 0),
           (0.3, 0.05), (0.6, 0.5), (0.1, 1), (-0.5, 0.8)]],
    "4": [[(0.1, -1), (-0.3, -0.3), (-0.6, 0.25), (0.1, 0.2), (0.65, 0.2)], [(0.3, -0.4), (0.3, 0.3), (0.25, 1)]],
    "5": [[(0.5, -1), (-0.4, -0.95), (-0.45, -0.2), (0.2, -0.3), (0.55, 0.3), (0.2, 0.9), (-0.5, 0.85)]],
    "6": [[(0.4, -1), (-0.2, -0.5), (-0.5, 0.3), (-0.1, 1), (0.5, 0.6), (0.3, 0.05), (-0.4, 0.3)]],
    "7": [[(-0.6, -0.9), (0, -1), (0.6, -0.95), (0.2, -0.1), (-0.1, 1)]],
    "8": [[(0.4, -0.8), (-0.1, -1), (-0.4, -0.55), (0.1, -0.1), (0.5, 0.5), (0, 1),
           (-0.5, 0.5), (0, -0.05), (0.45, -0.5), (0.35, -0.85)]],
    "9": [[(0.5, -0.6), (0, -1), (-0.5, -0.6), (-0.1, -0.1), (0.45, -0.4), (0.5, -0.7), (0.45, 0.2), (0.2, 1)]],
}  # fmt: skip


def _letter(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    canvas.specks(8)
    name = rng.choice(_SEEN if split == "train" else _UNSEEN)
    canvas.text(
        rng.uniform(0.4, 0.6), rng.uniform(0.42, 0.58), label, name,
        rng.uniform(0.4, 0.7), canvas.ink(), rng.uniform(-12, 12),
    )  # fmt: skip
    return canvas.done()


def _typeface(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    name, ink, size = rng.choice(_TYPEFACES[label]), canvas.ink(), rng.uniform(0.19, 0.23)
    for i, word in enumerate(rng.sample(_WORDS, 3)):
        canvas.text(0.5 + rng.uniform(-0.06, 0.06), 0.22 + 0.28 * i, word, name, size, ink)
    return canvas.done()


def _rotated(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """How far a word is turned."""
    canvas = Canvas.any(rng)
    ink, name, size = canvas.ink(), rng.choice((SANS, SERIF, BOLD)), rng.uniform(0.2, 0.26)
    for i, word in enumerate(rng.sample(_WORDS, 2)):
        canvas.text(0.5, 0.35 + 0.3 * i, word, name, size, ink)
    canvas.turn(
        {"upright": 0, "a quarter right": 90, "upside down": 180, "a quarter left": 270}[label] + rng.uniform(-8, 8)
    )
    return canvas.done()


def _card(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The suit and the rank of a playing card."""
    canvas = Canvas(rng, dark=rng.random() < 0.5)
    rank, suit = label.split(" of ")
    x, y, turn = rng.uniform(0.46, 0.54), rng.uniform(0.46, 0.54), rng.uniform(-12, 12)
    ink = colour(rng.uniform(-8, 8), 0.9, 0.8) if suit in ("hearts", "diamonds") else BLACK
    canvas.polygon(
        placed([(-0.32, -0.44), (0.32, -0.44), (0.32, 0.44), (-0.32, 0.44)], x, y, 1, turn), WHITE, BLACK, 0.006
    )
    for sign in (-1, 1):
        (at,) = placed([(0.2 * sign, 0.31 * sign)], x, y, 1, turn)
        canvas.text(*at, rank, BOLD, 0.2, ink, turn + (180 if sign > 0 else 0))
    _suit(canvas, suit, x, y, rng.uniform(0.13, 0.16), turn, ink)
    return canvas.done()


def _suit(canvas: Canvas, suit: str, x: float, y: float, size: float, turn: float, ink: Colour) -> None:
    if suit == "hearts":
        canvas.polygon(placed(OUTLINES["heart"], x, y, size, turn), ink)
    elif suit == "diamonds":
        canvas.polygon(placed([(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)], x, y, size, turn), ink)
    else:
        canvas.polygon(placed([(0, 0.2), (0.4, 1.15), (-0.4, 1.15)], x, y, size, turn), ink)
        if suit == "spades":
            canvas.polygon(placed(OUTLINES["heart"], x, y, size, turn + 180), ink)
        else:
            for spot in placed([(0, -0.55), (-0.55, 0.25), (0.55, 0.25)], x, y, size, turn):
                canvas.disc(*spot, 0.5 * size, ink)


def _road_sign(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    canvas.specks(15)
    x, y, r = rng.uniform(0.43, 0.57), rng.uniform(0.43, 0.57), rng.uniform(0.26, 0.38)
    red, blue = (
        colour(rng.uniform(-6, 6), 0.9, rng.uniform(0.65, 0.85)),
        colour(rng.uniform(210, 225), 0.9, rng.uniform(0.5, 0.75)),
    )
    if label == "stop":
        canvas.polygon(ring(x, y, r, 8, 22.5), red, WHITE, 0.02)
        canvas.text(x, y, "STOP", BOLD, 0.55 * r, WHITE)
    elif label == "no entry":
        canvas.disc(x, y, r, red)
        canvas.box(x - 0.7 * r, y - 0.16 * r, x + 0.7 * r, y + 0.16 * r, WHITE)
    elif label == "give way":
        canvas.polygon(ring(x, y, r, 3, 180), WHITE, red, 0.22 * r)
    elif label == "priority road":
        canvas.polygon(ring(x, y, r, 4), WHITE, BLACK, 0.015)
        canvas.polygon(ring(x, y, 0.7 * r, 4), named(rng, "yellow"))
    elif label in ("speed limit", "no overtaking", "no stopping"):
        if label == "no stopping":
            canvas.disc(x, y, r, blue, red, 0.17 * r)
            for turn in (45, 135):
                canvas.line(placed([(-0.85, 0), (0.85, 0)], x, y, r, turn), red, 0.15 * r)
        else:
            canvas.disc(x, y, r, WHITE, red, 0.17 * r)
            if label == "speed limit":
                canvas.text(x, y, rng.choice(["30", "50", "60", "70", "80"]), BOLD, 0.8 * r, BLACK)
            else:
                for dx, fill in ((-0.33, red), (0.33, BLACK)):
                    canvas.box(
                        x + (dx - 0.24) * r, y - 0.15 * r, x + (dx + 0.24) * r, y + 0.25 * r, fill, corner=0.05 * r
                    )
                    canvas.box(x + (dx - 0.14) * r, y - 0.32 * r, x + (dx + 0.14) * r, y, fill, corner=0.05 * r)
    elif label in ("warning", "crossroads", "bend"):
        canvas.polygon(ring(x, y + 0.1 * r, 1.1 * r, 3), WHITE, red, 0.16 * r)
        marks: dict[str, list[list[Point]]] = {
            "warning": [[(0, -0.3), (0, 0.2)], [(0, 0.38), (0, 0.45)]],
            "crossroads": [[(-0.3, -0.2), (0.3, 0.4)], [(0.3, -0.2), (-0.3, 0.4)]],
            "bend": [[(-0.15, 0.5), (-0.15, 0.2), (0.2, 0), (0.1, -0.3)]],
        }
        for stroke in marks[label]:
            canvas.line(placed(stroke, x, y + 0.05 * r, r), BLACK, 0.15 * r)
    elif label == "roundabout":
        canvas.disc(x, y, r, blue)
        for start in (0, 120, 240):
            canvas.arc(x, y, 0.6 * r, start, start + 85, WHITE, 0.13 * r)
            (tip,) = placed([(0.54, 0)], x, y, r, start + 95)
            canvas.polygon(ring(*tip, 0.2 * r, 3, start + 185), WHITE)
    elif label == "ahead only":
        canvas.disc(x, y, r, blue)
        canvas.polygon(placed(_ARROW, x, y, 0.65 * r), WHITE)
    else:
        canvas.box(x - r, y - r, x + r, y + r, blue, WHITE, 0.02, corner=0.1 * r)
        canvas.text(x, y, "P", BOLD, 1.3 * r, WHITE)
    canvas.turn(rng.uniform(-8, 8))
    return canvas.done()


def _arrow(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """Where an arrow points."""
    canvas = Canvas.any(rng)
    canvas.specks(12)
    turn = 45 * _COMPASS.index(label) + rng.uniform(-13, 13)
    x, y, size = rng.uniform(0.38, 0.62), rng.uniform(0.38, 0.62), rng.uniform(0.17, 0.3)
    if rng.random() < 0.5:
        canvas.polygon(placed(_ARROW, x, y, size, turn), canvas.ink())
    else:
        ink = canvas.ink()
        canvas.line(placed([(0, 0.95), (0, -0.8)], x, y, size, turn), ink, 0.02)
        canvas.line(placed([(-0.42, -0.4), (0, -0.95), (0.42, -0.4)], x, y, size, turn), ink, 0.024)
    return canvas.done()


def _map_symbol(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """The symbol in the middle of a piece of a map."""
    canvas = Canvas(rng, dark=False)
    for _ in range(3):
        green = colour(rng.uniform(70, 130), rng.uniform(0.2, 0.4), rng.uniform(0.8, 0.95))
        canvas.oval(rng.random(), rng.random(), rng.uniform(0.1, 0.35), rng.uniform(0.1, 0.35), green)
    start, slope, bends = rng.uniform(0, 1), rng.uniform(-0.4, 0.4), rng.uniform(3, 9)
    wave = [(t, start + slope * t + 0.08 * math.sin(bends * t)) for t in np.linspace(0, 1, 30)]
    canvas.line(wave, colour(205, 0.4, 0.95), rng.uniform(0.02, 0.05))
    road = [(rng.random(), 0.0), (rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)), (rng.random(), 1.0)]
    canvas.line(road, rng.choice([WHITE, colour(45, 0.5, 0.98)]), 0.04)
    x, y, r, ink = rng.uniform(0.38, 0.62), rng.uniform(0.38, 0.62), rng.uniform(0.14, 0.2), canvas.ink()
    width = 0.2 * r
    if label == "church":
        canvas.disc(x, y + 0.45 * r, 0.5 * r, ink)
        canvas.line([(x, y), (x, y - r)], ink, width)
        canvas.line([(x - 0.4 * r, y - 0.6 * r), (x + 0.4 * r, y - 0.6 * r)], ink, width)
    elif label == "summit":
        canvas.polygon(ring(x, y, r, 3), ink)
    elif label == "campsite":
        canvas.polygon(ring(x, y, 1.1 * r, 3), None, ink, width)
        canvas.polygon([(x, y), (x + 0.35 * r, y + 0.55 * r), (x - 0.35 * r, y + 0.55 * r)], ink)
    elif label == "airport":
        canvas.line([(x, y - r), (x, y + r)], ink, 1.4 * width)
        canvas.line([(x - r, y + 0.25 * r), (x, y - 0.2 * r), (x + r, y + 0.25 * r)], ink, 1.2 * width)
        canvas.line([(x - 0.4 * r, y + 0.9 * r), (x, y + 0.65 * r), (x + 0.4 * r, y + 0.9 * r)], ink, width)
    elif label == "hospital":
        canvas.box(x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r, WHITE, ink, 0.5 * width)
        canvas.polygon(placed(OUTLINES["cross"], x, y, 0.65 * r), ink)
    elif label == "viewpoint":
        for turn in range(-75, 80, 30):
            canvas.line(placed([(0, -0.4), (0, -1.1)], x, y + 0.4 * r, r, turn), ink, 0.7 * width)
    elif label == "lighthouse":
        canvas.polygon(
            [(x - 0.25 * r, y - 0.3 * r), (x + 0.25 * r, y - 0.3 * r), (x + 0.5 * r, y + r), (x - 0.5 * r, y + r)], ink
        )
        for sign in (-1, 1):
            canvas.polygon([(x, y - 0.6 * r), (x + sign * r, y - r), (x + sign * r, y - 0.3 * r)], ink)
    elif label == "station":
        canvas.box(x - r, y - 0.4 * r, x + r, y + 0.4 * r, ink)
        canvas.line([(x - 1.6 * r, y + 0.7 * r), (x + 1.6 * r, y + 0.7 * r)], ink, 0.7 * width)
        for i in range(-3, 4):
            canvas.line([(x + 0.5 * i * r, y + 0.5 * r), (x + 0.5 * i * r, y + 0.9 * r)], ink, 0.5 * width)
    elif label == "monument":
        canvas.polygon(star(x, y, 1.1 * r), ink)
    else:
        canvas.disc(x, y, 0.9 * r, None, ink, width)
        canvas.disc(x, y, 0.3 * r, ink)
    return canvas.done()


def _strokes(rng: random.Random, label: str, split: Split) -> np.ndarray:
    """A digit as if by hand: points moved, joined smoothly, slanted."""
    canvas = Canvas.any(rng)
    x, y, size, turn, wide = (
        rng.uniform(0.42, 0.58),
        rng.uniform(0.45, 0.55),
        rng.uniform(0.2, 0.34),
        rng.uniform(-14, 14),
        rng.uniform(0.7, 1.15),
    )
    width, ink = rng.uniform(0.02, 0.06), canvas.ink()
    for stroke in _HAND[label]:
        moved = [(wide * (px + rng.gauss(0, 0.06)), py + rng.gauss(0, 0.06)) for px, py in stroke]
        at = np.linspace(0, len(moved) - 1, 8 * len(moved))
        smooth = [_spline(moved, float(t)) for t in at]
        points = placed(smooth, x, y, size, turn)
        canvas.line(points, ink, width)
        for end in (points[0], points[-1]):
            canvas.disc(*end, width / 2, ink)
    return canvas.done()


def _spline(points: list[Point], t: float) -> Point:
    """Catmull and Rom's curve through points, at point number t."""
    i = min(int(t), len(points) - 2)
    u = t - i
    a, b, c, d = (np.array(points[min(max(k, 0), len(points) - 1)]) for k in (i - 1, i, i + 1, i + 2))
    found = 0.5 * (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * b - a - 3 * c + d) * u**3)
    return float(found[0]), float(found[1])


def _face(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    x, y, r = rng.uniform(0.43, 0.57), rng.uniform(0.43, 0.57), rng.uniform(0.28, 0.4)
    canvas.disc(x, y, r, colour(rng.uniform(15, 60), rng.uniform(0.25, 0.8), rng.uniform(0.85, 1)), BLACK, 0.015)
    eye, apart, wide = rng.uniform(0.07, 0.12) * r, rng.uniform(0.33, 0.42) * r, rng.uniform(0.03, 0.045)
    for sign in (-1, 1):
        ex, ey = x + sign * apart, y - 0.25 * r
        if label == "sleepy" or (label == "winking" and sign > 0):
            canvas.line([(ex - 0.16 * r, ey), (ex + 0.16 * r, ey)], BLACK, 0.02)
        else:
            canvas.disc(ex, ey, eye * (1.7 if label == "surprised" else 1.2), BLACK)
        if label == "angry":
            canvas.line([(ex - sign * 0.2 * r, ey - 0.1 * r), (ex + sign * 0.2 * r, ey - 0.32 * r)], BLACK, 0.025)
    mx, my, half = x, y + 0.35 * r, rng.uniform(0.3, 0.42) * r
    if label in ("happy", "winking"):
        canvas.arc(mx, my - 0.25 * r, half * 1.1, 25, 155, BLACK, wide)
    elif label in ("sad", "angry"):
        canvas.arc(mx, my + 0.35 * r, half, 205, 335, BLACK, wide)
    elif label == "surprised":
        canvas.oval(mx, my + 0.05 * r, 0.16 * r, 0.22 * r, BLACK)
    else:
        canvas.line([(mx - half, my), (mx + half, my)], BLACK, wide)
    canvas.turn(rng.uniform(-15, 15))
    return canvas.done()


def _traffic_light(rng: random.Random, label: str, split: Split) -> np.ndarray:
    canvas = Canvas.any(rng)
    canvas.specks(10)
    x, y, r = rng.uniform(0.3, 0.7), rng.uniform(0.42, 0.58), rng.uniform(0.07, 0.11)
    canvas.box(x - 1.7 * r, y - 4 * r, x + 1.7 * r, y + 4 * r, BLACK, corner=r)
    lit = {"stop": (0,), "get ready": (0, 1), "caution": (1,), "go": (2,), "off": ()}[label]
    for i, hue in enumerate((0, 45, 140)):
        on = i in lit
        canvas.disc(
            x, y + 2.5 * r * (i - 1), r, colour(hue + rng.uniform(-8, 8), 0.85 if on else 0.6, 0.95 if on else 0.27)
        )
    canvas.turn(rng.uniform(-10, 10))
    return canvas.done()


TASKS = (
    PictureTask(
        "letters", "The capital letter, in a font that training did not show.", tuple("ABCDEFGHJKLMNPRSTUVY"), _letter
    ),
    PictureTask("typefaces", "The style of the typeface.", tuple(_TYPEFACES), _typeface),
    PictureTask(
        "text_orientation",
        "How far the text is turned.",
        ("upright", "a quarter right", "upside down", "a quarter left"),
        _rotated,
    ),
    PictureTask(
        "playing_cards",
        "The playing card.",
        tuple(
            f"{rank} of {suit}" for suit in ("hearts", "diamonds", "spades", "clubs") for rank in ("A", "K", "7", "4")
        ),
        _card,
    ),
    PictureTask(
        "road_signs",
        "The kind of road sign.",
        (
            "stop",
            "no entry",
            "give way",
            "priority road",
            "speed limit",
            "no overtaking",
            "no stopping",
            "warning",
            "crossroads",
            "bend",
            "roundabout",
            "ahead only",
            "parking",
        ),
        _road_sign,
    ),
    PictureTask("arrows", "Where the arrow points.", _COMPASS, _arrow),
    PictureTask(
        "map_symbols",
        "The symbol on the map.",
        (
            "church",
            "summit",
            "campsite",
            "airport",
            "hospital",
            "viewpoint",
            "lighthouse",
            "station",
            "monument",
            "well",
        ),
        _map_symbol,
    ),
    PictureTask("stroke_digits", "The digit, drawn by strokes.", tuple(_HAND), _strokes),
    PictureTask("faces", "The face's expression.", ("happy", "sad", "angry", "surprised", "sleepy", "winking"), _face),
    PictureTask(
        "traffic_lights", "What the traffic light shows.", ("stop", "get ready", "caution", "go", "off"), _traffic_light
    ),
)
