"""Benchmarks: ratios of throughput, taken in one run on one machine."""
