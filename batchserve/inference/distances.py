"""How far two answers to the same records are from each other."""

from typing import Any

import numpy as np

__all__ = ["distances"]


def distances(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Absolute and relative difference, each float64 [n, k]; equal NaN and equal infinities differ by nothing."""
    expected, got = expected.astype(np.float64), got.astype(np.float64)
    same = (expected == got) | (np.isnan(expected) & np.isnan(got))
    with np.errstate(invalid="ignore"):
        absolute = np.where(same, 0.0, np.abs(expected - got))
        absolute = np.where(np.isnan(absolute), np.inf, absolute)
        relative = np.where(np.isinf(absolute), np.inf, absolute / np.maximum(1.0, np.abs(expected)))
    return absolute, np.where(same, 0.0, relative)
