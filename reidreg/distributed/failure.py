"""How the ranks of a run end together: one reports the cause, none stays behind waiting.

The first rank that fails says so in the store, prints why, and leaves the reason for torchrun.
A thread of each rank sends heartbeats, watches those of a few others, and ends its process once a
rank has failed or is silent, whatever the main thread is doing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from reidreg.distributed.liveness import Peer
from reidreg.distributed.store import STORE_ERRORS, connect, key, main_store
from reidreg.errors import RankError, ReidregError
from reidreg.machine.world import World, world_from_env

_GRACE = 5.0  # seconds in which a process may end by itself once another has failed
_POLL = 1.0  # seconds between heartbeats, and between checks of the others'


@contextlib.contextmanager
def errors_of_ranks() -> Iterator[None]:
    """Turn torch's errors about a rank that is gone or silent into a RankError of one line."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        text = str(error)
        if isinstance(error, ReidregError) or not (
            isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text
        ):
            raise
        silent = "timed out" in text.lower() or "timeout" in text.lower()
        what = "has not answered within train.rank_timeout" if silent else "has ended"
        raise RankError(
            f"another process of this run {what}, so all end; --resume auto goes on from the last "
            "checkpoint"
        ) from error


# --------------------------------------------------------------------- the first failure


def is_first_failure(store: TCPStore | None = None) -> bool:
    """Whether this rank is the first to fail, and so the one that reports the cause.

    Any other rank waits here until the cause is printed: a launcher kills the remaining processes
    as soon as one has ended.

    Args:
        store: The connection to use; None takes the main thread's.
    """
    place = world_from_env()
    if place.size == 1:
        return True
    try:
        store = store or main_store(place)
        mark = str(place.rank)
        if store.compare_set(key(place, "failed"), "", mark).decode() == mark:
            return True
        deadline = time.monotonic() + _GRACE
        while not store.check([key(place, "reported")]) and time.monotonic() < deadline:
            time.sleep(0.05)
    except STORE_ERRORS:
        pass  # the process that hosted the store has ended, and has reported why
    return False


def tell_failure(
    error: BaseException, tell: Callable[[], str], store: TCPStore | None = None
) -> None:
    """Report why this process fails, unless another rank has failed first.

    The text also goes to torchrun, whose summary names the first failure.

    Args:
        error: What was raised.
        tell: Prints a text, and returns it.
        store: The connection to use; None takes the main thread's.
    """
    if not is_first_failure(store):
        return
    text, place = tell(), world_from_env()
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        content = {"message": {"message": type(error).__name__, "extraInfo": extra}}
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as stream:
            json.dump(content, stream)
    if place.size > 1:
        with contextlib.suppress(*STORE_ERRORS):
            (store or main_store(place)).set(key(place, "reported"), "1")


# --------------------------------------------------------------------- heartbeats


class Watch:
    """A thread that sends this rank's heartbeats, and ends the process when the run is broken.

    Args:
        place: This process's place in the world.
        peers: The ranks that it monitors.
    """

    def __init__(self, place: World, peers: Sequence[Peer]) -> None:
        self._place, self._peers = place, peers
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and wait for it."""
        self._over.set()
        self._thread.join(_GRACE)  # a thread inside torch would abort the interpreter's exit

    def _run(self) -> None:
        try:
            # The main thread's connection may be blocked in a call.
            store = connect(self._place)
            while not self._over.wait(_POLL) and not store.check([key(self._place, "failed")]):
                self._beat(store)
        except STORE_ERRORS:
            pass  # the launcher itself has ended
        if not self._over.wait(_GRACE):
            os._exit(1)

    def _beat(self, store: TCPStore) -> None:
        """Send a heartbeat, and check those of the peers."""
        store.add(self._heartbeats(self._place.rank), 1)
        for peer in self._peers:
            if peer.is_lost(store.add(self._heartbeats(peer.process.rank), 0)):
                _end_without(peer, store)

    def _heartbeats(self, rank: int) -> str:
        return key(self._place, f"heartbeats/{rank}")


def _end_without(lost: Peer, store: TCPStore) -> None:
    """Report a lost rank, kill it if it is on this machine, and end this process at once.

    The main thread may be anywhere and is not waited for. No file is left half written, because
    all are written under another name and renamed.
    """
    error = RankError(
        f"{lost.process} is stopped or hangs: no heartbeat for {lost.patience} s, so all end; "
        "--resume auto goes on from the last checkpoint"
    )

    def tell() -> str:
        line = f"reidreg: {error}"
        print(line, file=sys.stderr, flush=True)
        return line

    tell_failure(error, tell, store)
    # Kill after the report, since torchrun ends all ranks as soon as one is gone; and in a later
    # second, since its summary picks the first failure by timestamps in whole seconds.
    time.sleep(1)
    lost.kill()
    os._exit(error.exit_code)
