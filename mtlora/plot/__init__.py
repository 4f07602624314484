"""Pictures: of a checkpoint, of a training run, of a sweep. matplotlib is imported where one is drawn."""
