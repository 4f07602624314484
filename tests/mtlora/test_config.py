"""Hyper-parameters: the published parameter counts, and what is refused."""

import pytest
from pydantic import ValidationError

from mtlora.config import MtLoRAConfig, adapter_parameters, block_adapter_parameters

LLAMA_7B = {"hidden_size": 4096, "num_layers": 32}


@pytest.mark.parametrize(("num_groups", "parameters"), [(1, 37_748_736), (2, 39_845_888)])
def test_parameters_equal_the_published_counts(num_groups: int, parameters: int) -> None:
    config = MtLoRAConfig(r=16, num_experts=16, num_groups=num_groups, task_bias=False)
    assert adapter_parameters(config, **LLAMA_7B) == parameters


def test_task_biases_are_counted() -> None:
    plain = MtLoRAConfig(r=2, num_experts=3, num_groups=4, blocks="both", task_bias=False)
    biased = plain.model_copy(update={"task_bias": True})
    assert block_adapter_parameters(plain, 8) == block_adapter_parameters(biased, 8) == 8 * (2 + 3 * 2 + 3 * 4)
    assert adapter_parameters(plain, 8, 5, num_tasks=7) == 2 * 5 * 160
    assert adapter_parameters(biased, 8, 5, num_tasks=7) == 2 * 5 * (160 + 7 * 3 * 4)


def test_modules_follow_the_order_of_a_layer() -> None:
    assert MtLoRAConfig(blocks="both").modules == ("self_attn", "mlp")
    assert MtLoRAConfig(blocks="ffn").modules == ("mlp",)
    assert MtLoRAConfig(blocks="attention").modules == ("self_attn",)


def test_scaling_is_alpha_over_r() -> None:
    assert MtLoRAConfig(r=16, lora_alpha=64).scaling == 4.0


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("r", 0, "greater than or equal to 1"),
        ("r", 513, "less than or equal to 512"),
        ("r", "wide", "valid integer"),
        ("lora_alpha", 0, "greater than 0"),
        ("lora_alpha", float("inf"), "finite"),
        ("lora_alpha", float("nan"), "finite"),
        ("num_experts", 257, "less than or equal to 256"),
        ("num_groups", -1, "greater than or equal to 1"),
        ("blocks", "mlp", "'ffn', 'attention' or 'both'"),
        ("lora_dropout", 1.0, "less than 1"),
        ("task_bias", "perhaps", "valid boolean"),
        ("rank", 8, "not permitted"),
    ],
)
def test_a_refusal_names_field_and_values_found_and_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MtLoRAConfig.model_validate({field: value})
    [error] = caught.value.errors()
    assert error["loc"] == (field,)
    assert error["input"] is value
    assert allowed in error["msg"]


def test_refuses_task_biases_for_one_expert() -> None:
    with pytest.raises(ValidationError, match="num_experts > 1"):
        MtLoRAConfig(num_experts=1)
    assert MtLoRAConfig(num_experts=1, task_bias=False).router_rows == 4


def test_refuses_groups_that_do_not_divide_the_hidden_size() -> None:
    with pytest.raises(ValueError, match="num_groups 5 does not divide the backbone's hidden size 576"):
        adapter_parameters(MtLoRAConfig(num_groups=5), 576, 30)


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        MtLoRAConfig().r = 4  # type: ignore[misc]
