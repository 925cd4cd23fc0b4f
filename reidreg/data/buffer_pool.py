"""Reused memory for batches.

A batch of floats takes tens of megabytes. The system returns such blocks as fresh pages, and
clearing those can take longer than filling them.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEPT = 3  # the batch in use, the next, and one that the caller still holds


class BufferPool:
    """Float32 tensors on the CPU, in blocks of memory that no earlier tensor uses any more."""

    def __init__(self) -> None:
        # Each block with the array over it that the latest tensor was made from: torch keeps a
        # reference to that array for as long as anything, a view or a graph, uses the memory.
        self._blocks: list[tuple[NDArray[np.float32], weakref.ref[Any]]] = []

    def __len__(self) -> int:
        """How many blocks the pool holds, in use or free."""
        return len(self._blocks)

    def empty(self, *shape: int) -> Tensor:
        """A tensor with arbitrary content."""
        for index, (block, user) in enumerate(self._blocks):
            if user() is None and block.shape == shape:
                return self._tensor(block, index)
        block = np.empty(shape, dtype=np.float32)
        free = [index for index, (_, user) in enumerate(self._blocks) if user() is None]
        if free:
            return self._tensor(block, free[0])  # replaces a block of another shape
        if len(self._blocks) < _KEPT:
            return self._tensor(block, len(self._blocks))
        return torch.from_numpy(block)

    def _tensor(self, block: NDArray[np.float32], index: int) -> Tensor:
        array = block[...]
        self._blocks[index : index + 1] = [(block, weakref.ref(array))]
        return torch.from_numpy(array)
