"""Whether the other processes of a run live, by what can be seen of them from outside.

Each process gives a sign every second from a thread of its own, whatever its main thread is doing:
evaluating, writing, reading, waiting for others. One that is stopped, or hangs where no thread of
it can go on, gives none, and would leave the others waiting for hours.

A plugin may keep Python's lock for minutes while it computes, so that its process gives no sign
either. On the same machine that shows, since the process uses a processor; of another machine
nothing is known but the signs, and there they may fail to come for longer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# In looks of the one that waits, about a second each, and not by a clock: where all processes are
# stopped and go on together, as a batch system does it, none of them has missed a sign.
_HERE = 30
_ELSEWHERE = 300


@dataclass(frozen=True)
class Identity:
    """A process, as others can find it.

    Args:
        rank: Which one of the world it is.
        host: The name of its machine, for people.
        machine: What is the same for processes that see each other's process ids.
        pid: Its process id.
        started: When it started, in the kernel's ticks; None where the kernel does not say.
    """

    rank: int
    host: str
    machine: str
    pid: int
    started: int | None

    @classmethod
    def own(cls, rank: int) -> Identity:
        """That of this process.

        Args:
            rank: Its rank.
        """
        host, machine = socket.gethostname(), ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        times = _times(os.getpid())
        return cls(rank, host, machine or host, os.getpid(), times[0] if times else None)

    def processor_time(self) -> int | None:
        """Ticks of processor time that it has used so far; None where that cannot be seen."""
        times = _times(self.pid)
        # An equal id alone may be another process's, which has it after this one.
        return times[1] if times and times[0] == self.started else None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def _times(pid: int) -> tuple[int, int] | None:
    """When a process started, and the processor time of all its threads, in ticks."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # its name, in brackets, may hold anything
    return int(fields[19]), int(fields[11]) + int(fields[12])  # proc(5): starttime, utime, stime


class Neighbour:
    """Another process, watched by this one.

    Args:
        identity: Which.
        here: Whether it runs on this machine.
    """

    def __init__(self, identity: Identity, here: bool) -> None:
        self.identity = identity
        # Where its processor time cannot be seen, one of this machine is as any other.
        self._here = here and identity.started is not None
        self._seen: tuple[int, int | None] | None = None
        self._looks = 0

    @property
    def patience(self) -> int:
        """After how many looks without a sign it is given up."""
        return _HERE if self._here else _ELSEWHERE

    def given_up(self, signs: int) -> bool:
        """Look at it once: whether it has shown no life for too long.

        Args:
            signs: How many it has given so far.
        """
        seen = signs, self.identity.processor_time() if self._here else None
        self._looks = self._looks + 1 if seen == self._seen else 0
        self._seen = seen
        return self._looks >= self.patience

    def end(self) -> None:
        """Kill it, if it is there and runs on this machine; a stopped one hears nothing else."""
        if self._here and self.identity.processor_time() is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.identity.pid, signal.SIGKILL)


def neighbours(rank: int, everyone: Sequence[Identity]) -> list[Neighbour]:
    """Whom a process watches, so that nobody is silent unseen and nobody watches many.

    The processes of a machine stand in a ring, and so do the first ones of all machines; each
    watches the next.

    Args:
        rank: Whose neighbours.
        everyone: All processes, by rank.
    """
    own = everyone[rank]
    here = [other for other in everyone if other.machine == own.machine]
    firsts = list({other.machine: other for other in reversed(everyone)}.values())
    found = []
    for ring in (here, firsts):
        if own in ring and len(ring) > 1:
            following = ring[(ring.index(own) + 1) % len(ring)]
            found.append(Neighbour(following, here=ring is here))
    return found
