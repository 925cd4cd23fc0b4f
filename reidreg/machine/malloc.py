"""Have the C library keep freed memory, for training and extraction on a CPU.

A training step on a CPU allocates and frees gigabytes of activations. By default the GNU C library
returns large blocks to the kernel at once, which clears every page of them again for the next
layer: a fifth of the CPU time of a step of ResNet-50 in bfloat16. Keeping the blocks makes the
process an eighth larger; benchmarks/README.md has the figures.

Needed as long as torch's CPU allocator has no cache of its own, as its CUDA allocator has, and
takes every tensor from malloc. No test can tell when that changes: to find out, compare
`benchmarks/step.py` with and without `keep_freed_memory`.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3), from malloc.h of the GNU C library.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MIB = 2**20
# Blocks up to this size are kept. Larger ones, which are feature tables and caches, never
# activations, go back when freed. The second value is the maximum of glibc before 2.35.
_KEPT = (256 * _MIB, 32 * _MIB)


def keep_freed_memory() -> bool:
    """Keep freed blocks in this process for the next allocations.

    Returns:
        Whether it does; another C library is left as it is.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _KEPT)
    return kept and bool(mallopt(_M_TRIM_THRESHOLD, -1))
