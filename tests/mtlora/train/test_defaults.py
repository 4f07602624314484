"""Settings that a user leaves open: texts have TrainingConfig's own, images have theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mtlora.cli.settings import read_settings
from mtlora.suite import load_suite
from mtlora.suite.base import up_to
from mtlora.train.config import TrainingConfig
from mtlora.train.defaults import IMAGES, NEW_FOR_TEXTS, most_shown, training_config
from tests.mtlora.vision.models import write_model

CONFIGS = Path(__file__).parents[3] / "configs"


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


def test_many_texts_are_seen_once_at_their_own_rate() -> None:
    expected = TrainingConfig(seed=3, **NEW_FOR_TEXTS)
    assert training_config({"seed": 3}, load_suite("builtin"), Path("nowhere")) == expected


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 800),
        ({"max_steps": 20}, 20),
        ({"examples_per_task": 30}, 800),
        ({"tasks": ["a", "b"]}, 400),
        ({"tasks": ["a"]}, 200),
    ],
)
def test_few_texts_are_seen_until_there_are_enough_steps(settings: dict[str, Any], least: int, tmp_path: Path) -> None:
    for name in "abcde":
        examples = [{"input": f"{name} {i}", "target": "Yes"} for i in range(40 + ord(name) % 7)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"examples": examples}))
    suite = load_suite(str(tmp_path))
    config = training_config({"suite": str(tmp_path), **settings}, suite, Path("nowhere"))
    tasks = settings.get("tasks", "abcde")
    batches = -(-sum(len(up_to(suite, task, "train", config.examples_per_task)) for task in tasks) // 16)
    assert (config.epochs - 1) * batches < least <= config.epochs * batches
    given = training_config({"suite": str(tmp_path), "epochs": 2, **settings}, suite, Path("nowhere"))
    assert given.epochs == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"init_from": "adapters/mtlora/1"},
        {"baseline": {"method": "lora"}},
        {"suite": "documents", "adapter": {"activation": "task"}},
        {"suite": "builtin-pictures"},
    ],
)
def test_runs_with_recipes_of_their_own_keep_the_lower_rate(settings: dict[str, Any]) -> None:
    suite = load_suite(TrainingConfig.model_validate(settings).suite)
    config = training_config({"examples_per_task": 10, **settings}, suite, Path("nowhere"))
    assert config.learning_rate == TrainingConfig().learning_rate
    assert training_config({"learning_rate": 1e-4}, load_suite("builtin"), Path("nowhere")).learning_rate == 1e-4


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


def test_the_accurate_recipe_for_images_keeps_the_other_defaults(photos: Path, vision: Path) -> None:
    settings = read_settings(CONFIGS / "images-accurate.json", [f"suite={photos}"])
    config = training_config(settings, load_suite(str(photos)), vision)
    assert (config.adapter.blocks, config.frozen_layers, config.relative_expert_rate) == ("both", 0, 2)
    assert config.batch_size == IMAGES["batch_size"]
    assert config.examples_per_task is None


def test_generated_images_are_limited_by_default(vision: Path) -> None:
    config = training_config(
        {"suite": "builtin-vision", "tasks": ["shapes"], "epochs": 1}, load_suite("builtin-vision"), vision
    )
    assert config.examples_per_task == TrainingConfig().examples_per_task


def test_a_large_task_shows_four_times_the_median() -> None:
    assert most_shown(TrainingConfig(examples_per_task=None), [10, 20, 5000]) == 80
    assert most_shown(TrainingConfig(examples_per_task=5000), [10, 20, 5000]) > 5000
