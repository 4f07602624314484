"""The suite `builtin-pictures`: tasks of text about generated pictures. All tasks ask about the same pictures.

A picture shows one to three figures, each of another shape and colour, in its quarters. Answers follow from what was
drawn, and questions name shapes and colours, so neither text nor image alone is enough for most tasks.
"""

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from mtlora.answer import AnswerType, Label
from mtlora.suite.base import Example, Split, SuiteError, check_split, seeded, unknown_task
from mtlora.suite.vision.canvas import Canvas, named
from mtlora.suite.vision.figures import figure
from mtlora.task import TaskSpec
from mtlora.vision.image_input import ImagePreparation

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
QUARTERS = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
_NUMBERS = ("one", "two", "three")
# Number of cached pictures, 20 kB each.
_KEPT = 1024


@dataclass(frozen=True)
class Figure:
    """One of `SHAPES`, `COLOURS` and `QUARTERS` each."""

    shape: str
    colour: str
    quarter: str


Scene = tuple[Figure, ...]


def _scene(rng: random.Random) -> Scene:
    number = rng.randint(1, len(_NUMBERS))
    columns = (rng.sample(names, number) for names in (SHAPES, COLOURS, list(QUARTERS)))
    return tuple(Figure(*row) for row in zip(*columns, strict=True))


def _draw(rng: random.Random, scene: Scene) -> bytes:
    """A PNG."""
    canvas = Canvas(rng, dark=False)
    for each in scene:
        x, y = (place + rng.uniform(-0.05, 0.05) for place in QUARTERS[each.quarter])
        figure(canvas, each.shape, x, y, rng.uniform(0.13, 0.18), named(rng, each.colour), rng.uniform(-20, 20))
    file = io.BytesIO()
    Image.fromarray(canvas.done()).save(file, "PNG", compress_level=1)
    return file.getvalue()


@lru_cache(maxsize=_KEPT)
def _picture(split: Split, seed: int, index: int) -> tuple[Scene, bytes]:
    """The picture with this number; pictures of other seeds and splits differ at least in their noise."""
    rng = seeded("builtin-pictures", split, seed, index)
    scene = _scene(rng)
    return scene, _draw(rng, scene)


def _number(rng: random.Random, scene: Scene) -> tuple[str, str]:
    return "", _NUMBERS[len(scene) - 1]


def _list(rng: random.Random, scene: Scene) -> tuple[str, str]:
    order = list(QUARTERS)
    found = sorted(scene, key=lambda each: order.index(each.quarter))
    return "", ", ".join(f"{each.colour} {each.shape}" for each in found)


def _colour(rng: random.Random, scene: Scene) -> tuple[str, str]:
    chosen = rng.choice(scene)
    return chosen.shape, chosen.colour


def _shape(rng: random.Random, scene: Scene) -> tuple[str, str]:
    chosen = rng.choice(scene)
    return chosen.colour, chosen.shape


def _where(rng: random.Random, scene: Scene) -> tuple[str, str]:
    chosen = rng.choice(scene)
    return chosen.colour, chosen.quarter


def _what(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """What is in a quarter; sometimes nothing."""
    quarter = rng.choice(list(QUARTERS)) if rng.random() < 0.3 else rng.choice(scene).quarter
    found = next((each for each in scene if each.quarter == quarter), None)
    return quarter, f"{found.colour} {found.shape}" if found else "nothing"


def _there(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Whether a shape is there, or a colour."""
    held = {f"a {each.shape}" for each in scene} | {f"anything {each.colour}" for each in scene}
    kinds = [f"a {shape}" for shape in SHAPES], [f"anything {colour}" for colour in COLOURS]
    wanted = rng.random() < 0.5
    return rng.choice([name for name in rng.choice(kinds) if (name in held) == wanted]), "yes" if wanted else "no"


def _both(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Whether a shape of a colour is there; if not, another figure has the shape or the colour."""
    chosen, wanted = rng.choice(scene), rng.random() < 0.5
    shape, colour = chosen.shape, chosen.colour
    if not wanted and rng.random() < 0.5:
        shape = rng.choice([name for name in SHAPES if name != shape])
    elif not wanted:
        colour = rng.choice([name for name in COLOURS if name != colour])
    return f"{colour} {shape}", "yes" if wanted else "no"


@dataclass(frozen=True)
class PictureQuestion:
    """A generated task. `ask(rng, scene)` gives (the text beside the picture, answer); question: its template."""

    id: str
    description: str
    question: str
    ask: Callable[[random.Random, Scene], tuple[str, str]]
    answer: AnswerType | None = None


_YES_OR_NO = Label(labels=("yes", "no"))
# The order numbers the tasks of an adapter: append, never reorder.
_TASKS = (
    PictureQuestion(
        "picture_number", "How many figures there are.", "How many figures are there?", _number,
        Label(labels=_NUMBERS),
    ),
    PictureQuestion("picture_list", "All figures, row by row.", "List the figures.", _list),
    PictureQuestion(
        "picture_colour", "The colour of a shape.", "What colour is the {input}?", _colour, Label(labels=COLOURS)
    ),
    PictureQuestion("picture_shape", "The shape of a colour.", "What shape is {input}?", _shape, Label(labels=SHAPES)),
    PictureQuestion(
        "picture_place", "Where the figure of a colour is.", "Where is the {input} figure?", _where,
        Label(labels=tuple(QUARTERS)),
    ),
    PictureQuestion("picture_quarter", "What is in a quarter.", "What is at the {input}?", _what),
    PictureQuestion(
        "picture_any", "Whether a shape or a colour is there.", "Is there {input}?", _there, _YES_OR_NO
    ),
    PictureQuestion("picture_both", "Whether a shape of a colour is there.", "Is there a {input}?", _both, _YES_OR_NO),
)  # fmt: skip


class PicturesSuite:
    """Draws pictures on demand; a smaller `count` gives a prefix of what a larger one gives."""

    name = "builtin-pictures"
    finite = False

    def __init__(self) -> None:
        self._tasks = {task.id: task for task in _TASKS}
        self.tasks: Sequence[TaskSpec] = tuple(_spec(task) for task in _TASKS)

    def examples(self, task_id: str, split: Split, count: int | None, seed: int = 0) -> list[Example]:
        """See `Suite.examples`: `count` must be a number. Every picture has its own noise, so no two are the same."""
        if task_id not in self._tasks:
            raise unknown_task(self, task_id)
        check_split(split)
        if count is None or count < 0:
            raise SuiteError(f"count of task {task_id} is {count}; generated tasks need one >= 0")
        rng, found = seeded(task_id, split, seed), []
        for index in range(count):
            scene, png = _picture(split, seed, index)
            text, answer = self._tasks[task_id].ask(rng, scene)
            found.append(Example(task_id, text, answer, image=png))
        return found


def _spec(task: PictureQuestion) -> TaskSpec:
    return TaskSpec(
        id=task.id,
        description=task.description,
        template=f"{{image}}\n{task.question}\nAnswer:",
        max_new_tokens=40 if task.answer is None else 8,
        answer=task.answer,
        picture=ImagePreparation(),
    )
