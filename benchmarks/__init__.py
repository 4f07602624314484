"""Benchmarks; each is a module. They report ratios measured in one run on one machine."""
