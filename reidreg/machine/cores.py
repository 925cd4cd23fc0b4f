"""How many cores a process may use, and who uses them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from threadpoolctl import threadpool_limits


def count_cores() -> int:
    """The cores that this process may use: those that it is bound to, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def one_thread_for_numpy() -> Iterator[None]:
    """Products of numpy's matrices on the thread that asks for them.

    OpenBLAS splits even small ones among threads that wait for each other: for a moment where the
    cores are free, for seconds where they are busy.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        yield
