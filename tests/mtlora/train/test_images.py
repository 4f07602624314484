"""Training on images with a tiny encoder: heads start from a probe, adapters learn, runs resume to the same bits."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtlora.checkpoint.read import read_checkpoint
from mtlora.checkpoint.write import record_evaluation
from mtlora.cli import main
from mtlora.errors import MtLoRAError
from mtlora.evaluation.images import checkpoint_labeller, linear_heads, pixels
from mtlora.model.vision import load_adapted_encoder
from mtlora.suite import SPLITS, SuiteError, load_suite
from mtlora.train.augment import augmented
from mtlora.train.config import TrainingConfig
from mtlora.train.trainer import StepReport, Trainer
from mtlora.vision.heads import Heads, linear_probe
from mtlora.vision.images import ImageError
from tests.mtlora.train.runs import same_adapters
from tests.mtlora.vision.models import SIZE, write_model

SMALL: dict[str, Any] = {
    "adapter": {"r": 4, "num_experts": 3, "num_groups": 2}, "examples_per_task": 24, "validation_per_task": 0,
    "batch_size": 8, "save_every": 2, "dtype": "float32", "threads": 1, "learning_rate": 5e-3,
}  # fmt: skip


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vision-backbone"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of small images that differ in brightness, and in which half is bright."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(80):
        shade, noise = (60, 180)[i % 2], rng.integers(-30, 30, (20, 20, 3))
        half = np.full((20, 20, 3), 40)
        half[:, :10] += 120 * (i % 2)
        half[:, 10:] += 120 * (1 - i % 2)
        for task, drawn, label in (("bright", shade + noise, "low high"), ("half", half + noise, "right left")):
            path = root / task / ("test" if i < 16 else "train") / label.split()[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(drawn, 0, 255).astype(np.uint8)).save(path)
    for task in ("bright", "half"):
        (root / task / "task.json").write_text(json.dumps({"image": {"size": SIZE, "augment": ["colour", "crop"]}}))
    return root


def _config(folder: Path, **changed: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({**SMALL, "suite": str(folder), **changed})


def test_it_learns_and_leaves_heads_in_the_checkpoint(backbone: Path, folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(_config(folder, epochs=6), backbone, tmp_path / "run")
    manifest = trainer.fit()
    records = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-6:]) < sum(losses[:6])
    assert manifest.training["images_by_task"] == {"bright": 144, "half": 144}
    checkpoint = read_checkpoint(trainer.folder.checkpoint)
    assert checkpoint.manifest.format_version == 2
    examples = [e for task in trainer.tasks for e in trainer.suite.examples(task.id, "test", None)]
    # The checkpoint's folded heads give what the trainer's do, but for the paths' float16.
    adapted = load_adapted_encoder(backbone, checkpoint, torch.float32)
    found = checkpoint_labeller(adapted, checkpoint)(examples)
    assert all(sum(each.values()) == pytest.approx(1, abs=1e-5) for each in found)
    trainer.work.trained.eval()
    answers = trainer.work.answerer()(examples)
    assert sum(max(p, key=p.__getitem__) == a for p, a in zip(found, answers, strict=True)) >= len(examples) - 1
    assert sum(a == e.target for a, e in zip(answers, examples, strict=True)) >= 0.9 * len(examples)


def test_a_stopped_run_resumes_to_the_same_bits(backbone: Path, folder: Path, tmp_path: Path) -> None:
    config = _config(folder)
    whole = Trainer(config, backbone, tmp_path / "whole")
    whole.fit()
    stopped = Trainer(config, backbone, tmp_path / "stopped")
    for _ in range(3):
        stopped.train_step()
        if stopped.step % 2 == 0:
            stopped.save()
    stopped.folder._lock.close()  # type: ignore[union-attr]
    resumed = Trainer(config, backbone, tmp_path / "stopped", resume=True)
    assert resumed.step == 2
    resumed.fit()
    assert same_adapters(tmp_path / "whole", tmp_path / "stopped")


def test_frozen_layers_are_passed_once_and_keep_paths_of_zero(backbone: Path, folder: Path, tmp_path: Path) -> None:
    for task in ("bright", "half"):
        (tmp_path / "suite" / task).mkdir(parents=True)
        (tmp_path / "suite" / task / "train").symlink_to(folder / task / "train")
        (tmp_path / "suite" / task / "task.json").write_text(json.dumps({"image": {"size": SIZE, "augment": []}}))
    config = _config(tmp_path / "suite", frozen_layers=1, probe_examples=12, epochs=2)
    trainer = Trainer(config, backbone, tmp_path / "run")
    work = trainer.work
    # States are the same whether a batch passes the frozen layers now or was cached.
    first = work._enter(trainer.batches[0], 0, torch.device("cpu"))  # type: ignore[attr-defined]
    assert torch.equal(first, work._enter(trainer.batches[0], 9, torch.device("cpu")))  # type: ignore[attr-defined]
    state = trainer.adapted.adapters.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    trainer.fit()
    assert len(work._entered) == 48  # type: ignore[attr-defined]
    changed = {
        name for name, value in trainer.adapted.adapters.state_dict().items() if not torch.equal(value, before[name])
    }
    assert "layers.1.mlp.lora_B" in changed
    assert not any(name.startswith("layers.0.") for name in changed)
    # The evaluation runs all layers at once, with the same result.
    work.trained.eval()
    task = trainer.tasks[0]
    whole = work.adapted.features(
        torch.stack([pixels(work.adapted, task, work.train[0])]),
        torch.tensor([0]),
        "cls_mean",  # type: ignore[attr-defined]
    )
    parts = work._leave(work._enter([0], 0, torch.device("cpu")), torch.tensor([0]))  # type: ignore[attr-defined]
    assert torch.allclose(whole, parts, atol=1e-5)
    with pytest.raises(MtLoRAError, match="frozen_layers: found 2; allowed: fewer than the 2 layers"):
        Trainer(_config(folder, frozen_layers=2), backbone, tmp_path / "other")


def test_rates_follow_the_blocks_after_frozen_layers(backbone: Path, folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(_config(folder, frozen_layers=1, relative_expert_rate=2.0), backbone, tmp_path / "run")
    work = trainer.work
    outputs: list[torch.Tensor] = []
    work.adapted.encoder.model.layers[1].mlp.register_forward_hook(lambda _b, _a, out: outputs.append(out))
    first = torch.stack([work._augmented(i, 0) for i in trainer.batches[0]])  # type: ignore[attr-defined]
    with torch.no_grad(), work.adapters.context.backbone_alone():
        work.adapted.encoder.features(first, "cls_mean")
    expected = outputs[0].double().square().mean(-1).sqrt().log().mean().exp().item()
    own = [group["scale"] for group in trainer.optimizer.param_groups if group["scale"] != 1.0]
    assert own == [pytest.approx(2.0 * expected, rel=1e-4)]


def test_a_warm_start_takes_paths_and_heads(backbone: Path, folder: Path, tmp_path: Path) -> None:
    first = Trainer(_config(folder), backbone, tmp_path / "first")
    first.fit()
    started = Trainer(
        _config(folder, tasks=["half"], init_from=str(first.folder.checkpoint), seed=1), backbone, tmp_path / "second"
    )
    stored = read_checkpoint(first.folder.checkpoint)
    weight, bias = started.work.heads.folded(0)  # type: ignore[attr-defined]
    assert torch.allclose(weight, stored.head("half")[0], atol=1e-5)
    assert torch.allclose(bias, stored.head("half")[1], atol=1e-4)
    name = "layers.0.mlp.lora_B"
    assert torch.equal(started.adapted.adapters.state_dict()[name], stored.tensors[name].float())


@pytest.mark.parametrize(
    "method",
    [
        {"method": "heads"},
        {"method": "lora", "r": 2, "target_modules": ["q_proj", "fc2"]},
        {"method": "hydralora", "r": 2, "num_experts": 2},
    ],
    ids=lambda method: str(method["method"]),
)
@pytest.mark.parametrize("heads", ["own", "all classes", "label words"])
def test_baselines_learn_with_every_kind_of_heads(
    backbone: Path, folder: Path, tmp_path: Path, method: dict[str, Any], heads: str
) -> None:
    config = _config(folder, baseline=method, spectral="off", heads=heads, max_steps=2)
    trainer = Trainer(config, backbone, tmp_path / "run")
    trainer.fit()
    assert len(trainer.batches) == (0 if method["method"] == "heads" else 2)
    examples = trainer.suite.examples("half", "test", None)
    answers = trainer.work.answerer()(examples)
    assert set(answers) <= ({"left", "right"} if heads == "own" else {"left", "right", "low", "high", ""})
    assert sum(a == e.target for a, e in zip(answers, examples, strict=True)) >= 0.6 * len(examples)


def test_what_cannot_be_trained_is_refused(backbone: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the task is not told, so adapter\.task_bias must be false"):
        _config(folder, heads="all classes")
    for task, size in (("bright", SIZE), ("half", 2 * SIZE)):
        (tmp_path / task).mkdir()
        for split in ("train", "test"):
            (tmp_path / task / split).symlink_to(folder / task / split)
        (tmp_path / task / "task.json").write_text(json.dumps({"image": {"size": size}}))
    with pytest.raises(MtLoRAError, match=r"need one size and one pooling; found 56 px .*, 112 px"):
        Trainer(_config(tmp_path), backbone, tmp_path / "run")


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_unreadable_files_of_all_splits_stop_a_run_before_it_writes(
    backbone: Path, folder: Path, tmp_path: Path
) -> None:
    suite = _copy(folder, tmp_path / "suite")
    files = [next((suite / "half" / split).rglob("*.png")) for split in ("train", "test")]
    for file in files:
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SuiteError, match=r"2 of .* images cannot be read; ") as caught:
        Trainer(_config(suite, examples_per_task=None), backbone, tmp_path / "run")
    assert all(str(file) in str(caught.value) for file in files)
    assert not (tmp_path / "run").exists()


def test_unreadable_files_may_be_left_out(
    backbone: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = _copy(folder, tmp_path / "suite")
    bad = {next((suite / "half" / where).glob("*.png")) for where in ("train/left", "train/right", "test/left")}
    for file in bad:
        file.write_bytes(file.read_bytes()[:-40])
    config = _config(suite, examples_per_task=None, max_steps=1, unreadable_images="skip")
    told = "suite suite: 3 images left out, which cannot be read: 2 of half/left, 1 of half/right"
    with pytest.warns(UserWarning, match=told):
        trainer = Trainer(config, backbone, tmp_path / "run")
    trainer.fit()
    splits = {split: trainer.suite.examples("half", split, None) for split in SPLITS}
    assert {e.image for found in splits.values() for e in found} == {*(suite / "half").glob("*/*/*.png")} - bad
    assert {e.image for e in splits["train"]} < {e.image for e in trainer.work.train}  # type: ignore[attr-defined]
    with pytest.raises(SuiteError, match="has 15 test inputs, 16 were asked for"):
        trainer.suite.examples("half", "test", 16)
    arguments = ["eval", "--backbone", str(backbone), "--suite", str(suite), "--adapter", str(tmp_path / "run/adapter")]
    assert main(arguments) == 2
    capsys.readouterr()
    with pytest.warns(UserWarning, match=told):
        assert main([*arguments, "--unreadable-images", "skip", "--json", str(tmp_path / "x.json")]) == 0
    scores = json.loads((tmp_path / "x.json").read_text())["adapter"]["tasks"]
    assert {name: task["total"] for name, task in scores.items()} == {"bright": 16, "half": 15}


def test_a_file_that_breaks_during_a_run_is_named(backbone: Path, folder: Path, tmp_path: Path) -> None:
    suite = _copy(folder, tmp_path / "suite")
    work = Trainer(_config(suite), backbone, tmp_path / "run").work
    file = work.train[0].image  # type: ignore[attr-defined]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ImageError, match=re.escape(f"{file}: found a PNG that cannot be decoded")):
        work._augmented(0, 0)  # type: ignore[attr-defined]


def test_fewer_examples_than_asked_for_are_told(backbone: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"fewer train examples .* so all are used: bright \(\d+\), half \(\d+\)"):
        Trainer(_config(folder, examples_per_task=1000), backbone, tmp_path / "run")


def test_eval_refuses_what_it_cannot_score(
    backbone: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(_config(folder, max_steps=1), backbone, tmp_path / "run").fit()
    suite = _copy(folder, tmp_path / "suite")
    arguments = ["eval", "--backbone", str(backbone), "--suite", str(suite), "--adapter", str(tmp_path / "run/adapter")]
    file = next((suite / "half" / "test").rglob("*.png"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    assert main(arguments) == 2
    told = f"1 of 32 images cannot be read; repair or remove them, or set unreadable_images to skip: {file}: "
    assert told in capsys.readouterr().err
    file.write_bytes(whole)
    (suite / "half" / "train" / "left").rename(suite / "half" / "train" / "west")
    assert main(arguments) == 2
    assert "task half: suite suite has labels west; allowed: the adapter's, left, right" in capsys.readouterr().err
    (suite / "half" / "train" / "west").rename(suite / "half" / "train" / "left")
    shutil.rmtree(suite / "half" / "test")
    assert main([*arguments, "--adapter-only"]) == 0
    assert "not scored, as they have no test examples: half" in capsys.readouterr().out
    shutil.rmtree(suite / "bright" / "test")
    assert main([*arguments, "--gallery", str(tmp_path / "x.png")]) == 2
    assert "found no test examples; allowed: --split train or --split validation" in capsys.readouterr().err


def test_a_run_ends_with_its_best_state_also_when_it_was_stopped(
    backbone: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The accuracy that validation finds after each step.
    found = {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.7, 5: 0.6, 6: 0.6}

    def validate(trainer: Trainer) -> dict[str, Any]:
        return {"validation_accuracy": found[trainer.step], "validation_loss": trainer.step / 10}

    monkeypatch.setattr(Trainer, "validate", validate)
    config = _config(folder, validation_per_task=2, validate_every=1, examples_per_task=24)
    whole = Trainer(config, backbone, tmp_path / "whole")
    at_two: dict[str, torch.Tensor] = {}
    step = whole.train_step

    def train_step() -> StepReport:
        report = step()
        if whole.step == 2:
            at_two.update({name: value.clone() for name, value in whole.work.trained.state_dict().items()})
        return report

    monkeypatch.setattr(whole, "train_step", train_step)
    manifest = whole.fit()
    assert manifest.training["best_step"] == 2
    assert all(torch.equal(value, at_two[name]) for name, value in whole.work.trained.state_dict().items())
    # Stop after the best step and after the state that keeps it.
    monkeypatch.setattr(Trainer, "log_step", _stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        (stopped := Trainer(config, backbone, tmp_path / "stopped")).fit()
    stopped.folder._lock.close()  # type: ignore[union-attr]
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "validate", validate)
    resumed = Trainer(config, backbone, tmp_path / "stopped", resume=True)
    assert resumed.step == 4
    resumed.fit()
    assert same_adapters(tmp_path / "whole", tmp_path / "stopped")
    # A complete run has its result's state too.
    resumed.folder._lock.close()  # type: ignore[union-attr]
    complete = Trainer(config, backbone, tmp_path / "stopped", resume=True)
    complete.fit()
    assert all(torch.equal(value, at_two[name]) for name, value in complete.work.trained.state_dict().items())


def _stop_after_five(trainer: Trainer, *_: object) -> None:
    if trainer.step == 5:
        raise KeyboardInterrupt


def test_an_epoch_shows_a_large_task_in_parts(backbone: Path, folder: Path, tmp_path: Path) -> None:
    # Tasks of 3, 3 and 64 images.
    for task, source, count in (("a", "bright", 3), ("b", "half", 3), ("c", "half", 64)):
        for path in sorted((folder / source / "train").glob("*/*.png"), key=lambda path: int(path.stem))[-count:]:
            copy = tmp_path / "suite" / task / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
        (tmp_path / "suite" / task / "task.json").write_text(json.dumps({"image": {"size": SIZE}}))
    trainer = Trainer(_config(tmp_path / "suite", examples_per_task=None, epochs=2), backbone, tmp_path / "run")
    train = trainer.work.train  # type: ignore[attr-defined]
    whole = Counter(each.task_id for each in train)
    half = len(trainer.batches) // 2
    epochs = [[i for batch in part for i in batch] for part in (trainer.batches[:half], trainer.batches[half:])]
    most = 4 * sorted(whole.values())[1]
    assert [Counter(train[i].task_id for i in epoch) for epoch in epochs] == [{**whole, "c": most}] * 2
    assert set(epochs[0]) != set(epochs[1])


def test_the_command_tells_its_plan_its_progress_and_what_linear_heads_reach(
    backbone: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--suite", str(folder), "--backbone", str(backbone), "--out", str(tmp_path / "run")]
    sets = ("adapter.r=2", "adapter.num_experts=2", "adapter.num_groups=2", "threads=1", "validation_per_task=4")
    assert main([*arguments, "--max-steps", "2", *(word for each in sets for word in ("--set", each))]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"bright +│ 2 +│ \d+ +│ [1-4] +│ 16 ", out)
    assert (
        "2 tasks, 2 steps of up to 32 examples, epochs 1, learning rate 0.001 (experts: times 2 times their block's "
        "output), of heads 0.001; paths from layer 0 on" in out
    )
    assert "train: step 1 of 2, loss " in err
    assert " images/s, " in err
    assert re.search(r"validation: adapter [\d.]+ \(step 2\), linear heads alone [\d.]+", out)
    settings = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (settings["adapter"]["blocks"], settings["examples_per_task"]) == ("both", None)
    assert main(["tasks", "--suite", str(folder)]) == 0
    assert re.search(r"bright .* │ 2 +│ \d+ +│ \d+ +│ 16 ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "changes", "size", "pooling"),
    [
        ("siglip", {}, 112, "mean"),
        ("clip", {"patch_size": 32, "image_size": 224}, 224, "cls_mean"),
        ("dinov3", {"patch_size": 16, "image_size": 224}, 112, "cls_mean"),
    ],
)
def test_size_and_pooling_follow_the_backbone(
    folder: Path, tmp_path: Path, name: str, changes: dict[str, int], size: int, pooling: str
) -> None:
    for task in ("bright", "half"):
        (tmp_path / "suite" / task).mkdir(parents=True)
        (tmp_path / "suite" / task / "train").symlink_to(folder / task / "train")
    other = write_model(tmp_path / "backbone", name, **changes)
    trainer = Trainer(_config(tmp_path / "suite", max_steps=1, examples_per_task=8), other, tmp_path / "run")
    manifest = trainer.fit()
    assert {(task.image.size, task.image.pooling) for task in manifest.tasks if task.image} == {(size, pooling)}


def test_eval_on_the_command_line_records_metrics_and_temperatures(
    backbone: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(_config(folder, validation_per_task=8), backbone, tmp_path / "run").fit()
    arguments = ["eval", "--backbone", str(backbone), "--suite", str(folder), "--dtype", "float32", "--record"]
    written = ["--json", str(tmp_path / "x.json"), "--gallery", str(tmp_path / "x.png")]
    assert main([*arguments, "--adapter", str(tmp_path / "run" / "adapter"), *written]) == 0
    assert Image.open(tmp_path / "x.png").size[0] > 500
    out = capsys.readouterr().out
    assert "accuracy: 2 tasks, mean " in out
    assert "expected calibration error of 32 labels" in out
    manifest = read_checkpoint(tmp_path / "run" / "adapter").manifest
    assert manifest.evaluation["split"] == "test"
    assert set(manifest.evaluation["backbone_alone"]["tasks"]) == {"bright", "half"}
    assert len(json.loads((tmp_path / "x.json").read_text())["answers"]) == 32
    # Temperatures come from the validation split alone: first the run's own, then those of eval.
    trained = manifest.calibration
    assert set(trained) == {"bright", "half"}
    record_evaluation(tmp_path / "run" / "adapter", manifest.evaluation, {})
    assert main([*arguments, "--adapter", str(tmp_path / "run" / "adapter"), "--split", "validation"]) == 0
    found = read_checkpoint(tmp_path / "run" / "adapter").manifest.calibration
    # Stored in float16, the paths differ a little.
    assert found == pytest.approx(trained, rel=0.1)


def test_linear_heads_are_those_of_the_probe(backbone: Path, folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(_config(folder, baseline={"method": "heads"}, spectral="off"), backbone, tmp_path / "run")
    suite = load_suite(str(folder))
    train = [e for task in suite.tasks for e in suite.examples(task.id, "train", 24)]
    head = linear_heads(trainer.adapted, suite.tasks, train)
    examples = suite.examples("half", "test", None)
    answers = trainer.work.answerer()(examples)
    assert set(answers) <= {"left", "right"}
    assert head("half")[0].shape == (2, 64)


def test_a_probe_separates_what_is_separable() -> None:
    generator = torch.Generator().manual_seed(0)
    targets_N = torch.arange(60) % 3
    features_NF = torch.randn(60, 8, generator=generator) + 3 * torch.eye(8)[targets_N]
    weight_CF, bias_C = linear_probe(features_NF, targets_N, 3)
    assert ((features_NF @ weight_CF.T + bias_C).argmax(1) == targets_N).float().mean() > 0.9


def test_heads_of_one_example_give_its_label() -> None:
    heads = Heads([range(3)], 4)
    features_NF = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    heads.fit(features_NF, torch.tensor([0]), torch.tensor([2]))
    assert torch.isfinite(heads(features_NF, torch.tensor([0]))).all()
    assert heads(features_NF, torch.tensor([0])).argmax() == 2
    weight_CF, bias_C = heads.folded(0)
    assert (features_NF @ weight_CF.T + bias_C).argmax() == 2


def test_heads_know_only_their_own_labels_when_told() -> None:
    tasks_B, features_BF = torch.tensor([0, 1]), torch.ones(2, 4)
    own = Heads([[0, 1], [2, 3, 4]], 4)
    assert torch.isinf(own(features_BF, tasks_B)).tolist() == [[False] * 2 + [True] * 3, [True] * 2 + [False] * 3]
    assert not torch.isinf(Heads([[0, 1], [2, 3, 4]], 4, told=False)(features_BF, tasks_B)).any()


def test_augmentation_does_what_is_allowed_and_no_more() -> None:
    import random

    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :10] = 200
    assert augmented(pixels, (), random.Random(0)) is pixels
    flipped = [augmented(pixels, ("flip",), random.Random(seed)) for seed in range(20)]
    assert {bool(image[0, 0, 0] > 100) for image in flipped} == {True, False}
    assert all(np.array_equal(image, pixels) or np.array_equal(image, pixels[:, ::-1]) for image in flipped)
    for name in ("rotate", "crop", "colour"):
        changed = augmented(pixels, (name,), random.Random(1))
        assert changed.shape == pixels.shape
        assert not np.array_equal(changed, pixels)
        assert np.array_equal(changed, augmented(pixels, (name,), random.Random(1)))
