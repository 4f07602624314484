"""Folders and manifests of images: what loads, how splits come about, and how others are refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mtlora.suite import SPLITS, FolderSuite, SuiteError, load_suite
from mtlora.suite.vision.folder import _Line


def _image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), [shade % 256, shade // 256, 7], np.uint8)).save(path)


def test_tasks_with_train_and_test(tmp_path: Path) -> None:
    for i in range(120):
        _image(tmp_path / "Leaf Kinds" / "train" / f"kind{i % 2}" / f"{i}.png", i)
    for i in range(10):
        _image(tmp_path / "Leaf Kinds" / "test" / f"kind{i % 2}" / f"{i}.PNG", 1000 + i)
    (tmp_path / "Leaf Kinds" / "task.json").write_text('{"description": "Leaves.", "image": {"augment": ["flip"]}}')
    (tmp_path / "README.md").write_text("no task")
    suite = load_suite(str(tmp_path))
    (task,) = suite.tasks
    assert (task.id, task.labels, task.description) == ("leaf-kinds", ("kind0", "kind1"), "Leaves.")
    assert task.image is not None
    assert task.image.augment == ("flip",)
    parts = {split: suite.examples(task.id, split, None) for split in SPLITS}
    assert len(parts["test"]) == 10
    assert len(parts["train"]) + len(parts["validation"]) == 120
    assert 2 < len(parts["validation"]) < 30
    assert suite.examples(task.id, "train", 5, seed=3) == suite.examples(task.id, "train", None, seed=3)[:5]
    example = parts["test"][0]
    assert example.encoded_image() == Path(str(example.source)).read_bytes()
    with pytest.raises(SuiteError, match="11 were asked for"):
        suite.examples(task.id, "test", 11)


def test_classes_without_splits_are_divided_by_content(tmp_path: Path) -> None:
    for i in range(200):
        _image(tmp_path / "marks" / f"c{i % 4}" / f"{i}.png", i)
    suite = load_suite(str(tmp_path))
    before = {split: {e.input for e in suite.examples("marks", split, None)} for split in SPLITS}
    assert sum(map(len, before.values())) == 200
    assert all(before.values())
    # The file's name is not the content.
    for path in sorted(tmp_path.rglob("*.png")):
        path.rename(path.with_name(f"other-{path.name}"))
    assert {s: {e.input for e in load_suite(str(tmp_path)).examples("marks", s, None)} for s in SPLITS} == before


def test_a_folder_of_splits_is_one_task_and_its_validation_is_its_own(tmp_path: Path) -> None:
    for i, split in enumerate(SPLITS):
        for j in range(6):
            _image(tmp_path / "hats" / split / f"c{j % 2}" / f"{j}.png", 100 * i + j)
    suite = load_suite(str(tmp_path / "hats"))
    assert [task.id for task in suite.tasks] == ["hats"]
    assert [len(suite.examples("hats", split, None)) for split in SPLITS] == [6, 6, 6]


def test_an_image_of_the_test_split_is_in_no_other(tmp_path: Path) -> None:
    for i in range(20):
        _image(tmp_path / "t" / "train" / f"c{i % 2}" / f"{i}.png", i)
    for i in range(5):
        _image(tmp_path / "t" / "test" / f"c{i % 2}" / f"{i}.png", i)
    suite = load_suite(str(tmp_path))
    with pytest.warns(UserWarning, match=r"the same image as .*test.*; only that one is used"):
        tested = {e.input for e in suite.examples("t", "test", None)}
    trained = {e.input for split in ("train", "validation") for e in suite.examples("t", split, None)}  # type: ignore[arg-type]
    assert len(tested) == 5
    assert len(trained) == 15
    assert not tested & trained


def test_reads_a_manifest(tmp_path: Path) -> None:
    lines = []
    for i in range(30):
        _image(tmp_path / "files" / f"{i}.png", i)
        split = {"split": "test"} if i < 6 else {}
        lines.append({"task": "odd", "image": f"files/{i}.png", "label": "yes" if i % 2 else "no", **split})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "tasks.json").write_text('{"odd": {"image": {"size": 56, "pooling": "mean"}}}')
    suite = load_suite(str(tmp_path))
    (task,) = suite.tasks
    assert task.image is not None
    assert (task.labels, task.image.size, task.image.pooling) == (("no", "yes"), 56, "mean")
    assert len(suite.examples("odd", "test", None)) >= 6


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1: "),
        ('{"task": "a b", "image": "x.png", "label": "y"}', "line 1: task: "),
        ('{"task": "a", "image": "x.png"}', "line 1: label: "),
        ('{"task": "a", "image": "x.png", "label": "y", "split": "dev"}', "line 1: split: "),
        ('{"task": "a", "image": "x.png", "label": "y"}', "line 1: image: no file "),
    ],
)
def test_wrong_manifests_name_the_line(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(SuiteError, match=re.escape(reason)):
        load_suite(str(tmp_path))


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    _image(tmp_path / "one" / "lonely" / "1.png", 1)
    with pytest.raises(SuiteError, match=r"task one: .*found 1 labels"):
        load_suite(str(tmp_path))
    _image(tmp_path / "one" / "second" / "2.png", 2)
    _image(tmp_path / "ONE" / "c" / "3.png", 3)
    with pytest.raises(SuiteError, match="a second folder of task one"):
        load_suite(str(tmp_path))
    (tmp_path / "ONE" / "c" / "3.png").unlink()
    (tmp_path / "one" / "task.json").write_text('{"image": {"augment": ["melt"]}}')
    with pytest.raises(SuiteError, match=r"task\.json: .*augment"):
        load_suite(str(tmp_path))


def test_a_folder_of_texts_stays_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"examples": [{"input": "x", "target": "y"}]}')
    _image(tmp_path / "pictures" / "of" / "x.png", 1)
    assert isinstance(load_suite(str(tmp_path)), FolderSuite)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=200) | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=5).map(json.dumps))
def test_any_manifest_line_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, line: str) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "manifest.jsonl").write_text(line, encoding="utf-8", errors="replace")
    with pytest.raises(SuiteError):
        load_suite(str(folder))
    assert set(_Line.model_fields) == {"task", "image", "label", "split"}
