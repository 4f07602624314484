"""The suite of real images: its tasks, and drawings that are for the test alone."""

import zipfile
from pathlib import Path

import pytest

from benchmarks.vision.photo_suite import _ALPHABETS, _GROUPS, write_suite


@pytest.mark.parametrize("tasks", [15, 25])
def test_the_suite_has_as_many_tasks_as_asked_each_with_train_and_test(tmp_path: Path, tasks: int) -> None:
    for label in _GROUPS[0].split():
        for split in ("train", "test"):
            photograph = tmp_path / "clothing" / split / label / f"{split}.jpg"
            photograph.parent.mkdir(parents=True)
            photograph.write_bytes(b"")
    (tmp_path / "omniglot").mkdir()
    with zipfile.ZipFile(tmp_path / "omniglot" / "small.zip", "w") as archive:
        for alphabet in _ALPHABETS:
            for drawing in range(1, 21):
                archive.writestr(f"images/{alphabet}/character01/0001_{drawing:02}.png", str(drawing))
    write_suite(tmp_path / "clothing", tmp_path / "omniglot", tasks, tmp_path / "out")
    found = list((tmp_path / "out").iterdir())
    assert len(found) == tasks
    assert all((task / split).is_dir() for task in found for split in ("train", "test"))
    drawings = tmp_path / "out" / "greek"
    assert sorted(path.name for path in drawings.glob("test/*/*")) == [f"{i}.png" for i in range(16, 21)]
    assert len(list(drawings.glob("train/*/*"))) == 15
