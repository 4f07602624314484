"""Many training runs as one comparison: a grid of configurations, task counts and seeds, and its results table."""
