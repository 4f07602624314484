"""The suite of texts about pictures, and folders of such examples."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtlora.suite import SuiteError, SuitePart, load_suite
from mtlora.suite.base import SPLITS
from mtlora.suite.vision.canvas import HUES, colour
from mtlora.suite.vision.pictures import QUARTERS
from mtlora.vision.image_input import ImagePreparation

SUITE = load_suite("builtin-pictures")


def test_all_tasks_take_an_image_and_most_a_question() -> None:
    assert len({task.id for task in SUITE.tasks}) == len(SUITE.tasks) >= 6
    assert all(task.picture and not task.image for task in SUITE.tasks)
    assert [task.fields for task in SUITE.tasks].count(("input",)) >= 6
    assert sum(task.answer is None for task in SUITE.tasks) >= 2


@pytest.mark.parametrize("task", SUITE.tasks, ids=lambda task: task.id)
def test_the_same_seed_draws_the_same_and_splits_share_no_picture(task: Any) -> None:
    drawn = SUITE.examples(task.id, "train", 12)
    assert [(e.input, e.target, e.image) for e in SUITE.examples(task.id, "train", 5)] == [
        (e.input, e.target, e.image) for e in drawn[:5]
    ]
    images = [SUITE.examples(task.id, split, 6, seed)[i].image for split in SPLITS for seed in (0, 1) for i in range(6)]
    assert len(set(images)) == 36
    assert all(task.answer is None or task.answer.check(example.target) for example in drawn)
    assert Counter(example.image for example in SUITE.examples("picture_list", "train", 12)) == Counter(
        example.image for example in drawn
    ), "tasks share their pictures"
    with pytest.raises(SuiteError, match="need one >= 0"):
        SUITE.examples(task.id, "train", None)


def test_answers_agree_with_each_other_and_with_the_pixels() -> None:
    """All tasks agree with the list of figures of a picture, and a figure's pixels have its colour."""
    asked = {task.id: SUITE.examples(task.id, "test", 60) for task in SUITE.tasks}
    for i, listed in enumerate(asked["picture_list"]):
        figures = [each.split(" ") for each in listed.target.split(", ")]
        shapes = {shape: colour for colour, shape in figures}
        answers = {task_id: (found[i].input, found[i].target) for task_id, found in asked.items()}
        assert answers["picture_number"] == ("", ("one", "two", "three")[len(figures) - 1])
        shape, answer = answers["picture_colour"]
        assert shapes[shape] == answer
        hue, answer = answers["picture_shape"]
        assert shapes[answer] == hue
        thing, answer = answers["picture_any"]
        assert (answer == "yes") == (thing.split(" ")[1] in [*shapes, *shapes.values()])
        thing, answer = answers["picture_both"]
        assert (answer == "yes") == (thing.split(" ") in figures)
        _, answer = answers["picture_quarter"]
        assert answer == "nothing" or answer.split(" ") in figures
        hue, place = answers["picture_place"]
        x, y = (round(112 * each) for each in QUARTERS[place])
        assert isinstance(listed.image, bytes)
        pixels = np.asarray(Image.open(io.BytesIO(listed.image)), dtype=float)
        middle = pixels[y - 3 : y + 4, x - 3 : x + 4].mean((0, 1))
        wanted = np.array(colour(HUES[hue], 0.88, 0.86), dtype=float)
        directions = [each / np.linalg.norm(each) for each in (middle - middle.min() + 1, wanted - wanted.min() + 1)]
        assert directions[0] @ directions[1] > 0.8, (hue, middle)


def _write(folder: Path, content: dict[str, Any]) -> Path:
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    (folder / "ask.json").write_text(json.dumps(content))
    return folder


def test_a_folder_may_have_images_beside_its_texts(tmp_path: Path) -> None:
    texts = [f"What is it, {i}?" for i in range(40)]
    suite = load_suite(
        str(
            _write(
                tmp_path,
                {
                    "picture": {"size": 56},
                    "examples": [{"input": text, "image": "red.png", "target": "red"} for text in texts],
                },
            )
        )
    )
    (task,) = suite.tasks
    assert task.picture == ImagePreparation(size=56)
    assert task.fields == ("input",)
    found = [e for split in SPLITS for e in suite.examples(task.id, split, None)]
    assert sorted(e.input for e in found) == sorted(texts)
    assert found[0].encoded_image() == (tmp_path / "red.png").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"examples": [{"input": "a", "target": "b", "image": "red.png"}]}, "no `picture`"),
        ({"picture": {}, "examples": [{"input": "a", "target": "b"}]}, "found no image"),
        ({"picture": {"size": 3}, "examples": [{"input": "a", "target": "b", "image": "red.png"}]}, "picture.size"),
        ({"picture": {"pooling": "cls"}, "examples": [{"input": "a", "target": "b", "image": "x"}]}, "picture.pooling"),
    ],
)
def test_images_and_picture_go_together(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=message):
        load_suite(str(_write(tmp_path, content)))


def test_a_mix_keeps_the_same_question_about_many_pictures() -> None:
    parts = [SuitePart(suite="builtin-pictures", examples_per_task=30), SuitePart(suite="builtin", examples_per_task=2)]
    mixed = load_suite(parts)
    found = mixed.examples("picture_colour", "train", 30)
    assert [(e.input, e.target) for e in found] == [
        (e.input, e.target) for e in SUITE.examples("picture_colour", "train", 30)
    ]
    assert len({example.input for example in found}) < 10


def test_images_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    examples = [{"input": "What?", "image": f"{folder}/1.png", "target": folder} for folder in ("red", "blue")]
    (tmp_path / "colour.json").write_text(json.dumps({"picture": {}, "examples": examples}))
    suite = load_suite(str(tmp_path))
    assert sum(len(suite.examples("colour", split, None)) for split in SPLITS) == 2
