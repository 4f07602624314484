"""Percentiles of measured values, and their spread."""

import statistics
from collections.abc import Sequence

import numpy as np


def p99(values: Sequence[float]) -> float:
    """The 99th percentile: the measured value at or above it."""
    return float(np.percentile(values, 99, method="higher"))


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, minimum and maximum of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
