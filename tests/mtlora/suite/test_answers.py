"""Every target of the suites' tasks is an answer of the task's type."""

from pathlib import Path

import pytest

from mtlora.answer import Label, Number, Regex, Text
from mtlora.checkpoint.read import check_answers, read_manifest
from mtlora.suite import load_suite
from mtlora.suite.answers import BBH, joined
from mtlora.task import TaskSpec

SHIPPED = Path(__file__).parents[3] / "adapters" / "builtin" / "4"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["builtin", "bbh-generated"])
def test_targets_satisfy_their_types(name: str) -> None:
    suite, shipped = load_suite(name), read_manifest(SHIPPED)
    for task in suite.tasks:
        own, served = task.answer_type, shipped.task(task.id).answer_type
        assert own is not None
        assert served is not None
        for split, count in (("train", 30), ("validation", 10), ("test", 10)):
            for example in suite.examples(task.id, split, count):  # type: ignore[arg-type]
                assert own.check(example.target), (task.id, example.target)
                assert served.check(example.target), (task.id, example.target)


def test_the_shipped_adapter_types_every_task() -> None:
    manifest = read_manifest(SHIPPED)
    check_answers(SHIPPED, manifest)
    assert all(task.answer_type for task in manifest.tasks)
    assert set(BBH) <= {task.id for task in manifest.tasks}


def test_joined_types_allow_what_both_do() -> None:
    labels = joined([Label(labels=("a", "b")), Label(labels=("b", "c"))])
    assert labels == Label(labels=("a", "b", "c"))
    assert joined([Label(labels=("1", "2")), Number()]) == Number()
    mixed = joined([Regex(pattern="x|y+"), Label(labels=("(A)", "(B)"))])
    assert mixed is not None
    assert all(map(mixed.check, ("x", "yyy", "(A)")))
    assert not mixed.check("xA")
    assert joined([Text(), Number()]) is None
    assert joined([None, Number()]) is None


def test_allowed_answers_mean_labels() -> None:
    task = TaskSpec.model_validate({"id": "t", "description": "d", "allowed_answers": ["a", "b"]})
    assert task.answer_type == Label(labels=("a", "b"))
    assert task.labels == ("a", "b")
    again = TaskSpec.model_validate_json(task.model_dump_json())
    assert again == task
    assert "answer" not in again.model_dump()
    with pytest.raises(ValueError, match="both set"):
        TaskSpec.model_validate({**task.model_dump(), "answer": {"type": "text"}})
