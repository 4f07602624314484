"""Shared by benchmarks and fault scenarios: workers, servers, load loops, adapters, measurement of processes."""
