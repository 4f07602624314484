"""`mtlora merge`: a task is added and learns, and the other tasks keep their bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora.backbone import identify
from mtlora.checkpoint.format import Checkpoint, CheckpointError
from mtlora.checkpoint.read import read_checkpoint
from mtlora.checkpoint.write import write_checkpoint
from mtlora.cli import main
from mtlora.config import MtLoRAConfig
from mtlora.merge.compare import compare
from mtlora.merge.extend import CLOSED, MergeError, extended_config, merged_tasks, merged_tensors, starting_point
from mtlora.merge.merge import _with_scores
from mtlora.ops.reference import routed_lora_reference
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingConfig
from mtlora.train.trainer import Trainer
from tests.factories import CONFIG, IDENTITY, learned, random_tensors, task_table, write_random

NEW = TaskSpec(id="added", description="Added.")


def in_memory(folder: Path, config: MtLoRAConfig, num_tasks: int, dtype: torch.dtype, seed: int = 0) -> Checkpoint:
    write_random(
        folder, config=config, tasks=task_table(num_tasks, biased=config.task_bias),
        tensors=random_tensors(config, num_tasks=num_tasks, dtype=dtype, seed=seed),
    )  # fmt: skip
    return read_checkpoint(folder)


@pytest.mark.slow
@given(
    st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.integers(1, 3),
    st.sampled_from(["ffn", "attention", "both"]), st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=40)
def test_old_tasks_keep_their_outputs_and_the_new_task_its_learned_ones(
    tmp_path_factory, num_experts, r, num_groups, new_experts, num_tasks, blocks, task_bias, dtype, seed
) -> None:
    if num_experts + new_experts == 1:
        return
    config = MtLoRAConfig(
        r=r, num_experts=num_experts, num_groups=num_groups, blocks=blocks, task_bias=task_bias and num_experts > 1
    )
    folder = tmp_path_factory.mktemp("merge")
    before = in_memory(folder / "before", config, num_tasks, dtype, seed)
    start = starting_point(before, new_experts, torch.Generator().manual_seed(seed))
    trained = learned(start, seed)
    tasks = merged_tasks(before, NEW)
    write_checkpoint(
        folder / "after", backbone=IDENTITY, config=extended_config(before, new_experts), tasks=tasks,
        tensors=merged_tensors(before, trained),
    )  # fmt: skip
    after = read_checkpoint(folder / "after")
    assert [task.id for task in tasks] == [*(task.id for task in before.manifest.tasks), "added"]
    assert {tensor.dtype for tensor in after.tensors.values()} == {dtype}
    x_TD = torch.randn(3, IDENTITY.hidden_size, generator=torch.Generator().manual_seed(seed))
    for name in sorted({name.rpartition(".")[0] for name in before.tensors}):
        for old, new in zip(before.manifest.tasks, tasks, strict=False):
            expected, found = path(before, name, old.bias_index, x_TD), path(after, name, new.bias_index, x_TD)
            # Zero terms do not change a sum, but may change torch's order of additions.
            torch.testing.assert_close(found, expected, rtol=1e-12 if new_experts else 0, atol=0)
        rounded = {key: value.to(dtype) for key, value in trained.items()}
        expected = formula(extended_config(before, new_experts), rounded, name, 0, x_TD)
        assert torch.equal(path(after, name, tasks[-1].bias_index, x_TD), expected)


def path(checkpoint: Checkpoint, name: str, row: int | None, x_TD: torch.Tensor) -> torch.Tensor:
    return formula(checkpoint.manifest.config, checkpoint.tensors, name, row, x_TD)


def formula(config: MtLoRAConfig, tensors: Any, name: str, row: int | None, x_TD: torch.Tensor) -> torch.Tensor:
    """The formula in float64."""
    bias = None if row is None else tensors[f"{name}.task_bias"][row].expand(len(x_TD), -1, -1)
    return routed_lora_reference(
        x_TD, tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], tensors[f"{name}.lora_route"], bias,
        num_groups=config.num_groups, scaling=config.scaling,
    )  # fmt: skip


def test_a_second_merge_starts_from_the_biases_of_open_experts(tmp_path: Path) -> None:
    before = in_memory(tmp_path / "a", CONFIG, 2, torch.float32)
    trained = learned(starting_point(before, 2, torch.Generator()))
    write_checkpoint(
        tmp_path / "b", backbone=IDENTITY, config=extended_config(before, 2), tasks=merged_tasks(before, NEW),
        tensors=merged_tensors(before, trained),
    )  # fmt: skip
    once = read_checkpoint(tmp_path / "b")
    bias = once.tensors["layers.0.mlp.task_bias"]
    assert (bias[:2, :, 3:] == CLOSED).all()
    assert (bias[2].abs() < 10).all()
    start = starting_point(once, 1, torch.Generator()).tensors["layers.0.mlp.task_bias"]
    torch.testing.assert_close(start[0, :, :3], bias[:, :, :3].mean(0))
    torch.testing.assert_close(start[0, :, 3:5], bias[2, :, 3:])
    assert (start[0, :, 5:] == 0).all()


def test_training_changes_only_trainable_entries(tiny_backbone: Path, tmp_path: Path) -> None:
    adapter = MtLoRAConfig(r=4, num_experts=3, num_groups=2, lora_dropout=0.1)
    write_tiny(tiny_backbone, tmp_path / "before", adapter)
    checkpoint = read_checkpoint(tmp_path / "before")
    for new_experts in (0, 2):
        start = starting_point(checkpoint, new_experts, torch.Generator().manual_seed(0))
        config = TrainingConfig(
            adapter=extended_config(checkpoint, new_experts), tasks=("object_counting",), examples_per_task=16,
            validation_per_task=0, batch_size=4, learning_rate=0.05, threads=1,
        )  # fmt: skip
        trainer = Trainer(config, tiny_backbone, tmp_path / f"run-{new_experts}", start=start)
        for _ in range(4):
            trainer.train_step()
        moved = 0
        for name, tensor in trainer.adapted.adapters.state_dict().items():
            mask = start.trainable[name]
            assert torch.equal(tensor[~mask], start.tensors[name][~mask]), name
            moved += int((tensor != start.tensors[name])[mask].sum())
        assert moved > 0.9 * sum(int(mask.sum()) for mask in start.trainable.values())


def write_tiny(backbone: Path, folder: Path, config: MtLoRAConfig, num_tasks: int = 3) -> None:
    identity = identify(backbone)
    tensors = random_tensors(config, identity, num_tasks, dtype=torch.float16)
    write_checkpoint(
        folder, backbone=identity, config=config, tasks=task_table(num_tasks, biased=config.task_bias),
        tensors={name: 0.2 * tensor for name, tensor in tensors.items()}, training={"steps": 5},
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["bias", "experts"])
def test_merge_command_adds_a_task(
    mode: str, tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MtLoRAConfig(r=4, num_experts=3, num_groups=2, task_bias=mode == "bias")
    write_tiny(tiny_backbone, tmp_path / "before", config)
    suite = tmp_path / "suite"
    suite.mkdir()
    examples = [{"input": f"Is {i} odd?", "target": "yes" if i % 2 else "no"} for i in range(60)]
    (suite / "odd.json").write_text(json.dumps({"examples": examples}))
    out = tmp_path / "after"
    arguments = ["merge", str(tmp_path / "before"), "--task", "odd", "--suite", str(suite), "--out", str(out),
                 "--mode", mode, "--backbone", str(tiny_backbone)]  # fmt: skip
    assert main([*arguments, "--set", "epochs=1", "--set", "threads=1", "--set", "learning_rate=0.05"]) == 0
    printed = capsys.readouterr().out
    assert "other tasks: 3 tasks, 12 prompts" in printed
    assert "│ odd " in printed
    if mode == "bias":
        assert "bit-identical before and after" in printed
    before, after = read_checkpoint(tmp_path / "before"), read_checkpoint(out, identify(tiny_backbone))
    assert [task.id for task in after.manifest.tasks] == ["task-0", "task-1", "task-2", "odd"]
    assert after.manifest.config.num_experts == (3 if mode == "bias" else 5)
    assert after.manifest.training["steps"] == 5
    (merged,) = after.manifest.training["merged"]
    assert (merged["task"], merged["mode"]) == ("odd", mode)
    assert set(after.manifest.evaluation["adapter"]["tasks"]) == {"odd"}
    for name in before.tensors:
        if name.endswith("lora_A"):
            assert torch.equal(before.tensors[name], after.tensors[name])
        elif name.endswith("lora_B"):
            assert torch.equal(before.tensors[name], after.tensors[name][:3])

    comparison = compare(tiny_backbone, before, after, ["Is 4 odd?", "Why?"])
    assert comparison.identical or mode == "experts"
    assert comparison.largest_difference < 1e-3
    # Check that the comparison can fail.
    spoiled = {n: t + 0.01 if n.endswith("0.mlp.lora_A") else t for n, t in after.tensors.items()}
    assert not compare(tiny_backbone, before, Checkpoint(after.manifest, spoiled), ["Why?"]).identical

    # The same task again, written to the same folder.
    assert main([*arguments[:1], str(out), *arguments[2:]]) == 2
    assert "the adapter has a task 'odd' already" in capsys.readouterr().err


def test_refuses_to_write_if_an_old_task_changed(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mtlora.merge.merge

    write_tiny(tiny_backbone, tmp_path / "before", MtLoRAConfig(r=4, num_experts=3, num_groups=2))
    honest = mtlora.merge.merge.merged_tensors

    def careless(*arguments: Any) -> dict[str, torch.Tensor]:
        tensors = honest(*arguments)
        name = "layers.1.mlp.lora_B"
        return tensors | {name: tensors[name] * 1.01}

    monkeypatch.setattr(mtlora.merge.merge, "merged_tensors", careless)
    arguments = ["merge", str(tmp_path / "before"), "--task", "object_counting", "--suite", "builtin",
                 "--out", str(tmp_path / "after"), "--backbone", str(tiny_backbone)]  # fmt: skip
    settings = ("max_steps=1", "examples_per_task=8", "validation_per_task=0", "threads=1")
    assert main([*arguments, *(word for setting in settings for word in ("--set", setting))]) == 2
    assert "logits of the old tasks differ" in capsys.readouterr().err
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "task-0", "--suite", "builtin"], "the adapter has a task 'task-0' already"),
        (["--task", "nothing", "--suite", "builtin"], "suite builtin has no task 'nothing'"),
        (["--task", "snarks", "--suite", "/nowhere"], "suite: found '/nowhere'"),
        (["--task", "object_counting", "--suite", "builtin", "--new-experts", "2"], "goes with --mode experts"),
        (
            ["--task", "object_counting", "--suite", "builtin", "--mode", "experts", "--new-experts", "0"],
            "expected at least 1, found 0",
        ),
        (
            ["--task", "object_counting", "--suite", "builtin", "--mode", "experts", "--new-experts", "999"],
            "num_experts: Input should be less than or equal to 256",
        ),
        (["--task", "object_counting", "--suite", "builtin", "--set", "tasks=[]"], "--set tasks: given by"),
        (["--task", "object_counting", "--suite", "builtin", "--set", "weight_decay=0.1"], "weight_decay: expected 0"),
        (["--task", "object_counting", "--suite", "builtin", "--set", "colour=1"], "colour"),
    ],
)
def test_merge_command_names_what_cannot_be_merged(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    write_tiny(tiny_backbone, tmp_path / "before", MtLoRAConfig(r=4, num_experts=3, num_groups=2))
    out = tmp_path / "after"
    common = ["merge", str(tmp_path / "before"), "--out", str(out), "--backbone", str(tiny_backbone)]
    assert main([*common, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_scores_of_the_old_tasks_are_kept() -> None:
    def scores(**accuracies: float) -> dict[str, Any]:
        return {"mean_accuracy": 0.0, "tasks": {task: {"accuracy": a} for task, a in accuracies.items()}}

    old = {"split": "test", "adapter": scores(a=0.5, b=1.0), "backbone_alone": {"of": "another form"}}
    merged = _with_scores(old, {"adapter": scores(c=0.0), "backbone_alone": scores(c=0.25)})
    assert merged["split"] == "test"
    assert merged["adapter"] == scores(a=0.5, b=1.0, c=0.0) | {"mean_accuracy": 0.5}
    assert merged["backbone_alone"] == scores(c=0.25)
    assert _with_scores(old, {}) == old


def test_refuses_an_adapter_of_one_expert(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_experts": 1, "task_bias": False})
    with pytest.raises(MergeError, match="one expert"):
        extended_config(in_memory(tmp_path / "a", config, 2, torch.float32), 0)


def test_refuses_an_output_folder_of_other_files_before_training(tiny_backbone: Path, tmp_path: Path) -> None:
    from mtlora.merge.merge import merge

    config = MtLoRAConfig(r=4, num_experts=3, num_groups=2)
    write_tiny(tiny_backbone, tmp_path / "before", config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"'a.txt', which is not a checkpoint file"):
        merge(
            read_checkpoint(tmp_path / "before"), tiny_backbone, tmp_path / "mine",
            TrainingConfig(adapter=config, tasks=("object_counting",)),
        )  # fmt: skip
