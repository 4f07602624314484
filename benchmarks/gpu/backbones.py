"""Sizes of backbones and of the adapter that benchmarks serve beside them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backbone:
    """A Llama-shaped decoder: its sizes as in a Hugging Face config."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    head: int = 128

    @property
    def qkv(self) -> int:
        """Columns of the queries, keys and values of a token."""
        return (self.heads + 2 * self.kv_heads) * self.head

    @property
    def layer_weights(self) -> int:
        """Number of weights of a layer's products."""
        attention = self.hidden * (self.qkv + self.heads * self.head)
        return attention + 3 * self.hidden * self.intermediate


LLAMA_3_8B = Backbone("Llama-3-8B", 4096, 14336, 32, 8, 32, 128256)
QWEN_2_5_7B = Backbone("Qwen2.5-7B", 3584, 18944, 28, 4, 28, 152064)
TINY = Backbone("tiny", 64, 96, 4, 2, 2, 128, head=16)


@dataclass(frozen=True)
class AdapterShape:
    """r, N and G of an adapter beside every FFN block."""

    rank: int = 16
    experts: int = 8
    groups: int = 4

    @property
    def columns(self) -> int:
        """Columns of [A; R]."""
        return self.rank + self.groups * self.experts

    def block_weights(self, hidden: int) -> int:
        """Number of weights beside one block."""
        return hidden * (self.columns + self.experts * self.rank)


# The shipped adapter's shape.
SHAPE = AdapterShape()
