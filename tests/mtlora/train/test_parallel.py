"""Several processes and gradient checkpointing do not change the mathematics of a step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtlora.config import MtLoRAConfig
from mtlora.train.config import TrainingConfig
from mtlora.train.data import collate
from mtlora.train.trainer import Trainer

CONFIG = TrainingConfig(
    adapter=MtLoRAConfig(r=4, num_experts=3, num_groups=2), tasks=("boolean_expressions", "word_sorting"),
    # The last batch has one example, so one process has none.
    examples_per_task=15, validation_per_task=2, batch_size=29, epochs=4, learning_rate=1e-2, balance_weight=1.0,
    spectral_weight=1.0, dtype="float32", save_every=2, threads=1, relative_expert_rate=20.0,
)  # fmt: skip


def losses(run: Path) -> list[dict[str, float]]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [record for record in records if "loss" in record]


def test_two_processes_give_the_same_losses_as_one(tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG.model_dump_json())
    trainer = Trainer(CONFIG, tiny_backbone, tmp_path / "one")
    trainer.fit()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "-m", "mtlora.cli", "train", "--config", str(tmp_path / "config.json"), "--backbone", str(tiny_backbone),
        "--out", str(tmp_path / "two"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 8
    assert {1, 29} == set(map(len, trainer.batches))
    for alone, together in zip(one, two, strict=True):
        for name in ("loss", "balance", "spectral", "grad_norm", "num_tokens"):
            assert together[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-5), (alone["step"], name)
    assert one[-1]["loss"] < one[0]["loss"]
    assert (tmp_path / "two" / "adapter" / "adapter.safetensors").exists()


def test_gradient_checkpointing_changes_only_memory(tiny_backbone: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"adapter": CONFIG.adapter.model_copy(update={"blocks": "both"})})
    trained: dict[bool, dict[str, torch.Tensor]] = {}
    kept: dict[bool, int] = {}
    for checkpointing in (False, True):
        changed = config.model_copy(update={"gradient_checkpointing": checkpointing})
        trainer = Trainer(changed, tiny_backbone, tmp_path / str(checkpointing))
        kept[checkpointing] = kept_for_backward(trainer)
        for _ in range(3):
            trainer.train_step()
        trained[checkpointing] = trainer.adapted.adapters.state_dict()
    for name, expected in trained[False].items():
        torch.testing.assert_close(trained[True][name], expected, rtol=1e-5, atol=1e-6)
    assert kept[True] < kept[False] / 4


def kept_for_backward(trainer: Trainer) -> int:
    """Elements that the decoder layers' forward pass keeps for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel())
        return tensor

    trainer.adapted.adapters.train()
    batch = collate(trainer.work.examples.train)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.adapted.model.model(input_ids=batch.tokens_BL, use_cache=False)
    return sum(sizes)
