"""Array types, and ragged arrays: runs of different lengths stored one after the other."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]


def ragged(starts: IntArray, sizes: IntArray) -> IntArray:
    """The index runs `starts[i], starts[i] + 1, ...` of the given sizes, concatenated."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def starts_of(sizes: IntArray) -> IntArray:
    """The start of each run, and the end of the last one: (n + 1,) for sizes (n,)."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
