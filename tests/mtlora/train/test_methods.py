"""Baselines: their parameter counts, their formulas, and that they learn, resume and load again."""

from pathlib import Path

import pytest
import torch

from mtlora.config import MtLoRAConfig, adapter_parameters
from mtlora.errors import MtLoRAError
from mtlora.methods import HydraLoRAConfig, LoRAConfig
from mtlora.methods.hydralora import HydraLinear
from mtlora.model.baseline import load_baseline
from mtlora.model.language import new_adapted_model
from mtlora.train.config import TrainingConfig
from mtlora.train.trainer import Trainer

SMALL = TrainingConfig(
    tasks=("boolean_expressions", "object_counting", "list_operations"), examples_per_task=16, validation_per_task=2,
    batch_size=4, epochs=3, learning_rate=2e-2, threads=1,
)  # fmt: skip
BASELINES = [HydraLoRAConfig(r=4, num_experts=3, lora_dropout=0.1), LoRAConfig(r=4, lora_dropout=0.1)]


def hydralora_parameters(r: int, num_experts: int, in_out_features: list[tuple[int, int]], num_layers: int) -> int:
    """Trainable parameters of component-level HydraLoRA: per linear layer A [r, in], N x B [out, r], router [N, in]."""
    per_layer = sum(r * i + num_experts * o * r + num_experts * i for i, o in in_out_features)
    return per_layer * num_layers


def test_parameters_equal_the_published_counts() -> None:
    """LLaMA-2-7B, r 16, N 16: block-level FFN with routing against HydraLoRA on q and v."""
    hydralora = hydralora_parameters(16, 16, [(4096, 4096)] * 2, num_layers=32)
    config = MtLoRAConfig(r=16, num_experts=16, num_groups=2, task_bias=False)
    block = adapter_parameters(config, 4096, 32)
    assert (hydralora, block) == (75_497_472, 39_845_888)
    assert round(100 * (block / hydralora - 1)) == -47


def test_hydralora_has_the_parameters_of_its_formula(tiny_backbone: Path) -> None:
    adapted = new_adapted_model(tiny_backbone, HydraLoRAConfig(r=4, num_experts=3), 1, torch.float32)
    found = sum(parameter.numel() for parameter in adapted.adapters.parameters())
    assert found == hydralora_parameters(4, 3, [(48, 48), (48, 24)], num_layers=2)


@pytest.mark.parametrize("products", ["fused", "loop"])
def test_hydralora_equals_its_formula(products: str) -> None:
    torch.manual_seed(0)
    path = HydraLinear(HydraLoRAConfig(r=3, num_experts=4, lora_alpha=6.0, products=products), 10, 7)
    torch.nn.init.normal_(path.lora_B)
    x = torch.randn(2, 5, 10)
    for b, position in [(0, 0), (1, 4)]:
        token = x[b, position]
        weights = torch.softmax(path.lora_route @ token, dim=0)
        expected = 2.0 * sum(weights[i] * (path.lora_B[i] @ (path.lora_A @ token)) for i in range(4))
        torch.testing.assert_close(path(x)[b, position], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda config: config.method)
def test_a_baseline_trains_and_loads_again(tiny_backbone: Path, tmp_path: Path, baseline) -> None:
    trainer = Trainer(SMALL.model_copy(update={"baseline": baseline}), tiny_backbone, tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.adapted.model.state_dict().items() if "lora" not in name}
    tokens_BL, none = torch.arange(100, 112).view(1, -1), torch.zeros(1, dtype=torch.int64)
    rows = torch.arange(12)
    trainer.adapted.adapters.eval()
    with torch.inference_mode():
        alone = trainer.adapted.answer_logits(tokens_BL, none, rows)
    losses = [trainer.train_step().loss for _ in range(len(trainer.batches) - 2)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    manifest = trainer.fit()
    assert set(manifest.evaluation["adapter"]["tasks"]) == set(SMALL.tasks or ())
    after = trainer.adapted.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    trainer.adapted.adapters.eval()
    with torch.inference_mode():
        trained = trainer.adapted.answer_logits(tokens_BL, none, rows)
        with trainer.adapted.adapters.context.backbone_alone():
            assert torch.equal(trainer.adapted.answer_logits(tokens_BL, none, rows), alone)
        loaded, read = load_baseline(tiny_backbone, tmp_path / "run" / "adapter", torch.bfloat16)
        assert torch.equal(loaded.answer_logits(tokens_BL, none, rows), trained)
    assert not torch.equal(trained, alone)
    assert read.config == baseline
    assert read.training["trainable_parameters"] == trainer.num_parameters


def test_a_baseline_resumes_to_the_same_bits(tiny_backbone: Path, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"baseline": LoRAConfig(r=4, lora_dropout=0.1)})
    whole = Trainer(config, tiny_backbone, tmp_path / "whole")
    for _ in range(6):
        whole.train_step()
    broken = Trainer(config, tiny_backbone, tmp_path / "broken")
    for _ in range(3):
        broken.train_step()
    broken.save()
    resumed = Trainer(config, tiny_backbone, tmp_path / "broken", resume=True)
    for _ in range(3):
        resumed.train_step()
    expected, found = whole.adapted.adapters.state_dict(), resumed.adapted.adapters.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_refuses_an_unknown_layer_by_name(tiny_backbone: Path) -> None:
    for baseline in (HydraLoRAConfig(target_modules=("wq",)), LoRAConfig(target_modules=("q_proj", "wq"))):
        with pytest.raises(MtLoRAError, match="no linear layer wq; it has down_proj, gate_proj"):
            new_adapted_model(tiny_backbone, baseline, 1, torch.float32)
