"""mtLoRA: block-level mixtures of low-rank experts with fine-grained routing (arXiv 2603.01526)."""

__version__ = "0.1.0"
