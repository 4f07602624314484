"""Texts drawn from a compiled type."""

import random
from collections.abc import Sequence
from typing import Any

import torch


def allowed_tokens(outputs: Any, grammar: Any) -> Sequence[int]:
    """The tokens that may come next."""
    row = torch.zeros(1, len(outputs.vocabulary.ordinary), dtype=torch.int32)
    grammar.fill_bitmask(row, 0)
    found: list[int] = outputs.vocabulary.tokens_of(row[0].numpy(), 1 << 20)
    return found


def sample(outputs: Any, text: str, left: int, rng: random.Random, *, ends: float = 0.0) -> bytes:
    """A text of tokens drawn evenly from those allowed.

    text: the constraint's. left: most tokens. ends: how likely an end is where it is allowed, beside its even share.
    """
    vocabulary, grammar, found = outputs.vocabulary, outputs.grammar(text, left, None), b""
    for _ in range(left):
        allowed = allowed_tokens(outputs, grammar)
        assert allowed, f"nothing may follow {found!r}"
        token = vocabulary.eos if vocabulary.eos in allowed and rng.random() < ends else rng.choice(allowed)
        assert grammar.accept_tokens("x", [token])
        if grammar.is_terminated():
            return found
        found += vocabulary.texts[token]
    raise AssertionError(f"{found!r} has not ended after {left} tokens")
