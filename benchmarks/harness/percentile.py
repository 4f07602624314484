"""Percentiles of measured values."""

from collections.abc import Sequence

import numpy as np


def p99(values: Sequence[float]) -> float:
    """The 99th percentile, a measured value itself."""
    return float(np.percentile(values, 99, method="higher"))
