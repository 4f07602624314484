"""Backbone families: the one place where a new family is added.

A family is a `model_type` of transformers whose causal language model vLLM runs too. To add a family:

1. Check its layout, in transformers and in vLLM. Decoder layers are at `model.layers[l]`, and each has the blocks
   `self_attn` and `mlp`, whose forward takes the layer's input as `hidden_states` or `x`. An adapter needs nothing
   else: `AdapterSet.attach` (training) and `MtLoRAModelManager` (serving) find the blocks by these names, and refuse a
   model without them. In transformers, `model.model` gives the hidden states and `model.lm_head` the logits.
2. Add an entry to `FAMILIES`. Name a class only if it computes the same as `mtlora/train/cpu_backbone.py`, which then
   replaces it while training on a CPU. `None` keeps the family's own operation.
3. Run `pytest tests/engine/test_parity.py`. For every entry, it compares the engine's log-probabilities, with adapters,
   to those of transformers.

A model of another family also runs if it has this layout, but it trains more slowly on a CPU and no test covers it.
"""

from typing import Any, Literal, NamedTuple


class Family(NamedTuple):
    """Names of a family's classes in transformers.

    rms_norm: the class that computes weight * x / sqrt(mean x^2 + epsilon).
    gated_mlp: the class that computes down(activation(gate x) * up x).
    """

    rms_norm: str | None = None
    gated_mlp: str | None = None


FAMILIES = {
    "llama": Family("LlamaRMSNorm", "LlamaMLP"),
    "qwen2": Family("Qwen2RMSNorm", "Qwen2MLP"),
    "qwen3": Family("Qwen3RMSNorm", "Qwen3MLP"),
    "mistral": Family("MistralRMSNorm", "MistralMLP"),
    "gemma": Family(),  # its norm scales by 1 + weight, its gate is a GELU
}

Blocks = Literal["ffn", "attention", "both"]

# The blocks of a decoder layer that may get a path, by their names in a configuration.
BLOCK_MODULES: dict[Blocks, tuple[str, ...]] = {
    "ffn": ("mlp",),
    "attention": ("self_attn",),
    "both": ("self_attn", "mlp"),
}
# A block's module name without the prefix before `layers`; also its name in a checkpoint.
BLOCK_PATTERN = rf"layers\.\d+\.(?:{'|'.join(BLOCK_MODULES['both'])})"


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a causal language model of transformers. Raises AttributeError for another layout."""
    return list(model.get_submodule("model.layers").children())
