"""Heartbeats: detect ranks that are stopped or hung.

Each rank sends a heartbeat every second from a thread, whatever its main thread is doing:
evaluating, writing, reading, waiting for others. A rank that is stopped, or hangs so that none of
its threads can run, sends none, and would leave the others waiting for hours.

A plugin may hold the GIL for minutes while it computes, which stops the heartbeats as well. On the
same machine the CPU time of its process tells the two apart. On another machine heartbeats are all
that can be seen, so they may stay away for longer there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Missed checks, about one a second, until a rank counts as lost. Checks are counted, not seconds:
# where a batch system stops all processes and continues them together, no check was missed.
_SAME_MACHINE = 30
_OTHER_MACHINE = 300


@dataclass(frozen=True)
class RankProcess:
    """The process of a rank, described so that other ranks can find it.

    Args:
        rank: Its rank.
        host: The host name, for messages.
        machine: An id that is equal for processes that see each other's process ids.
        pid: The process id.
        started: The start time in the kernel's ticks; None where the kernel does not say.
    """

    rank: int
    host: str
    machine: str
    pid: int
    started: int | None

    @classmethod
    def current(cls, rank: int) -> RankProcess:
        """This process.

        Args:
            rank: Its rank.
        """
        host, machine = socket.gethostname(), ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        times = _times(os.getpid())
        return cls(rank, host, machine or host, os.getpid(), times[0] if times else None)

    def cpu_time(self) -> int | None:
        """The CPU time that it has used so far, in ticks; None where that cannot be seen."""
        times = _times(self.pid)
        # The kernel reuses process ids: only with the same start time is it this process.
        return times[1] if times and times[0] == self.started else None

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def _times(pid: int) -> tuple[int, int] | None:
    """When a process started, and the CPU time of all its threads, in ticks."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the process name, in brackets, may hold anything
    return int(fields[19]), int(fields[11]) + int(fields[12])  # proc(5): starttime, utime, stime


class Peer:
    """Another rank, monitored by this one.

    Args:
        process: Its process.
        same_machine: Whether it runs on this machine.
    """

    def __init__(self, process: RankProcess, same_machine: bool) -> None:
        self.process = process
        # Where CPU times cannot be seen, the same machine is no better than another.
        self._visible = same_machine and process.started is not None
        self._seen: tuple[int, int | None] | None = None
        self._missed = 0

    @property
    def patience(self) -> int:
        """The number of missed checks after which it counts as lost."""
        return _SAME_MACHINE if self._visible else _OTHER_MACHINE

    def is_lost(self, heartbeats: int) -> bool:
        """Check it once: whether it has been silent for too many checks.

        Args:
            heartbeats: How many it has sent so far.
        """
        seen = heartbeats, self.process.cpu_time() if self._visible else None
        self._missed = self._missed + 1 if seen == self._seen else 0
        self._seen = seen
        return self._missed >= self.patience

    def kill(self) -> None:
        """Kill it, if it runs on this machine; a stopped process reacts to SIGKILL only."""
        if self._visible and self.process.cpu_time() is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)


def peers_of(rank: int, processes: Sequence[RankProcess]) -> list[Peer]:
    """The ranks that each rank monitors: a ring per machine plus a ring of machine leaders.

    So every rank is monitored, and none monitors more than two.

    Args:
        rank: The monitoring rank.
        processes: The processes of all ranks, by rank.
    """
    own = processes[rank]
    machine = [other for other in processes if other.machine == own.machine]
    leaders = list({other.machine: other for other in reversed(processes)}.values())
    found = []
    for ring in (machine, leaders):
        if own in ring and len(ring) > 1:
            following = ring[(ring.index(own) + 1) % len(ring)]
            found.append(Peer(following, same_machine=ring is machine))
    return found
