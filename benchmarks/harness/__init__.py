"""What benchmarks and fault scenarios share: worker processes, asking a server, random adapters, waiting."""
