"""SIGINT and SIGTERM during a run: finish the step, save, stop.

Where there is nothing to save, such as before the first step, a run stops at the next look at the
flag. What a second signal does, and what happens if no look comes: `reidreg.machine.interrupting`.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Iterator

from reidreg.distributed.group import Agreement
from reidreg.errors import InterruptedRun
from reidreg.machine.interrupting import SignalFlag


class StopSignals(SignalFlag):
    """Notes SIGINT and SIGTERM; the training loop looks at `agreed` after each step."""

    def __init__(self) -> None:
        super().__init__(signal.SIGINT, signal.SIGTERM)
        self._agreement = Agreement()

    def __enter__(self) -> StopSignals:
        super().__enter__()
        return self

    def agreed(self, at_once: bool = False) -> int | None:
        """The signal that any rank has received, the same on all ranks at the same step.

        Args:
            at_once: Wait for the other ranks' answers; otherwise they count one step later.
        """
        return self._agreement.highest(self.received or 0, at_once) or None

    @contextlib.contextmanager
    def immediate(self, saved: str | None) -> Iterator[None]:
        """Let `check_stop` stop the run inside this block, which has nothing to save.

        A signal that came before the block stops the run on entry, one that no piece of work looked
        at on exit.

        Args:
            saved: The checkpoint that holds the run's state, for the message.

        Raises:
            InterruptedRun: A signal has come.
        """
        self.error = functools.partial(InterruptedRun, checkpoint=saved)
        try:
            self.check()
            yield
            self.check()
        finally:
            self.error = None

    def obey(self, saved: str | None) -> None:
        """Stop now if a signal has come.

        Args:
            saved: As for `immediate`.

        Raises:
            InterruptedRun: A signal has come.
        """
        with self.immediate(saved):
            pass
