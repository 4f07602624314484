"""The parts that benchmarks and fault scenarios share: workers, servers, loops, adapters, measuring processes."""
