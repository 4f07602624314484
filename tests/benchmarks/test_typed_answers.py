"""The benchmark of types: answers are checked by other code than the decoder's, and no question is asked twice."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from benchmarks.server.typed_answers import Question, by_working, is_of_type
from mtlora.answer import AnswerType
from mtlora.suite.base import Example


@pytest.mark.parametrize(
    ("answer", "inside", "outside"),
    [
        ({"type": "label", "labels": ["a", "b c"]}, ["a", " b c"], ["b", "A"]),
        ({"type": "number", "minimum": 0, "maximum": 9, "step": "0.5"}, ["0", "8.5"], ["9.5", "0.3", "x", ""]),
        ({"type": "date", "format": "%m/%d/%Y"}, ["02/29/2024"], ["02/29/2023", "2/29/2024", "x"]),
        ({"type": "regex", "pattern": "[a-z]+"}, ["ab"], ["aB", "a b"]),
        ({"type": "json", "schema": {"type": "array", "items": {"type": "integer"}}}, ["[1, 2]"], ['["a"]', "[1"]),
        ({"type": "json", "schema": {"type": "number"}}, ["1.5"], ["Infinity", "NaN"]),
        ({"type": "text", "max_length": 3}, ["abc"], ["abcd", "", "a\nb"]),
        ({"type": "grammar", "rules": 'root ::= "a"'}, ["a"], ["b"]),
    ],
)
def test_is_of_type_tells_answers_from_other_texts(
    answer: dict[str, Any], inside: list[str], outside: list[str]
) -> None:
    found: AnswerType = TypeAdapter(AnswerType).validate_python(answer)
    assert [text for text in inside + outside if is_of_type(found, text)] == inside


def test_every_task_of_labels_is_among_those_mixed() -> None:
    tasks = {"plain": False, "worked": True}
    questions = [
        Question(f"suite {task}", Example(task_id=task, input=f"{task} {i}", target="a"))
        for i in range(4)
        for task in (*tasks, "text")
    ]
    parts = by_working(questions, tasks)
    asked = [(name, each.example.input) for name, part in parts.items() for each in part]
    assert asked == [
        ("mixed", "plain 0"), ("mixed", "worked 0"), ("mixed", "plain 2"), ("mixed", "worked 2"),
        ("without working", "plain 1"), ("without working", "plain 3"),
        ("with working", "worked 1"), ("with working", "worked 3"),
    ]  # fmt: skip
