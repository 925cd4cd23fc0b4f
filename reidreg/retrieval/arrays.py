"""Array types, and runs of different lengths that lie side by side in one array."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]


def ragged(starts: IntArray, sizes: IntArray) -> IntArray:
    """The runs `starts[i], starts[i] + 1, ...` of the given sizes, one after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def starts_of(sizes: IntArray) -> IntArray:
    """Where each of the runs starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
