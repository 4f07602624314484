"""The generated suite of images: deterministic, balanced, fresh; its pictures show what their labels say."""

import gzip
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtlora.suite import SuiteError, load_suite
from mtlora.suite.base import SPLITS
from mtlora.suite.vision import packaged
from mtlora.suite.vision.maps import LabelMapSuite

SUITE = load_suite("builtin-vision")


def _pixels(image: object) -> np.ndarray:
    assert isinstance(image, bytes)
    return np.asarray(Image.open(io.BytesIO(image)))


def test_at_least_25_tasks_of_2_to_20_labels() -> None:
    assert len({task.id for task in SUITE.tasks}) == len(SUITE.tasks) >= 25
    for task in SUITE.tasks:
        assert task.image is not None
        assert task.image.augment == ()
        assert 2 <= len(task.labels or ()) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("task", SUITE.tasks, ids=lambda task: task.id)
def test_every_label_is_drawn_and_the_same_seed_draws_the_same(task) -> None:  # type: ignore[no-untyped-def]
    labels = task.labels or ()
    drawn = SUITE.examples(task.id, "train", len(labels))
    assert Counter(example.target for example in drawn) == Counter(labels)
    assert len({example.input for example in drawn}) == len(labels)
    assert {_pixels(example.image).shape for example in drawn} == {(112, 112, 3)}
    # A prefix, and other pictures in other splits and of other seeds.
    again = SUITE.examples(task.id, "train", 2)
    assert [(e.input, e.target, e.image) for e in again] == [(e.input, e.target, e.image) for e in drawn[:2]]
    others = [SUITE.examples(task.id, split, 1, seed)[0].input for split in SPLITS for seed in (0, 1)]
    assert len(set(others)) == 6


def test_the_only_circle_has_the_labels_colour() -> None:
    strongest = {"red": 0, "green": 1, "blue": 2}
    for example in SUITE.examples("circle_colour", "test", 32):
        if example.target in strongest:
            pixels = _pixels(example.image).astype(int)
            channel = strongest[example.target]
            others = [c for c in range(3) if c != channel]
            assert (pixels[..., channel] - pixels[..., others].max(-1) > 60).sum() > 150


def test_a_lit_lamp_is_where_the_label_says() -> None:
    for example in SUITE.examples("traffic_lights", "test", 20):
        if example.target in ("stop", "go"):
            pixels = _pixels(example.image).astype(int)
            bright = (pixels.max(-1) > 190) & (pixels.max(-1) - pixels.min(-1) > 120)
            green = bright & (pixels[..., 1] > pixels[..., 0] + 60)
            red = bright & (pixels[..., 0] > pixels[..., 1] + 60)
            assert (green.sum() > red.sum()) == (example.target == "go")


def test_fonts_of_letters_are_unseen() -> None:
    from mtlora.suite.vision import signs

    assert not set(signs._SEEN) & set(signs._UNSEEN)


def test_label_maps_share_pictures_and_contradict_each_other() -> None:
    suite = load_suite("vision-maps-4")
    drawn = [suite.examples(task.id, "train", 40) for task in suite.tasks]
    assert len({tuple(e.input for e in each) for each in drawn}) == 1
    words = [[e.target for e in each] for each in drawn]
    for i in range(4):
        for j in range(i):
            assert sum(a != b for a, b in zip(words[i], words[j], strict=True)) > 10
    # Other numbers of maps are of the same pictures, too.
    assert [e.input for e in load_suite("vision-maps-16").examples("map-015", "train", 40)] == [
        e.input for e in drawn[0]
    ]
    for name in ("vision-maps-1", "vision-maps-", "vision-maps-x", "vision-maps-1000"):
        with pytest.raises(SuiteError, match="expected vision-maps-N"):
            load_suite(name)


def test_no_answer_that_does_not_know_the_map_is_above_the_ceiling() -> None:
    for number, ceiling in ((4, 0.350), (16, 0.256), (64, 0.166)):
        suite = load_suite(f"vision-maps-{number}")
        assert isinstance(suite, LabelMapSuite)
        assert suite.ceiling == pytest.approx(ceiling, abs=5e-4)
        # With balanced pictures, the best answer to each is right for an equal number of maps.
        drawn = [suite.examples(task.id, "test", 20) for task in suite.tasks]
        words_of_pictures = zip(*([e.target for e in each] for each in drawn), strict=True)
        best = [Counter(words).most_common(1)[0][1] / number for words in words_of_pictures]
        assert sum(best) / len(best) == pytest.approx(suite.ceiling)


def test_packaged_digits_are_read_where_their_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(0, 17, 64).tolist(), i % 10] for i in range(100)]
    file = tmp_path / "digits.csv.gz"
    file.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    monkeypatch.setattr(packaged, "digits_file", lambda: file)
    suite = load_suite("packaged-vision")
    parts = [suite.examples("handwritten_digits", split, None) for split in SPLITS]
    assert sum(map(len, parts)) == 100
    assert all(parts)
    pixels = {_pixels(e.image).tobytes(): e.target for part in parts for e in part}
    first = (255 * np.array(rows[0][:-1]) // 16).astype(np.uint8)
    assert pixels[first.tobytes()] == "0"
    monkeypatch.setattr(packaged, "digits_file", lambda: None)
    with pytest.raises(SuiteError, match="no package with images is installed"):
        load_suite("packaged-vision")


def test_refuses_what_it_cannot_draw() -> None:
    for arguments, reason in (
        (("nowhere", "train", 1), "has no task"),
        (("shapes", "dev", 1), "no split"),
        (("shapes", "train", None), "need one >= 0"),
    ):
        with pytest.raises(SuiteError, match=reason):
            SUITE.examples(*arguments)  # type: ignore[arg-type]
