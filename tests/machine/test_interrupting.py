"""Signals set a flag; work stops where it looks at it, or its process is ended in time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from reidreg.logs.progress import ProgressBar
from reidreg.machine import interrupting
from reidreg.machine.interrupting import SignalFlag, check_stop

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stop(BaseException):
    pass


@contextmanager
def stoppable() -> Iterator[SignalFlag]:
    with SignalFlag(*NUMBERS) as flag:
        flag.error = Stop
        yield flag


# --------------------------------------------------------------------- the flag


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_stops_work_at_its_next_look_and_not_before(number: signal.Signals) -> None:
    check_stop()
    with stoppable() as flag:
        check_stop()
        signal.raise_signal(number)
        assert flag.received == number
        with pytest.raises(Stop, match=str(int(number))):
            check_stop()
    check_stop()


def test_a_progress_bar_looks_at_each_move() -> None:
    with stoppable(), ProgressBar("images", 2) as bar:
        bar.advance()
        bar.report(1, 2)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stop):
            bar.advance()
        with pytest.raises(Stop):
            bar.report(1, 2)


def test_work_that_may_not_stop_in_between_goes_on() -> None:
    with SignalFlag(*NUMBERS) as flag:
        signal.raise_signal(signal.SIGTERM)
        check_stop()
        assert flag.received == signal.SIGTERM


def test_the_innermost_flag_counts_and_takes_over_a_signal_that_came_before() -> None:
    with stoppable() as outer:
        with SignalFlag(*NUMBERS) as inner:
            signal.raise_signal(signal.SIGINT)
            check_stop()
        assert (outer.received, inner.received) == (None, signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with SignalFlag(*NUMBERS) as later, SignalFlag(signal.SIGINT) as other:
            assert (later.received, other.received) == (signal.SIGTERM, None)


def test_other_threads_are_not_stopped_and_set_no_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        check_stop()
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))
            check_stop()

    with stoppable():
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen and seen != [before]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
def test_the_handlers_from_before_are_put_back(before: signal.Handlers) -> None:
    own = signal.signal(signal.SIGINT, before)
    try:
        with SignalFlag(*NUMBERS):
            assert signal.getsignal(signal.SIGINT) is not before
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, own)


def test_in_a_users_program_a_second_signal_goes_to_the_handler_from_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with SignalFlag(*NUMBERS) as flag:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # at the same time: one that came twice
            monkeypatch.setattr(interrupting, "SAME", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert flag.received == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, own)


# --------------------------------------------------------------------- a process of our own

# A call that is one piece and lets other threads run, like those of torch, numpy and faiss.
ONE_CALL = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
HELD_LOCK = "lock = threading.Lock(); lock.acquire(); lock.acquire()"
LOOKING = "[(time.sleep(0.05), check_stop()) for _ in range(200)]"
SWALLOWING = """
while True:
    try: check_stop(); time.sleep(60)
    except BaseException: pass"""
AT_ONCE = 2.0  # seconds


class Script:
    """A process of our own that does some work and prints when it begins."""

    def __init__(self, work: str, *before: str) -> None:
        imports = "import hashlib, os, signal, sys, threading, time\n"
        imports += "from reidreg.machine.interrupting import *\n"
        code = [imports, *before, "own_process('evaluate')", "print('begun', flush=True)", work]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "begun\n"
        time.sleep(0.1)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, float]:
        """Its exit code, its stderr, and how many seconds it took to end."""
        start = time.monotonic()
        try:
            _, errors = self.process.communicate(timeout=30)
        finally:
            self.process.kill()
        return self.process.returncode, errors, time.monotonic() - start


@pytest.mark.parametrize("work", [ONE_CALL, HELD_LOCK, "time.sleep(60)"])
def test_work_that_does_not_look_is_ended_in_time(work: str) -> None:
    script = Script(work)
    script.send(signal.SIGINT)
    code, errors, seconds = script.end()
    assert (code, errors) == (130, "reidreg evaluate: stopped\n")
    assert interrupting.GRACE / 2 < seconds < AT_ONCE


def test_work_that_looks_is_unwound() -> None:
    script = Script(f"try: {LOOKING}\nexcept KeyboardInterrupt: sys.exit('unwound')")
    script.send(signal.SIGINT)
    assert script.end()[:2] == (1, "unwound\n")


def test_work_that_has_looked_may_take_longer_to_unwind() -> None:
    script = Script(f"try: {LOOKING}\nexcept KeyboardInterrupt: time.sleep(2); sys.exit('unwound')")
    script.send(signal.SIGINT)
    assert script.end()[:2] == (1, "unwound\n")


def test_work_that_has_something_to_save_is_not_ended_by_one_signal() -> None:
    script = Script("with SignalFlag(15) as flag: time.sleep(2.5); sys.exit(flag.received)")
    script.send(signal.SIGTERM)
    time.sleep(interrupting.SAME / 5)
    script.send(signal.SIGTERM)  # the same one, as `timeout` sends it
    assert script.end()[:2] == (15, "")


@pytest.mark.parametrize("work", [ONE_CALL, HELD_LOCK])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_signal_ends_any_work_at_once(work: str, number: signal.Signals) -> None:
    script = Script(f"with SignalFlag(2, 15): {work}")
    script.send(number)
    time.sleep(interrupting.SAME + 0.2)
    script.send(number)
    code, errors, seconds = script.end()
    assert code == 128 + number and seconds < interrupting.GRACE
    assert errors == "reidreg evaluate: stopped at once by a second signal\n"


def test_a_second_signal_ends_work_that_swallows_the_first() -> None:
    script = Script(SWALLOWING)
    script.send(signal.SIGINT)
    time.sleep(interrupting.SAME + 0.2)
    script.send(signal.SIGINT)
    assert script.end()[0] == 130


def test_a_process_can_end_by_the_signal_itself() -> None:
    script = Script("end_by_signal()\ntime.sleep(60)")
    script.send(signal.SIGINT)
    assert script.end()[:2] == (-signal.SIGINT, "reidreg evaluate: stopped\n")


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    script = Script("time.sleep(2)", "signal.signal(2, signal.SIG_IGN)")
    script.send(signal.SIGINT)
    assert script.end()[:2] == (0, "")


def test_signals_of_a_forked_child_do_not_reach_its_parent() -> None:
    child = "for _ in range(3): os.kill(os.getpid(), 2)"
    script = Script(f"if not os.fork():\n    {child}\n    os._exit(0)\nos.wait(); time.sleep(2)")
    assert script.end()[:2] == (0, "")
