"""Signals that stop what the main thread does: other threads never wait for a lock it left held."""

from __future__ import annotations

import contextlib
import functools
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from reidreg.data import image_cache
from reidreg.data.image_cache import Wanted
from reidreg.errors import InterruptedRun
from reidreg.machine import interrupting
from reidreg.machine.interrupting import OutsideLocks, interrupt_outside_locks
from reidreg.training.signals import StopSignals
from worlds import FORKING

Work = Callable[[], object]

needs_timers = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")


class _Nowhere:
    def write(self, content: memoryview) -> int:
        return len(content)


def decode_in_a_pool() -> None:
    """What makes an image cache, with images that take no time."""
    image_cache._BLOCK = 1
    image_cache.load_images = lambda block, size: torch.zeros(1, *size, 3, dtype=torch.uint8)
    image_cache._build(Wanted(("image",) * 6, (2, 2), "group", "fingerprint"), _Nowhere())


def map_in_a_pool() -> None:
    """What multiplies tiles in threads."""
    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(np.sum, [np.ones(2)] * 6)) == 12


def put_in_a_queue() -> None:
    """What hands a loader's batches to its thread for pinned memory."""
    batches: queue.Queue[int | None] = queue.Queue(2)
    taker = threading.Thread(target=lambda: [*iter(batches.get, None)], daemon=True)
    try:
        taker.start()
        for batch in range(6):
            batches.put(batch)
    finally:
        if taker.ident is not None:
            batches.put(None)
            taker.join()


def stopped_at(place: int, work: Work) -> bool:
    """Do work, with a signal before one of the main thread's instructions, as if it came there.

    Returns:
        Whether there were so many instructions.
    """
    count = 0

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
        if count == place:
            sys.settrace(None)  # what looks again is to find the work, and not this
            handler = signal.getsignal(signal.SIGTERM)
            assert callable(handler)
            handler(signal.SIGTERM, frame)
        return look

    sys.settrace(look)
    try:
        work()
    finally:
        sys.settrace(None)
    return count == place


def stop_everywhere(work: Work, step: int) -> None:
    """Do work again and again, and stop it a little later each time, until it comes to its end."""
    work()  # imports what it needs
    for place in range(1, 10**6, step):
        with StopSignals() as signals, contextlib.suppress(InterruptedRun):
            with signals.immediate(None):
                if not stopped_at(place, work):
                    return
        assert signals.received == signal.SIGTERM


@pytest.mark.parametrize(
    ("work", "step"),
    [
        (decode_in_a_pool, 11),
        (map_in_a_pool, 3),
        (put_in_a_queue, 1),
    ],
)
def test_wherever_a_signal_comes_the_other_threads_end(work: Work, step: int) -> None:
    process = FORKING.Process(target=stop_everywhere, args=(work, step))
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 0


class _Stop(Exception):
    pass


def _raise(number: int, frame: FrameType | None) -> None:
    raise _Stop(number)


def test_a_signal_outside_locks_is_handled_at_once() -> None:
    with pytest.raises(_Stop, match="15"):
        OutsideLocks(_raise)(signal.SIGTERM, sys._getframe())


@needs_timers
def test_a_thread_that_waits_for_another_is_woken() -> None:
    before = signal.signal(signal.SIGTERM, OutsideLocks(_raise))
    main = threading.main_thread().ident
    assert main is not None
    sender = threading.Timer(0.1, functools.partial(signal.pthread_kill, main, signal.SIGTERM))
    sender.start()
    start = time.perf_counter()
    try:
        with pytest.raises(_Stop):
            threading.Event().wait(30)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.perf_counter() - start < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@needs_timers
def test_what_may_have_a_lock_already_is_not_taken_for_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interrupting, "_SOON", 60)  # no look but ours
    handler = OutsideLocks(_raise)
    entering, waiting = (
        _frame_of(getattr(threading.Condition, name)) for name in ("__enter__", "wait")
    )
    try:
        handler(signal.SIGTERM, entering)
        handler._look(entering)
        handler._look(waiting)
        with pytest.raises(_Stop):
            handler._look(waiting)
    finally:
        handler.cancel()


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_is_put_off_where_it_raises_and_stays_ignored_where_it_is(before: Any) -> None:
    own = signal.signal(signal.SIGINT, before)
    try:
        interrupt_outside_locks()
        if before is signal.SIG_IGN:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            return
        assert isinstance(signal.getsignal(signal.SIGINT), OutsideLocks)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, own)


@needs_timers
def test_the_users_own_alarm_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupting, "_SOON", 60)

    def own(number: int, frame: FrameType | None) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGALRM, own)
    try:
        handler = OutsideLocks(_raise)
        inside = _frame_of(threading.Condition.__enter__)
        handler(signal.SIGTERM, inside)
        assert signal.getsignal(signal.SIGALRM) is not own
        handler.cancel()
        assert signal.getsignal(signal.SIGALRM) is own
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


@needs_timers
def test_an_alarm_that_goes_off_as_it_is_cancelled_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interrupting, "_SOON", 60)
    handler = OutsideLocks(_raise)
    handler(signal.SIGTERM, _frame_of(threading.Condition.__enter__))
    late = signal.getsignal(signal.SIGALRM)
    assert callable(late)
    set_timer = signal.setitimer

    def go_off(which: int, seconds: float) -> None:
        set_timer(which, seconds)
        late(signal.SIGALRM, sys._getframe())

    monkeypatch.setattr(signal, "setitimer", go_off)
    handler.cancel()
    assert signal.getsignal(signal.SIGALRM) is not late


def _frame_of(function: Callable[..., Any]) -> FrameType:
    """A frame of a function of a condition, as it is found when a signal comes."""
    found: list[FrameType] = []

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code is function.__code__:
            found.append(frame)

    sys.settrace(look)
    try:
        condition = threading.Condition()
        with condition:
            condition.wait(0.001)
    finally:
        sys.settrace(None)
    return found[0]
