"""Sweeps on a tiny backbone: the grid, the table and its intervals, resuming, and refusals."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mtlora.cli import main
from mtlora.cli.settings import read_settings
from mtlora.sweep.grid import Run, SweepError, do, grid, read_result
from mtlora.sweep.report import markdown, summarise
from mtlora.sweep.statistics import wilson
from mtlora.train.config import TrainingConfig
from mtlora.train.defaults import ADAPTERS_OF_IMAGES, IMAGES
from tests.mtlora.vision.models import write_model

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["adapter.r=2", "adapter.num_experts=2", "adapter.num_groups=2", "max_steps=3", "batch_size=4", "threads=1"]


def test_smaller_task_counts_are_prefixes_of_larger(tmp_path: Path) -> None:
    runs = grid({"a": TrainingConfig()}, tmp_path, seeds=[0, 1], task_counts=[5, 25, 10])
    assert [(run.num_tasks, run.config.seed) for run in runs] == [(5, 0), (5, 1), (25, 0), (25, 1), (10, 0), (10, 1)]
    five, _, twenty_five, _, ten, _ = (run.config.tasks for run in runs)
    assert five == ten[:5] == twenty_five[:5]
    assert len(set(twenty_five)) == 25
    listed = TrainingConfig(tasks=("navigate", "web_of_lies", "syllogisms"))
    assert grid({"a": listed}, tmp_path, seeds=[0], task_counts=[2])[0].config.tasks == ("navigate", "web_of_lies")
    with pytest.raises(SweepError, match=r"--task-counts: found \d+; allowed: 1 to 3, the tasks of a"):
        grid({"a": listed}, tmp_path, seeds=[0], task_counts=[4])


def test_shipped_configurations_are_valid_and_match_their_names() -> None:
    files = sorted(CONFIGS.glob("*/*.json"))
    configs = {file.stem: TrainingConfig.model_validate_json(file.read_bytes()) for file in files}
    assert {"lora-qv", "hydralora-qv", "block", "block-spectral", "block-routing", "full"} <= set(configs)
    assert [configs[f"groups-{g:02d}"].adapter.num_groups for g in (1, 2, 4, 8, 16, 32)] == [1, 2, 4, 8, 16, 32]
    assert all(configs[blocks].adapter.blocks == blocks for blocks in ("ffn", "attention", "both"))
    methods = [configs[name] for name in ("block", "block-spectral", "block-routing", "full")]
    assert [(c.adapter.num_groups > 1, c.spectral != "off") for c in methods] == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip
    # Equal budgets: only the method may differ, and its best learning rate of those tried.
    differing = {"adapter", "baseline", "spectral", "spectral_weight", "balance_weight", "learning_rate"}
    budgets = [config.model_dump(exclude=differing) for config in configs.values()]
    assert all(budget == budgets[0] for budget in budgets)


def test_the_settings_for_big_bench_hard_fit_every_method() -> None:
    for file in sorted((CONFIGS / "methods").glob("*.json")):
        config = TrainingConfig.model_validate(read_settings(file, [f"@{CONFIGS / 'bbh.json'}"]))
        assert [part.suite for part in config.suite] == ["bbh-generated", "data/bbh"]  # type: ignore[union-attr]


def test_a_sweep_writes_its_table_resumes_and_refuses_another(tiny_backbone: Path, tmp_path: Path, capsys) -> None:
    config = str(CONFIGS / "methods" / "full.json")
    command = ["sweep", config, "--backbone", str(tiny_backbone), "--out", str(tmp_path / "sweep"), "--test-examples",
               "3", "--task-counts", "1", "2", "--examples-per-task", "8", "--jobs", "2"]  # fmt: skip
    for setting in [*TINY, 'tasks=["boolean_expressions","navigate"]']:
        command += ["--set", setting]
    assert main(command) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "sweep"
    assert (out / "results.md").read_text() in printed
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["name"], row["num_tasks"]) for row in rows] == [("full", 1), ("full", 2)]
    for row in rows:
        assert row["parameters"] > 0
        assert row["seconds"] > 0
        assert row["tokens_per_second"] > 0
        log = out / "full" / f"{row['num_tasks']}-tasks" / "seed-0" / "log.jsonl"
        steps = [step["loss"] for step in map(json.loads, log.read_text().splitlines()) if "loss" in step]
        assert row["loss"] == pytest.approx(sum(steps[1:]) / len(steps[1:]), abs=1e-4)
        assert row["peak_memory_bytes"] > 1 << 27
        assert row["steps"] == 2 if row["num_tasks"] == 1 else 3
        for task in row["tasks"].values():
            assert task["total"] == 3
            assert task["interval"][0] <= task["accuracy"] <= task["interval"][1]
    assert all((out / name).stat().st_size > 10_000 for name in ("results.png", "losses.png", "scaling.png"))
    # Once more: nothing is trained again, even if the table itself is lost.
    trained = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/result.json")}
    assert len(trained) == 2
    (out / "results.md").unlink()
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/result.json")} == trained
    assert (out / "results.md").exists()
    file = out / "full" / "1-tasks" / "seed-0" / "result.json"
    result = json.loads(file.read_text())
    (task,) = result["tasks"].values()
    assert task["right"].count("1") == task["correct"]
    assert len(task["right"]) == task["total"]
    # A result from before a setting existed stays valid.
    del result["config"]["relative_expert_rate"]
    file.write_text(json.dumps(result))
    assert main(command) == 0
    assert main([*command, "--test-examples", "4"]) == 2
    assert "of another configuration (settings)" in capsys.readouterr().err
    shutil.copytree(tiny_backbone, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert main([*command, "--backbone", str(tmp_path / "other")]) == 2
    assert "of another configuration (backbone)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_over_images_starts_from_their_defaults(tmp_path: Path) -> None:
    for i in range(48):
        split, label = ("test" if i < 8 else "train"), ("elm", "oak")[i // 2 % 2]
        path = tmp_path / "photos" / f"task-{i % 2}" / split / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (5 * i, 3 * i, 90)).save(path)
    own = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 2, "validation_per_task": 2, "frozen_layers": 1}
    for name, settings in (("open", {}), ("own", own)):
        adapter = {"r": 2, "num_experts": 2, "num_groups": 2}
        (tmp_path / f"{name}.json").write_text(json.dumps({"adapter": adapter, **settings}))
    command = ["sweep", str(tmp_path / "open.json"), str(tmp_path / "own.json"), "--out", str(tmp_path / "sweep")]
    command += ["--backbone", str(write_model(tmp_path / "backbone")), "--examples-per-task", "12", "--jobs", "2"]
    for setting in (f"suite={tmp_path / 'photos'}", "max_steps=1", "threads=1"):
        command += ["--set", setting]
    assert main(command) == 0
    taken = {
        name: json.loads((tmp_path / "sweep" / name / "2-tasks" / "seed-0" / "training.json").read_text())
        for name in ("open", "own")
    }
    expected = IMAGES | ADAPTERS_OF_IMAGES
    assert {name: taken["open"][name] for name in expected} == expected
    # The number of examples is the sweep's.
    assert taken["open"]["examples_per_task"] == 12
    assert {name: taken["own"][name] for name in own} == own
    assert taken["own"]["relative_expert_rate"] == ADAPTERS_OF_IMAGES["relative_expert_rate"]


def test_a_sweep_over_texts_with_images_has_a_vision_backbone(tiny_backbone: Path, tmp_path: Path, capsys) -> None:
    vision = [write_model(tmp_path / name) for name in ("eyes", "others")]
    command = ["sweep", str(CONFIGS / "methods" / "full.json"), "--out", str(tmp_path / "sweep")]
    command += ["--backbone", str(tiny_backbone), "--examples-per-task", "4", "--test-examples", "1"]
    for setting in [*TINY, "suite=builtin-pictures", 'tasks=["picture_number"]', "max_steps=1"]:
        command += ["--set", setting]
    assert main([*command, "--vision-backbone", str(vision[0])]) == 0
    (row,) = json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]
    assert row["steps"] == 1
    weights = vision[1] / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    assert main([*command, "--vision-backbone", str(vision[1])]) == 2
    assert "of another configuration (vision_backbone)" in capsys.readouterr().err


def test_a_run_that_cannot_be_scored_ends_no_sweep(tiny_backbone: Path, tmp_path: Path) -> None:
    lines = [{"instruction": f"{i}", "response": "yes", "category": "c"} for i in range(60)]
    lines.append({"instruction": "Go on.", "response": "no " * 4000, "category": "c"})
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = TrainingConfig.model_validate({
        "suite": str(tmp_path / "lines.jsonl"), "tasks": ("c",), "max_steps": 1, "examples_per_task": None,
        "validation_per_task": 0, "longer_examples": "skip", "threads": 1,
        "adapter": {"r": 2, "num_experts": 2, "num_groups": 2},
    })  # fmt: skip
    result = do(Run("a", config, tmp_path / "run"), tiny_backbone, {"examples": 1})
    assert "and 4008 new ones; the backbone takes 2048" in result["error"]
    assert (tmp_path / "run" / "adapter").exists()


def test_a_run_that_diverges_says_so_and_is_not_run_again(tiny_backbone: Path, tmp_path: Path) -> None:
    config = TrainingConfig.model_validate({
        "tasks": ("navigate",), "max_steps": 8, "examples_per_task": 32, "validation_per_task": 0, "batch_size": 4,
        "threads": 1, "learning_rate": 1e30, "adapter": {"r": 2, "num_experts": 2, "num_groups": 2},
    })  # fmt: skip
    run, settings = Run("a", config, tmp_path / "run"), {"examples": 1}
    result = do(run, tiny_backbone, settings)
    assert "try a lower learning_rate" in result["error"]
    assert read_result(run, tiny_backbone, settings, diverged=True) == result
    assert read_result(run, tiny_backbone, settings) is None
    run.result_file.write_text(json.dumps({key: value for key, value in result.items() if key != "diverged"}))
    assert read_result(run, tiny_backbone, settings, diverged=True) is None


def test_a_killed_sweep_ends_its_run(tiny_backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", str(CONFIGS / "methods" / "full.json"), "--backbone", str(tiny_backbone), "--out", str(out),
               "--task-counts", "1", "--examples-per-task", "1000"]  # fmt: skip
    for setting in [*TINY, "max_steps=null", "epochs=1000"]:
        command += ["--set", setting]
    with subprocess.Popen([sys.executable, "-m", "mtlora.cli", *command], stderr=subprocess.DEVNULL) as sweep:
        log = out / "full" / "1-tasks" / "seed-0" / "log.jsonl"
        until = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size):
            assert sweep.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        started = psutil.Process(sweep.pid).children(recursive=True)
        sweep.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    for process in alive:
        process.kill()
    assert not alive


def test_the_table_pools_seeds_and_compares_common_tasks() -> None:
    def result(name: str, seed: int, correct: dict[str, int]) -> dict[str, object]:
        return {
            "name": name, "seed": seed, "num_tasks": len(correct), "parameters": 10, "steps": 2, "seconds": 1.0 + seed,
            "tokens_per_second": 5.0, "loss": 2.0 - seed, "peak_memory_bytes": (1 + seed) << 30,
            "tasks": {
                task: {"correct": c, "total": 4, "examples": task, "right": "1" * c + "0" * (4 - c)}
                for task, c in correct.items()
            },
        }  # fmt: skip

    ahead, behind = summarise([result("x", 0, {"a": 3}), result("y", 0, {"a": 1})])
    assert ahead["behind"] is None
    assert (behind["behind"]["best"], behind["behind"]["mean"]) == ("x", 0.5)
    rows = summarise([result("m", 0, {"a": 4}), result("m", 1, {"a": 2}), result("m", 0, {"a": 1, "b": 3})])
    one, two = rows
    assert (one["accuracy"]["mean"], one["seconds"], one["peak_memory_bytes"]) == (0.75, 1.5, 2 << 30)
    assert one["tasks"]["a"]["interval"] == wilson(6, 8)
    assert (two["accuracy"]["mean"], two["common"]["mean"], two["common"]["tasks"]) == (0.5, 0.25, 1)
    assert "| m | 1 | 2 | 10 | 2 | 2 | 5 | 2.00 GiB | 1.500 | 0.75 (" in markdown(rows)
