"""Processes of ours that end with the one that started them, however it ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def end_with_parent() -> None:
    """Have the kernel end this process as soon as its parent has ended.

    A loading process looks after its parent by itself, but only every five seconds, and until
    then keeps what it inherited open: the GPU's memory of a run that was killed, which the next
    one needs. Elsewhere than on Linux those five seconds are all there is.

    The kernel counts the thread that started this process as its parent, so that has to be one
    that lives as long as the run.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it ended before it was asked about
        os._exit(1)
