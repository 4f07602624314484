"""The profile of a step: its sections add up, and every one is there."""

from pathlib import Path

import pytest
import torch

from mtlora.config import MtLoRAConfig
from mtlora.train.config import TrainingConfig, TrainingError
from mtlora.train.profile import profile_training
from mtlora.train.trainer import Trainer


def test_sections_add_up_to_the_whole_time(tiny_backbone: Path, tmp_path: Path) -> None:
    config = TrainingConfig(
        adapter=MtLoRAConfig(r=2, num_experts=2, num_groups=2), tasks=("navigate",), examples_per_task=44,
        validation_per_task=0, batch_size=4, threads=1,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        trainer = Trainer(config, tiny_backbone, tmp_path / "run")
        with pytest.raises(TrainingError, match="--profile 9: needs a run of 15 steps, this one has 11"):
            profile_training(trainer, 9)
        found = profile_training(trainer, 4)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    wanted = {"batch", "forward", "balance", "spectral", "backward", "exchange", "optimizer", "log", "save", "rest"}
    assert set(found["sections"]) == wanted
    assert sum(found["sections"].values()) == pytest.approx(1)
    assert all(share >= 0 for share in found["sections"].values())
    assert any("mm" in name for name in found["operators"])
    assert found["tokens_per_second"] > 0
