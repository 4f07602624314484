"""Checkpoints of adapters: the format, converted, merged, published."""
