"""Settings that a user leaves open: texts have TrainingConfig's own, images have theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mtlora.checkpoint.read import read_manifest
from mtlora.cli.settings import read_settings
from mtlora.config import MtLoRAConfig
from mtlora.suite import load_suite
from mtlora.suite.base import up_to
from mtlora.train.config import TrainingConfig
from mtlora.train.defaults import (
    ADAPTERS_OF_IMAGES,
    BASELINES_OF_IMAGES,
    IMAGES,
    NEW_FOR_TEXTS,
    most_shown,
    training_config,
)
from tests.server.adapters import entry, write_adapter

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = Path(__file__).parents[3] / "adapters" / "vision"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """One task of 80 images for training, of which some are for validation."""
    for i in range(80):
        path = tmp_path / "photos" / "leaf" / "train" / ("oak", "elm")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 3 * i, 90)).save(path)
    return tmp_path / "photos"


def test_many_texts_are_seen_once_at_their_own_rate() -> None:
    expected = TrainingConfig(seed=3, **NEW_FOR_TEXTS)
    assert training_config({"seed": 3}, load_suite("builtin")) == expected


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
    config = training_config({"suite": str(tmp_path), **settings}, suite)
    tasks = settings.get("tasks", "abcde")
    batches = -(-sum(len(up_to(suite, task, "train", config.examples_per_task)) for task in tasks) // 16)
    assert (config.epochs - 1) * batches < least <= config.epochs * batches
    given = training_config({"suite": str(tmp_path), "epochs": 2, **settings}, suite)
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
    config = training_config({"examples_per_task": 10, **settings}, suite)
    assert config.learning_rate == TrainingConfig().learning_rate
    assert training_config({"learning_rate": 1e-4}, load_suite("builtin")).learning_rate == 1e-4


def test_a_folder_of_images_gets_defaults_of_its_own(photos: Path) -> None:
    suite = load_suite(str(photos))
    config = training_config({"suite": str(photos), "head_learning_rate_scale": 0.5, "adapter": {"r": 4}}, suite)
    assert config.head_learning_rate_scale == 0.5
    assert {name: getattr(config, name) for name in IMAGES | ADAPTERS_OF_IMAGES} == IMAGES | ADAPTERS_OF_IMAGES
    assert (config.adapter.blocks, config.adapter.r) == ("both", 4)
    assert config.examples_per_task is None
    # Few images are seen until there are enough steps.
    images = len(suite.examples("leaf", "train", None))
    batches = -(-images // config.batch_size)
    assert (config.epochs - 1) * batches < 800 <= config.epochs * batches
    assert training_config({"suite": str(photos), "epochs": 3}, suite).epochs == 3
    assert training_config({"suite": str(photos), "max_steps": 2}, suite).epochs == 1


def test_baselines_on_images_have_rates_of_their_own(photos: Path) -> None:
    suite = load_suite(str(photos))
    config = training_config({"suite": str(photos), "baseline": {"method": "lora"}}, suite)
    assert {name: getattr(config, name) for name in BASELINES_OF_IMAGES} == BASELINES_OF_IMAGES
    assert config.relative_expert_rate is None


def test_images_after_another_run_take_its_adapters_settings(photos: Path, tmp_path: Path) -> None:
    suite = load_suite(str(photos))
    write_adapter(tmp_path / "before", [entry("open")])
    config = read_manifest(tmp_path / "before").config
    assert config != MtLoRAConfig(blocks="both")
    started = {"suite": str(photos), "init_from": str(tmp_path / "before")}
    assert training_config(started, suite).adapter == config
    # The trainer refuses one that differs.
    given = training_config({**started, "adapter": {"r": 5}}, suite).adapter
    assert given == config.model_copy(update={"r": 5}) != config


@pytest.mark.parametrize("file", [CONFIGS / "vision.json", SHIPPED / "training.json"])
def test_the_shipped_adapters_recipe_has_a_lower_rate(file: Path) -> None:
    """Its files name these settings, so other defaults do not change it."""
    config = training_config(read_settings(file, []), load_suite("builtin-vision"))
    assert (config.adapter.blocks, config.learning_rate, config.relative_expert_rate) == ("both", 5e-4, 2.0)
    assert config.learning_rate < ADAPTERS_OF_IMAGES["learning_rate"]


def test_the_light_recipe_for_images_keeps_the_other_defaults(photos: Path) -> None:
    settings = read_settings(CONFIGS / "images-light.json", [f"suite={photos}"])
    config = training_config(settings, load_suite(str(photos)))
    assert (config.adapter.blocks, config.frozen_layers, config.relative_expert_rate) == ("ffn", 6, None)
    assert config.batch_size == IMAGES["batch_size"]
    assert config.examples_per_task is None


def test_generated_images_are_limited_by_default() -> None:
    config = training_config(
        {"suite": "builtin-vision", "tasks": ["shapes"], "epochs": 1}, load_suite("builtin-vision")
    )
    assert config.examples_per_task == TrainingConfig().examples_per_task


def test_a_large_task_shows_four_times_the_median() -> None:
    assert most_shown(TrainingConfig(examples_per_task=None), [10, 20, 5000]) == 80
    assert most_shown(TrainingConfig(examples_per_task=5000), [10, 20, 5000]) > 5000
