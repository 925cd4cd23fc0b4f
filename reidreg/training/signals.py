"""SIGINT and SIGTERM: finish the step, save, stop. A second one stops at once.

So does the first one where there is nothing to save, such as before the first step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from reidreg.distributed.group import Agreement
from reidreg.errors import InterruptedRun
from reidreg.machine.interrupting import OutsideLocks


class StopSignals:
    """Notes a signal while its context is open; the loop looks at `agreed` after each step."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._agreement = Agreement()
        self._immediate = False
        self._again = False
        self._saved: str | None = None
        self._stop = OutsideLocks(self._stop_if_due)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python allows handlers in the main thread only; elsewhere a run is not interruptible.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._again = self.received is not None
        # Noted in any case: Python drops what is raised within a finalizer.
        self.received = number
        if self._immediate or self._again:
            self._stop(number, frame)

    def _stop_if_due(self, number: int, frame: FrameType | None) -> None:
        if self._immediate or self._again:  # the block may have ended since the signal came
            raise InterruptedRun(number, self._saved)

    def agreed(self, at_once: bool = False) -> int | None:
        """The signal that a process of the run has received, in all of them at the same step.

        Args:
            at_once: Wait for the others' word; otherwise it is known one step later.
        """
        return self._agreement.highest(self.received or 0, at_once) or None

    @contextlib.contextmanager
    def immediate(self, saved: str | None) -> Iterator[None]:
        """Stop at once inside this block, since there is nothing to save that is not saved.

        Args:
            saved: The checkpoint that holds the run's state, for the message.
        """
        self._saved = saved
        self._immediate = True
        try:
            self.obey(saved)
            yield
        finally:
            self._immediate = False

    def obey(self, saved: str | None) -> None:
        """Stop now if a signal has come, since there is nothing to save that is not saved.

        Args:
            saved: The checkpoint that holds the run's state, for the message.
        """
        if self.received is not None:
            raise InterruptedRun(self.received, saved)
