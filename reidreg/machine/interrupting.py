"""SIGINT and SIGTERM: handlers set a flag, and work looks at it between its pieces.

A handler that raises may do so inside the standard library's code for locks and queues and leave a
lock held, so that the threads of a pool or a data loader wait for it forever. The handlers here
only note the signal; what raises is `check_stop`, which is called where the main thread holds no
lock: after each batch, block of images or tile (by `ProgressBar`), and between other pieces.

What takes long in one piece, such as a call of a C library, never looks. So the command line, which
owns its process, also has a thread that ends the process without unwinding: one second after a
signal if work that has nothing to save did not look, and at a second signal in any case. The
system's own handler wakes this thread through a socket, whatever the main thread is doing, and it
takes no lock that the main thread could hold. Only a C call that keeps the interpreter's lock can
delay it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from reidreg.machine.world import world_from_env

GRACE = 1.0  # seconds in which work that may stop at once has to look at the flag
# Seconds within which further signals count as the same one: `timeout` sends its signal to the
# process and to its group, and torchrun passes on what the terminal has sent to all.
SAME = 0.5


class SignalFlag:
    """Notes signals while its context is open, in the main thread; elsewhere it does nothing.

    Args:
        numbers: Which signals.

    Attributes:
        received: The first of them that came.
        error: Makes what `check_stop` raises; None while the work may not stop in between.
    """

    def __init__(self, *numbers: int) -> None:
        self.received: int | None = None
        self.error: Callable[[int], BaseException] | None = None
        self.raised = False
        self._time = 0.0
        self._numbers = numbers
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalFlag:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                self._previous[number] = signal.signal(number, self._note)
            outer = _open[-1].received if _open else None
            if self.received is None and outer in self._numbers:
                self.received = outer  # it came before, and was not looked at yet
            _open.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self in _open:
            _open.remove(self)
        self._restore()

    def check(self) -> None:
        """Raise if a signal came and the work may stop."""
        if self.received is not None and self.error is not None:
            self.raised = True
            raise self.error(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._time = number, now
        elif now - self._time > SAME and _process is None:
            # In a user's own program a second signal does what it would do without us.
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None: a handler that is not Python's.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_open: list[SignalFlag] = []


def check_stop() -> None:
    """Raise if a signal came and the work under way may stop; to be called between its pieces."""
    if _open and threading.current_thread() is threading.main_thread():
        _open[-1].check()


# --------------------------------------------------------------------- a process of our own


@dataclass
class _Process:
    """A process that runs nothing but a command of ours.

    Args:
        command: Its name, for messages.
        signals: The socket from which the numbers of signals are read.
        writer: The socket to which the system's handler writes them; kept here to stay open.
        by_signal: End by the signal itself instead of with an exit code of 128 more.
    """

    command: str
    signals: socket.socket
    writer: socket.socket
    by_signal: bool = False

    def watch(self) -> None:
        """End the process at a second signal, or at the first one if the work does not look."""
        number = self._next(None)
        flag = _open[-1] if _open else None
        self._pass_over(SAME)
        second = self._next(GRACE - SAME)
        if second is None:
            if flag is not None and flag in _open[-1:] and flag.error and not flag.raised:
                self.end(number, str(flag.error(number)) or "stopped")  # as the CLI words it
            second = self._next(None)
        self.end(second, "stopped at once by a second signal")

    def _next(self, seconds: float | None) -> Any:
        """The next signal's number, or None if there is none within some seconds."""
        limit = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if limit is None else max(limit - time.monotonic(), 1e-3)
            self.signals.settimeout(left)
            try:
                number = self.signals.recv(1)[0]
            except TimeoutError:
                return None
            if number in (signal.SIGINT, signal.SIGTERM):  # torch handles others
                return number

    def _pass_over(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while (left := limit - time.monotonic()) > 0:
            self._next(left)

    def end(self, number: int, text: str) -> NoReturn:
        """End without unwinding; child processes end with this one (`distributed.lifeline`)."""
        with contextlib.suppress(OSError):
            if world_from_env().is_main:  # the signal stops the other ranks too
                if os.isatty(2):
                    os.write(2, b"\r\x1b[K\x1b[?25h")  # a progress bar hides the cursor
                os.write(2, f"reidreg {self.command}: {text}\n".encode())
        if self.by_signal and os.name == "posix":
            # Python sets handlers in the main thread only, and this is not it.
            ctypes.CDLL(None).signal(number, 0)
            os.kill(os.getpid(), number)
        os._exit(128 + number)


_process: _Process | None = None


def own_process(command: str) -> None:
    """Have signals end this process in time, for a command line; see the module's docstring.

    Ctrl-C is noted, and `check_stop` raises KeyboardInterrupt. Where the caller had it ignored, as
    shells do for what runs in the background, it stays ignored.

    Args:
        command: Its name, for the line that says that it stopped.
    """
    global _process
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _process = _Process(command, reader, writer)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_leave_to_parent)
    threading.Thread(target=_process.watch, name="signals", daemon=True).start()
    # At its end Python collects garbage among all objects, which takes seconds with torch loaded.
    atexit.register(gc.freeze)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        flag = SignalFlag(signal.SIGINT)
        flag.error = lambda number: KeyboardInterrupt()
        flag.__enter__()  # until the process ends


def end_by_signal() -> None:
    """Have a process that is ended in time end by the signal itself, not by an exit code."""
    if _process is not None:
        _process.by_signal = True


def _leave_to_parent() -> None:
    """In a forked child: do not tell the parent of the child's signals."""
    global _process
    if _process is not None:
        signal.set_wakeup_fd(-1)
        _process = None
