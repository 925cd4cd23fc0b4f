"""Memory for batches that is used again.

A batch of floats takes tens of megabytes. The system hands such blocks out in fresh pages, and
clearing those can take longer than filling them.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEPT = 3  # the batch in use, the next, and one that is held on to


class Buffers:
    """Hands out float32 tensors on the CPU; memory that nothing refers to any more comes again."""

    def __init__(self) -> None:
        # Each block, and the array over it that the tensor handed out last was made from: torch
        # holds on to that for as long as anything, a view or a graph, uses the memory.
        self._blocks: list[tuple[NDArray[np.float32], weakref.ref[Any]]] = []

    def empty(self, *shape: int) -> Tensor:
        """A tensor with arbitrary content."""
        for place, (block, lent) in enumerate(self._blocks):
            if lent() is None and block.shape == shape:
                return self._lend(block, place)
        block = np.empty(shape, dtype=np.float32)
        free = [place for place, (_, lent) in enumerate(self._blocks) if lent() is None]
        if free:
            return self._lend(block, free[0])  # of a batch of another size
        if len(self._blocks) < _KEPT:
            return self._lend(block, len(self._blocks))
        return torch.from_numpy(block)

    def _lend(self, block: NDArray[np.float32], place: int) -> Tensor:
        array = block[...]
        self._blocks[place : place + 1] = [(block, weakref.ref(array))]
        return torch.from_numpy(array)
