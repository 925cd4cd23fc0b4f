"""The CPU cores that this process may use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from threadpoolctl import threadpool_limits


def count_cores() -> int:
    """The number of cores that this process may use: its CPU affinity, where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def one_thread_for_numpy() -> Iterator[None]:
    """Compute numpy's matrix products on the calling thread alone.

    OpenBLAS splits even small products among threads that wait for each other, which takes seconds
    where the cores are busy with other work.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        yield
