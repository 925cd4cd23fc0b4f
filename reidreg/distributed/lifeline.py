"""Worker processes that end with the process that started them, even if it is killed."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def end_with_parent() -> None:
    """Have the kernel kill this process as soon as its parent has ended.

    A DataLoader worker checks for its parent only every five seconds, and until then keeps open
    what it inherited: the GPU memory of a killed run, which the next run needs. Systems other than
    Linux have only that check.

    The kernel takes the thread that started this process for its parent, so that thread has to
    live as long as the run.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it ended before the call above
        os._exit(1)
