"""The claim's methods and bounds, as settings of a training configuration."""

from collections.abc import Sequence
from typing import Any

from benchmarks.claim.cells import LOWER, UPPER
from benchmarks.claim.decisions import BLOCK, COLLAPSING, PLAIN, ROUTING, TOLD, WHOLE

_ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def _lora(r: int, modules: Sequence[str]) -> dict[str, Any]:
    baseline = {"method": "lora", "r": r, "lora_alpha": 2.0 * r, "target_modules": list(modules)}
    return {"baseline": baseline, "spectral": "off", "balance_weight": 0.0}


def _block(groups: int, spectral: str, task_bias: bool = False) -> dict[str, Any]:
    adapter = {"r": 16, "lora_alpha": 32.0, "num_experts": 8, "num_groups": groups, "task_bias": task_bias}
    return {"adapter": adapter, "spectral": spectral, "spectral_weight": 1e-3}


# Equal parameters: 0.81 M beside the backbone of hidden size 384 and 12 layers.
METHODS: dict[str, dict[str, Any]] = {
    COLLAPSING: _lora(16, ["q_proj", "v_proj"]),
    "LoRA q,v, equal parameters": _lora(44, ["q_proj", "v_proj"]),
    "LoRA all": _lora(16, _ALL_LINEAR),
    PLAIN: _lora(10, _ALL_LINEAR),
    "HydraLoRA q,v": {
        "baseline": {"method": "hydralora", "r": 16, "num_experts": 8, "target_modules": ["q_proj", "v_proj"]},
        "spectral": "off",
    },
    BLOCK: _block(1, "off"),
    "block + spectral": _block(1, "pairwise"),
    ROUTING: _block(4, "off"),
    WHOLE: _block(4, "pairwise"),
    TOLD: _block(4, "pairwise", task_bias=True),
}
DECISIVE = (COLLAPSING, PLAIN, BLOCK, ROUTING, WHOLE)
BOUNDS: dict[str, dict[str, Any]] = {
    LOWER: {"baseline": {"method": "heads"}, "spectral": "off", "balance_weight": 0.0},
    UPPER: METHODS[WHOLE],
}
