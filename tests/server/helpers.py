"""Helpers of several test modules."""

from typing import Any

# Sampling at random from the whole vocabulary hardly ever meets the end-of-sequence token.
LONG: dict[str, Any] = {"max_new_tokens": 900, "temperature": 2.0, "seed": 1, "stop": [], "without_adapter": True}
