"""Benchmarks, a module each. They report ratios that one run on one machine measures."""
