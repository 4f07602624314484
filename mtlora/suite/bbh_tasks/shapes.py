"""Which shape an SVG path draws."""

import math
import random
import re
from itertools import pairwise

from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError, choose, matched, read_options, with_options

_OPTIONS = (
    "circle", "heptagon", "hexagon", "kite", "line", "octagon", "pentagon", "rectangle", "sector", "triangle",
)  # fmt: skip
# Shapes by their number of lines. Four lines are a kite, or the trapezoid if there is an eleventh option.
_POLYGONS = {1: "line", 3: "triangle", 4: "kite", 5: "pentagon", 6: "hexagon", 7: "heptagon", 8: "octagon"}
_EXTRA = ("trapezoid", "ellipse")


def solve_shapes(text: str) -> Solution:
    """Works through the numbered ends of the lines (whole part of x) and the arcs, and names the shape."""
    letters = read_options(text)
    path = matched(r'^This SVG path element <path d="(.*)"/> draws a\n', text)[1]
    working, lines, arcs = [], 0, 0
    for command, end in re.findall(r"([LA]) [^LAM]*?(\d+)(?:\.\d+)?,[\d.]+ *(?=[LAM]|$)", path):
        lines += command == "L"
        arcs += command == "A"
        working.append(f"{end} {lines}" if command == "L" else f"{end} arc")
    shape = {(0, 2): "ellipse", (2, 1): "sector"}.get((lines, arcs), "" if arcs else _POLYGONS.get(lines, ""))
    if shape == "kite" and "trapezoid" in letters:
        shape = "trapezoid"
    if not shape:
        raise UnsolvedError(f"{lines} lines and {arcs} arcs are no known shape")
    return Solution(f"{' '.join(working)}, {shape}", choose(letters, shape))


def generate_shapes(rng: random.Random) -> str:
    """A convex polygon, a line, a sector or an ellipse, somewhere between 0 and 100."""
    kind = rng.choice(("ellipse", "sector", "line", 3, "kite", "trapezoid", 5, 6, 6, 7, 8))
    x, y, size = rng.uniform(35, 65), rng.uniform(35, 65), rng.uniform(8, 34)
    turn = rng.uniform(0, 360)

    def at(degrees: float, share: float = 1.0) -> str:
        angle = math.radians(degrees + turn)
        return f"{x + share * size * math.cos(angle):.2f},{y + share * size * math.sin(angle):.2f}"

    options = [*_OPTIONS, *(extra for extra in _EXTRA if extra == kind)]
    if kind == "ellipse":
        arc = f"A {size:.2f},{size:.2f} {turn:.2f} 1,0"
        path = f"M {at(0)} {arc} {at(180)} {arc} {at(0)}"
    elif kind == "sector":
        center = f"{x:.2f},{y:.2f}"
        parts = [f"L {at(0)}", f"A {size:.2f},{size:.2f} {turn:.2f} 0,1 {at(rng.uniform(40, 300))}", f"L {center}"]
        path = f"M {center} {_lifted(rng, parts)}"
    elif kind == "line":
        path = f"M {at(0)} L {at(180)}"
    else:
        if kind == "kite":
            points = [at(0), at(90, 0.5), at(180, rng.uniform(0.4, 0.9)), at(270, 0.5)]
        elif kind == "trapezoid":
            half = rng.uniform(20, 60)
            points = [at(half), at(180 - half), at(180 + half / 2), at(-half / 2)]
        else:
            count = int(kind)
            points = [at(360 * (i + rng.uniform(-0.3, 0.3)) / count, rng.uniform(0.8, 1)) for i in range(count)]
        parts = [f"L {point}" for point in (*points[1:], points[0])]
        path = f"M {points[0]} {_lifted(rng, parts)}"
    return with_options(f'This SVG path element <path d="{path}"/> draws a', options)


def _lifted(rng: random.Random, parts: list[str]) -> str:
    """The parts in order; sometimes the pen is lifted and put down again at the same point."""
    path = parts[0]
    for before, part in pairwise(parts):
        if rng.random() < 0.25:
            path += f" M {before.split()[-1]}"
        path += f" {part}"
    return path


TASKS = (
    BBHTask(
        "geometric_shapes", "Names the shape that an SVG path draws.", solve_shapes, 80, generate_shapes,
    ),
)  # fmt: skip
