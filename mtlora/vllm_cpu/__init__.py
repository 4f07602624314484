"""Additions to vLLM for engines on CPUs, besides adapters. Each module can be removed by itself."""
