"""Settings that a user leaves open: texts have TrainingConfig's own, images have theirs."""

from pathlib import Path

import pytest
from PIL import Image

from mtlora.suite import load_suite
from mtlora.train.config import TrainingConfig
from mtlora.train.defaults import IMAGES, most_shown, training_config
from tests.mtlora.vision.models import write_model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """One task of 80 images for training, of which some are for validation."""
    for i in range(80):
        path = tmp_path / "photos" / "leaf" / "train" / ("oak", "elm")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 3 * i, 90)).save(path)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of two layers."""
    return write_model(tmp_path_factory.mktemp("backbone"))


def test_texts_keep_the_configurations_defaults() -> None:
    assert training_config({"seed": 3}, load_suite("builtin"), Path("nowhere")) == TrainingConfig(seed=3)


def test_a_folder_of_images_gets_defaults_of_its_own(photos: Path, vision: Path) -> None:
    suite = load_suite(str(photos))
    config = training_config({"suite": str(photos), "learning_rate": 1e-3}, suite, vision)
    assert config.learning_rate == 1e-3
    assert config.head_learning_rate_scale == IMAGES["head_learning_rate_scale"]
    assert config.examples_per_task is None
    assert config.frozen_layers == 1
    heads = {"suite": str(photos), "baseline": {"method": "heads"}}
    assert training_config(heads, suite, vision).frozen_layers == 0
    # Few images are seen until there are enough steps.
    images = len(suite.examples("leaf", "train", None))
    batches = -(-images // config.batch_size)
    assert (config.epochs - 1) * batches < 800 <= config.epochs * batches
    assert training_config({"suite": str(photos), "epochs": 3}, suite, vision).epochs == 3
    assert training_config({"suite": str(photos), "max_steps": 2}, suite, vision).epochs == 1


def test_generated_images_are_limited_by_default(vision: Path) -> None:
    config = training_config(
        {"suite": "builtin-vision", "tasks": ["shapes"], "epochs": 1}, load_suite("builtin-vision"), vision
    )
    assert config.examples_per_task == TrainingConfig().examples_per_task


def test_a_large_task_shows_four_times_the_median() -> None:
    assert most_shown(TrainingConfig(examples_per_task=None), [10, 20, 5000]) == 80
    assert most_shown(TrainingConfig(examples_per_task=5000), [10, 20, 5000]) > 5000
