"""Signal handlers that raise, and leave no lock held that another thread waits for.

Python runs a handler between any two instructions of the main thread. What it raises within the
standard library's own code for locks and queues can leave one of them held for good, and threads
of a pool or of a data loader would never end. So a handler is put off until that code is left.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

# The modules whose functions take locks by hand, between one instruction and the next.
_LOCKING = frozenset(
    {
        "concurrent.futures._base",
        "concurrent.futures.thread",
        "logging",
        "multiprocessing.queues",
        "multiprocessing.synchronize",
        "queue",
        "threading",
    }
)
_SOON = 0.01  # seconds until another look


class OutsideLocks:
    """Calls a signal handler once the main thread is outside code that takes locks.

    A thread that waits, for a lock or for another thread to end, is not kept waiting: it is asleep,
    and raising wakes it in good order. It is known by two looks that find it at one place.

    Where the system has no timers (Windows) the handler is called at once.

    Args:
        handler: May raise. It is given the signal's number and the main thread's frame.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._number = 0
        self._waiting = False
        self._seen: tuple[FrameType, int] | None = None
        self._alarm: Any = None  # the handler of SIGALRM that ours stands in for

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._seen = None
        self._look(frame)

    def cancel(self) -> None:
        """Forget a signal that is put off."""
        self._waiting = False  # first, for the alarm may go off meanwhile
        self._seen = None
        if self._alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm)
            self._alarm = None

    def _look(self, frame: FrameType | None) -> None:
        place = _place_among_locks(frame)
        if place is None or place == self._seen and _may_wait(place[0]):
            self.cancel()
            self._handler(self._number, frame)
            return
        self._seen = place
        self._waiting = True
        if self._alarm is None:
            before = signal.signal(signal.SIGALRM, self._look_again)
            self._alarm = signal.SIG_DFL if before is None else before  # None: not Python's own
        signal.setitimer(signal.ITIMER_REAL, _SOON)

    def _look_again(self, alarm: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._look(frame)


def _place_among_locks(frame: FrameType | None) -> tuple[FrameType, int] | None:
    """Where the main thread is, if that is within code that takes locks."""
    if frame is None or not hasattr(signal, "setitimer"):
        return None
    if frame.f_globals.get("__name__") not in _LOCKING:
        return None
    return frame, frame.f_lasti


def _may_wait(frame: FrameType) -> bool:
    """Whether this code sleeps without a lock; what enters one may have it already."""
    return frame.f_code.co_name != "__enter__"


def interrupt_outside_locks() -> None:
    """Have Ctrl-C, where it raises KeyboardInterrupt, not do so within code that takes locks."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, OutsideLocks(signal.default_int_handler))
