"""Folders and manifests of images: what loads, how splits come about, and how others are refused."""

import json
import os
import re
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mtlora.suite import SPLITS, Example, FolderSuite, Suite, SuiteError, load_suite
from mtlora.suite.vision.pixels import check_readable, read_pixels
from mtlora.vision.images import ImageError, decode


def _image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), [shade % 256, shade // 256, 7], np.uint8)).save(path)


def test_validation_comes_from_train_where_a_task_has_train_and_test(tmp_path: Path) -> None:
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
        ('{"task": "a", "image": "' + "x" * 5000 + '", "label": "y"}', "line 1: image: no file "),
        ("\n{\xe9", "line 2: found bytes that are not UTF-8"),
        ("\n\n", "found no line"),
    ],
)
def test_wrong_manifests_name_the_line(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(line.encode("latin-1") + b"\n")
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


def _warned(folder: Path) -> tuple[Suite, str]:
    """A suite, and all that loading and reading it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        suite = load_suite(str(folder))
        for task in suite.tasks:
            suite.examples(task.id, "train", None)
    return suite, "\n".join(str(each.message) for each in caught)


def _classes(folder: Path, count: int = 6, classes: Iterable[str] = "ab") -> None:
    """`count` images of each class, no two alike."""
    for name in classes:
        for i in range(count):
            _image(folder / name / f"{i}.png", zlib.crc32(f"{folder}{name}{i}".encode()) % 65536)


def test_finds_splits_by_other_names(tmp_path: Path) -> None:
    for task, names in (("one", ("Train", "val", "TEST")), ("two", ("training", "Valid", "testing"))):
        for name in names:
            _classes(tmp_path / task / name)
    suite, warned = _warned(tmp_path)
    assert [len(suite.examples(t, split, None)) for t in ("one", "two") for split in SPLITS] == [12] * 6
    assert not warned
    (tmp_path / "one" / "dev").mkdir()
    with pytest.raises(SuiteError, match="one: found dev and val for the split validation; allowed: one of them"):
        load_suite(str(tmp_path))


def test_classes_alone_are_one_task_even_where_one_is_called_train(tmp_path: Path) -> None:
    _classes(tmp_path / "vehicles", classes=("bus", "car", "train"))
    suite, _ = _warned(tmp_path / "vehicles")
    assert [(task.id, task.labels) for task in suite.tasks] == [("vehicles", ("bus", "car", "train"))]


def test_json_beside_images_does_not_make_a_suite_of_texts(tmp_path: Path) -> None:
    _classes(tmp_path / "leaf")
    (tmp_path / "classes.json").write_text('["a", "b"]')
    (tmp_path / "task.json").write_bytes(b'\xef\xbb\xbf{"description": "Leaves."}')
    assert [task.description for task in load_suite(str(tmp_path)).tasks] == ["Leaves."]
    assert [task.description for task in load_suite(str(tmp_path / "leaf")).tasks] == ["Images of leaf: leaf."]
    (tmp_path / "tasks.json").write_text('{"leaf": {"description": "Own."}}')
    assert [task.description for task in load_suite(str(tmp_path)).tasks] == ["Own."]
    (tmp_path / "tasks.json").write_text('{"laef": {}}')
    with pytest.raises(SuiteError, match=r"tasks\.json: found task laef; allowed: leaf"):
        load_suite(str(tmp_path))
    (tmp_path / "tasks.json").write_text("[" * 100_000)
    with pytest.raises(SuiteError, match=r"tasks\.json: "):
        load_suite(str(tmp_path))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (["t/a/1", "t/b/2", "u/1"], r"u: found \S*u/1.png, and no image in a class folder; the layouts are task/"),
        (["t/a/1", "t/b/2", "u/a/b/c/1"], r"u/a: found an image below a class folder, \S*u/a/b/c/1.png; allowed: "),
        (["train/a/1", "train/b/2", "test/1"], r"test: found \S*test/1.png, and no image in a class folder"),
        (["train/1", "test/2"], r"test: found \S*test/2.png, and no image in a class folder"),
        (["t/train/a/1", "t/train/b/2", "t/more/a/3"], r"t/more: found a folder with images .* beside splits; allowed"),
    ],
)
def test_images_in_no_layout_are_refused(tmp_path: Path, images: list[str], reason: str) -> None:
    for i, name in enumerate(images):
        _image(tmp_path / f"{name}.png", i)
    with pytest.raises(SuiteError, match=reason):
        load_suite(str(tmp_path))


def test_what_is_not_used_is_told(tmp_path: Path) -> None:
    _classes(tmp_path / "leaf" / "train")
    _classes(tmp_path / "leaf" / "test", classes="abc")
    _image(tmp_path / "leaf" / "preview.png", 1)
    for name in ("leaf/train/a/1.gif", "leaf/train/d/2.heic", "notes/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    # What systems and editors leave behind is no class and no image.
    for name in ("leaf/train/a/._1.jpg", "leaf/train/.ipynb_checkpoints/1.png", "__MACOSX/leaf/a/1.png"):
        _image(tmp_path / name.replace("._1.jpg", "x.png"), 9)
        (tmp_path / name.replace("._1.jpg", "x.png")).rename(tmp_path / name)
    suite, warned = _warned(tmp_path)
    (task,) = suite.tasks
    assert task.labels == ("a", "b", "c")
    assert "1 images outside any class folder, such as " in warned
    assert "2 files such as " in warned
    assert "(1 of .gif, 1 of .heic); read are .png" in warned
    assert "2 folders without an image: " in warned
    assert "task leaf: no training image of class c" in warned
    assert "MACOSX" not in warned
    assert "ipynb" not in warned


def test_nothing_readable_names_what_is_there_and_every_layout(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "1.gif").write_bytes(b"GIF89a")
    found = r"found 1 files such as \S*1.gif \(1 of .gif\); allowed: a folder of JSON files .* class/\*.png; read are"
    with pytest.raises(SuiteError, match=found):
        load_suite(str(tmp_path))
    with pytest.raises(SuiteError, match="suite: found 'aaa"):
        load_suite("a" * 5000)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _classes(tmp_path / "leaf")
    whole = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SuiteError, match="leaf/b: cannot be listed: Permission denied"):
        load_suite(str(tmp_path))


def test_reads_a_manifest_of_any_editor(tmp_path: Path) -> None:
    lines = []
    for i in range(8):
        _image(tmp_path / f"{i}.png", i)
        lines.append(
            json.dumps({"task": "t", "image": f"{i}.png", "label": "a\u2028b" if i % 2 else "c"}, ensure_ascii=False)
        )
    (tmp_path / "manifest.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert load_suite(str(tmp_path)).tasks[0].labels == ("a\u2028b", "c")


@pytest.mark.parametrize(
    ("kind", "mode", "suffix"),
    [
        ("TIFF", "RGB", "tif"),
        ("TIFF", "I;16", "tiff"),
        ("BMP", "RGB", "BMP"),
        ("PPM", "RGB", "ppm"),
        ("PPM", "L", "pgm"),
    ],
)
def test_reads_the_formats_of_published_data_sets(tmp_path: Path, kind: str, mode: str, suffix: str) -> None:
    for i, name in enumerate("ab"):
        (tmp_path / "t" / name).mkdir(parents=True)
        Image.new(mode, (5, 4), 200 + i if mode in ("L", "I;16") else (200, 100, i)).save(
            tmp_path / "t" / name / f"1.{suffix}", kind
        )
    suite = load_suite(str(tmp_path))
    found = [e for split in SPLITS for e in suite.examples("t", split, None)]
    assert len(found) == 2
    assert {read_pixels(example, 8).shape for example in found} == {(4, 5, 3)}
    # A server's clients send no such files.
    with pytest.raises(ImageError, match=r"allowed: PNG, JPEG, WebP$"):
        decode(found[0].encoded_image())


def test_every_unreadable_file_is_listed(tmp_path: Path) -> None:
    _classes(tmp_path / "t")
    (tmp_path / "t" / "a" / "0.png").write_bytes(b"GIF89a")
    (tmp_path / "t" / "b" / "1.png").write_bytes((tmp_path / "t" / "b" / "1.png").read_bytes()[:-30])
    Image.new("F", (3, 3)).save(tmp_path / "t" / "b" / "2.png", "TIFF")
    Image.new("L", (3, 3)).save(
        tmp_path / "t" / "b" / "3.png", "TIFF", save_all=True, append_images=[Image.new("L", (3, 3))]
    )
    suite = load_suite(str(tmp_path))
    with pytest.raises(SuiteError) as caught:
        check_readable((e, 8) for split in SPLITS for e in suite.examples("t", split, None))
    told = str(caught.value)
    assert told.startswith("4 of 12 images cannot be read; repair or remove them, or set unreadable_images to skip: ")
    for reason in (
        "a/0.png: found a GIF; allowed: PNG, JPEG, WebP, TIFF, PPM, BMP",
        "b/1.png: found a PNG that cannot be decoded",
        "b/2.png: found a TIFF of values without a known range; allowed: 8 or 16 bits a channel",
        "b/3.png: found a TIFF of 2 pages; allowed: 1",
    ):
        assert reason in told


def test_of_many_unreadable_files_twenty_are_listed(tmp_path: Path) -> None:
    _classes(tmp_path / "t", count=15)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:-30] + file.name.encode())
    suite = load_suite(str(tmp_path))
    with pytest.raises(SuiteError, match=r"^30 of 30 images cannot be read; .*; and 10 more$") as caught:
        check_readable((e, 8) for split in SPLITS for e in suite.examples("t", split, None))
    assert str(caught.value).count("cannot be decoded") == 20


def test_a_photograph_beyond_a_clients_limits_is_read(tmp_path: Path) -> None:
    Image.new("1", (6000, 5000)).save(tmp_path / "large.png")
    example = Example("t", "x", "y", source="large.png", image=tmp_path / "large.png")
    assert read_pixels(example, 8).shape == (5000, 6000, 3)
    with pytest.raises(ImageError, match="found 6000 x 5000 pixels; allowed: 1 to 25000000 in all"):
        decode(example.encoded_image())


@settings(max_examples=60)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: json.dumps(text).encode()))
def test_any_manifest_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "manifest.jsonl").write_bytes(content)
    with pytest.raises(SuiteError):
        load_suite(str(folder))
