"""Percentiles of measured values."""

from collections.abc import Sequence

import numpy as np


def p99(values: Sequence[float]) -> float:
    """The 99th percentile: the measured value at or above it."""
    return float(np.percentile(values, 99, method="higher"))
