"""The paper's claim on images: accuracy against the number of tasks, by method (docs/claim.md)."""
