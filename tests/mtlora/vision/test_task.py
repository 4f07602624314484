"""A task of images: what its entry may hold."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mtlora.errors import describe
from mtlora.task import TaskSpec
from mtlora.vision.image_input import ImageInput, num_features

LABELS = {"answer": {"type": "label", "labels": ["cat", "dog"]}}


def spec(**fields: Any) -> TaskSpec:
    return TaskSpec.model_validate({"id": "t", "description": "d", "image": {}} | fields)


def test_a_task_of_images_has_labels_and_no_constraint_of_text() -> None:
    for labels in (LABELS, {"allowed_answers": ["cat", "dog"]}):
        task = spec(**labels)
        assert task.labels == ("cat", "dog")
        assert task.constraint() is None
        assert task.image == ImageInput(size=112, resize="squash", pooling="cls_mean", augment=("crop", "colour"))
        task.check_answers()


def test_a_task_of_text_does_not_speak_of_images() -> None:
    task = TaskSpec(id="t", description="d")
    assert task.image is None
    assert "image" not in task.model_dump()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a task of images needs labels"),
        ({"answer": {"type": "text"}}, "a task of images needs labels"),
        (
            LABELS | {"template": "Q: {input}"},
            "template: found 'Q: {input}'; allowed: the default, as a task of images has no text",
        ),
        (LABELS | {"document_template": "{document}", "template": "{input}"}, "document_template"),
        (LABELS | {"stop": ["."]}, "stop"),
        (LABELS | {"max_new_tokens": 3}, "max_new_tokens: found 3"),
        (LABELS | {"answer_marker": "=>"}, "answer_marker"),
        (LABELS | {"defaults": {"temperature": 1}}, "defaults"),
        (LABELS | {"image": {"size": 7}}, "image.size"),
        (LABELS | {"image": {"size": 1025}}, "image.size"),
        (LABELS | {"image": {"size": 112.5}}, "image.size"),
        (LABELS | {"image": {"resize": "stretch"}}, "image.resize"),
        (LABELS | {"image": {"pooling": "max"}}, "image.pooling"),
        (LABELS | {"image": {"mean": [0.5, 0.5]}}, "image.mean"),
        (LABELS | {"image": {"mean": [0.5, 0.5, float("nan")]}}, "image.mean"),
        (LABELS | {"image": {"std": [0.5, 0, 0.5]}}, "image.std"),
        (LABELS | {"image": {"std": [0.5, -1, 0.5]}}, "image.std"),
        (LABELS | {"image": {"augment": ["blur"]}}, "image.augment"),
        (LABELS | {"image": {"colour": True}}, "image.colour"),
        (LABELS | {"image": 112}, "image"),
    ],
)
def test_refuses_what_a_task_of_images_cannot_have(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    assert re.search(re.escape(message), describe(caught.value))


@given(st.builds(ImageInput, size=st.integers(8, 1024), pooling=st.sampled_from(["cls", "mean", "cls_mean"])))
def test_any_input_survives_json(image: ImageInput) -> None:
    assert ImageInput.model_validate_json(image.model_dump_json()) == image
    assert num_features(image.pooling, 10) == (20 if image.pooling == "cls_mean" else 10)
