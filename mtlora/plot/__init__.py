"""Charts of checkpoints, training runs and sweeps. matplotlib is imported only when a chart is drawn."""
