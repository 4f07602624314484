"""What engines on CPUs need of vLLM besides adapters. Each module can be removed by itself."""
