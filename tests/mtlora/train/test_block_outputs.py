"""Paths whose rate follows the output of their block: measured without the path, and taken by the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mtlora.adapter import AdapterSet
from mtlora.backbone import identify
from mtlora.methods.config import LoRAConfig
from mtlora.model.language import new_adapted_model
from mtlora.train.block_outputs import block_outputs
from mtlora.train.config import TrainingConfig
from mtlora.train.data import collate
from mtlora.train.optimizer import learning_rate
from mtlora.train.trainer import Trainer
from tests.mtlora.train.runs import same_adapters

SMALL: dict[str, Any] = {
    "adapter": {"r": 4, "num_experts": 3, "num_groups": 2, "blocks": "both"},
    "tasks": ["boolean_expressions", "word_sorting"], "examples_per_task": 12, "validation_per_task": 0,
    "batch_size": 8, "save_every": 2, "dtype": "float32", "threads": 1, "relative_expert_rate": 0.5,
}  # fmt: skip


def _config(**changed: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({**SMALL, **changed})


def _adapters(trainer: Trainer) -> AdapterSet:
    found = trainer.adapted.adapters
    assert isinstance(found, AdapterSet)
    return found


def _expected(trainer: Trainer, folder: Path) -> list[float]:
    """The size of every block's output on the first batch, in a model that never had a path."""
    model = new_adapted_model(folder, LoRAConfig(), 2, torch.float32).model
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(lambda _b, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    batch = [trainer.work.examples.train[i] for i in trainer.batches[0]]  # type: ignore[attr-defined]
    with torch.no_grad():
        model(input_ids=collate(batch, max(map(len, batch))).tokens_BL)
    return [output.double().square().mean(-1).sqrt().log().mean().exp().item() for output in outputs]


def test_it_measures_blocks_without_their_paths(tiny_backbone: Path, tmp_path: Path) -> None:
    trainer = Trainer(_config(), tiny_backbone, tmp_path / "run")
    expected = _expected(trainer, tiny_backbone)
    assert len(expected) == 2 * identify(tiny_backbone).num_layers
    assert list(block_outputs(trainer.work, trainer.ranks).values()) == pytest.approx(expected, rel=1e-4)
    # A path's own output does not count, but the blocks after it see it.
    with torch.no_grad():
        next(_adapters(trainer).blocks()).lora_B.fill_(1.0)
    found = list(block_outputs(trainer.work, trainer.ranks).values())
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found[1] != pytest.approx(expected[1], rel=1e-2)


def test_the_first_step_moves_experts_in_proportion(tiny_backbone: Path, tmp_path: Path) -> None:
    config = _config(weight_decay=0.0)
    trainer = Trainer(config, tiny_backbone, tmp_path / "run")
    outputs = block_outputs(trainer.work, trainer.ranks)
    trainer.train_step()
    rate = learning_rate(config, 0, len(trainer.batches))
    for path, output in outputs.items():
        # AdamW's first step is the rate, for every entry whose gradient is well above its epsilon.
        assert path.lora_B.abs().max().item() == pytest.approx(0.5 * output * rate, rel=1e-2)


def test_a_stopped_run_resumes_to_the_same_bits(tiny_backbone: Path, tmp_path: Path) -> None:
    config = _config()
    Trainer(config, tiny_backbone, tmp_path / "whole").fit()
    stopped = Trainer(config, tiny_backbone, tmp_path / "stopped")
    stopped.train_step()
    stopped.train_step()
    stopped.save()
    stopped.folder._lock.close()  # type: ignore[union-attr]
    Trainer(config, tiny_backbone, tmp_path / "stopped", resume=True).fit()
    assert same_adapters(tmp_path / "whole", tmp_path / "stopped")


def test_only_paths_have_such_rates() -> None:
    with pytest.raises(ValidationError, match="relative_expert_rate is for the adapter's paths"):
        _config(baseline={"method": "lora"})
