"""Adapters attached to a small random Llama."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtlora.adapter import AdapterSet
from mtlora.config import MtLoRAConfig, adapter_parameters
from mtlora.ops.reference import routed_lora_reference

D, LAYERS, TASKS = 16, 2, 3
TOKENS = torch.tensor([[1, 5, 9, 2], [7, 3, 3, 8]])
BOTH = MtLoRAConfig(r=2, lora_alpha=4, num_experts=3, num_groups=4, blocks="both")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=D, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def attach(model: Any) -> Any:
    """Attach a fresh adapter set to the model for one test; `random` gives experts and biases weights too."""
    handles: list[Any] = []

    def attach(config: MtLoRAConfig, *, random: bool) -> AdapterSet:
        torch.manual_seed(1)
        adapters = AdapterSet(config, D, LAYERS, TASKS).eval()
        if random:
            for parameter in adapters.parameters():
                torch.nn.init.normal_(parameter)
        handles.extend(adapters.attach(model))
        return adapters

    yield attach
    for handle in handles:
        handle.remove()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("blocks", ["ffn", "attention", "both"])
def test_a_new_adapter_does_not_change_a_bit(model: Any, attach: Callable[..., AdapterSet], blocks: str) -> None:
    alone = logits(model)
    adapters = attach(BOTH.model_copy(update={"blocks": blocks}), random=False)
    with adapters.context.use(torch.tensor([0, 2])):
        assert torch.equal(logits(model), alone)


def test_an_adapter_can_be_switched_off_and_detached(model: Any) -> None:
    alone = logits(model)
    torch.manual_seed(1)
    adapters = AdapterSet(BOTH, D, LAYERS, TASKS).eval()
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter)
    handles = adapters.attach(model)
    assert len(handles) == 2 * LAYERS
    adapted = logits(model)
    assert not torch.allclose(adapted, alone, atol=1e-2)
    with adapters.context.backbone_alone():
        assert torch.equal(logits(model), alone)
    assert torch.equal(logits(model), adapted)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), alone)


@pytest.mark.parametrize("blocks", ["ffn", "attention", "both"])
def test_logits_equal_the_formula_beside_each_block(
    model: Any, attach: Callable[..., AdapterSet], monkeypatch: pytest.MonkeyPatch, blocks: str
) -> None:
    adapters = attach(BOTH.model_copy(update={"blocks": blocks}), random=True)
    bias_index_B = torch.tensor([2, 0])
    with adapters.context.use(bias_index_B):
        found = logits(model)

    def with_path(forward: Callable[..., Any], adapter: Any) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            x_BLD = args[0] if args else kwargs["hidden_states"]
            delta = routed_lora_reference(
                x_BLD.flatten(0, 1), adapter.lora_A, adapter.lora_B, adapter.lora_route,
                adapter.task_bias[bias_index_B].repeat_interleave(x_BLD.shape[1], dim=0),
                num_groups=BOTH.num_groups, scaling=BOTH.scaling,
            ).float().view_as(x_BLD)  # fmt: skip
            output = forward(*args, **kwargs)
            return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

        return patched

    for layer, layer_adapters in zip(model.model.layers, adapters.layers, strict=True):
        for name, adapter in layer_adapters.items():
            block = getattr(layer, name)
            monkeypatch.setattr(block, "forward", with_path(block.forward, adapter))
    with adapters.context.backbone_alone():
        expected = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_each_sequence_has_its_own_task(model: Any, attach: Callable[..., AdapterSet]) -> None:
    adapters = attach(BOTH, random=True)
    by_task = {}
    for task in range(TASKS):
        with adapters.context.use(torch.tensor([task, task])):
            by_task[task] = logits(model)
    assert not torch.allclose(by_task[0], by_task[1], atol=1e-2)
    with adapters.context.use(torch.tensor([1, 0])):
        mixed = logits(model)
    torch.testing.assert_close(mixed, torch.stack([by_task[1][0], by_task[0][1]]))


@pytest.mark.parametrize("task_bias", [True, False])
@pytest.mark.parametrize("blocks", ["ffn", "attention", "both"])
def test_parameters_have_the_formulas_count_and_checkpoint_names(blocks: str, task_bias: bool) -> None:
    config = BOTH.model_copy(update={"blocks": blocks, "task_bias": task_bias})
    adapters = AdapterSet(config, D, LAYERS, TASKS)
    assert sum(p.numel() for p in adapters.parameters()) == adapter_parameters(config, D, LAYERS, TASKS)
    names = {"lora_A", "lora_B", "lora_route"} | ({"task_bias"} if task_bias else set())
    assert set(adapters.state_dict()) == {
        f"layers.{layer}.{module}.{name}" for layer in range(LAYERS) for module in config.modules for name in names
    }
    assert len(list(adapters.blocks())) == LAYERS * len(config.modules)


def test_refuses_a_model_with_another_number_of_layers(model: Any) -> None:
    with pytest.raises(ValueError, match="the adapter has 1 layers, the model 2"):
        AdapterSet(BOTH, D, LAYERS - 1, TASKS).attach(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_reach_every_parameter(model: Any, attach: Callable[..., AdapterSet]) -> None:
    adapters = attach(BOTH, random=True)
    with adapters.context.use(torch.tensor([0, 1])):
        model(TOKENS).logits.square().mean().backward()
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    # No sequence belongs to the third task.
    assert all(block.task_bias.grad[2].abs().sum() == 0 for block in adapters.blocks())
