"""Vision backbones: throughput and training, and a suite of photographs."""
