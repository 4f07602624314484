"""Pictures of checkpoints, training runs and sweeps. matplotlib is imported only when one is drawn."""
