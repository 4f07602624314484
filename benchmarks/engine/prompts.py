"""Prompts for throughput: random token ids, so that neither the text nor the prefix cache matters."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class RandomPrompts:
    """`requests` prompts of `prompt_tokens` (from, to) random token ids, `new_tokens` generated for each, greedily."""

    name: str
    requests: int
    prompt_tokens: tuple[int, int]
    new_tokens: int

    def draw(self, vocabulary: int, seed: int) -> list[list[int]]:
        """Token ids of every prompt; the same for the same seed."""
        rng = random.Random(f"{self.name}/{seed}")
        low, high = self.prompt_tokens
        return [[rng.randrange(vocabulary) for _ in range(rng.randint(low, high))] for _ in range(self.requests)]


REFERENCE = RandomPrompts("reference", 100, (60, 120), 32)
LONG_PROMPTS = RandomPrompts("long-prompts", 32, (400, 800), 8)
LONG_ANSWERS = RandomPrompts("long-answers", 64, (16, 32), 128)
LOADS = {load.name: load for load in (REFERENCE, LONG_PROMPTS, LONG_ANSWERS)}
