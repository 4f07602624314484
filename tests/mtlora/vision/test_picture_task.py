"""A text task that takes an image: its template, and the prompt around the image."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mtlora.task import PromptParts, TaskSpec, TemplateError

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)


def spec(**fields: Any) -> TaskSpec:
    return TaskSpec.model_validate({"id": "t", "description": "d", "picture": {}} | fields)


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_texts_stand_around_the_image_whatever_they_are(begin: str, middle: str, end: str, value: str) -> None:
    escaped = [text.replace("{", "{{").replace("}", "}}") for text in (begin, middle, end)]
    task = spec(template="{}{{input}}{}{{image}}{}".format(*escaped))
    assert task.fields == ("input",)
    assert task.around_image(value) == (begin + value + middle, end)
    assert task.around_image({"input": value}) == task.around_image(value)
    assert task.parts(value) == PromptParts("", begin + value + middle + end)


def test_a_value_that_names_the_image_is_text() -> None:
    task = spec(template="{{image}} {image} {input}")
    assert task.around_image("{image}") == ("{image} ", " {image}")


def test_a_task_may_ask_nothing_but_its_image() -> None:
    task = spec(template="{image}\nAnswer:")
    assert task.fields == ()
    assert task.around_image({}) == task.around_image("passed over") == ("", "\nAnswer:")
    with pytest.raises(TemplateError, match="unknown input"):
        task.around_image({"input": "x"})


def test_image_is_an_ordinary_field_of_other_tasks() -> None:
    task = TaskSpec(id="t", description="d", template="{image} {image}")
    assert task.fields == ("image",)
    assert task.parts("x").task == "x x"
    assert "picture" not in task.model_dump()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "names {image} 0 times"),
        ({"template": "{{image}} {input}"}, "names {image} 0 times"),
        ({"template": "{image}{input}{image}"}, "names {image} 2 times"),
        ({"template": "{image}", "document_template": "{document}"}, "no document_template"),
        ({"template": "{image}", "picture": {"size": 4}}, "picture.size"),
        ({"template": "{image}", "picture": {"pooling": "cls"}}, "picture.pooling"),
        ({"template": "{image}", "picture": {"augment": []}}, "picture.augment"),
        ({"image": {}, "allowed_answers": ["a", "b"]}, "a task of images has no text"),
    ],
)
def test_a_wrong_task_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        spec(**fields)
    assert message in str(refused.value) or message.replace(".", "\n") in str(refused.value)
