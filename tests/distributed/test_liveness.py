"""Heartbeats: which rank monitors which, and when a rank counts as lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from reidreg.distributed.liveness import Peer, RankProcess, peers_of


def process_of(rank: int, machine: str) -> RankProcess:
    return RankProcess(rank, machine, machine, 1000 + rank, 5)


@pytest.mark.parametrize("machines", ["aaaa", "aabb", "abab", "abc", "aab", "ab"])
def test_every_rank_is_monitored_on_its_machine_and_every_machine_by_another(
    machines: str,
) -> None:
    everyone = [process_of(rank, name) for rank, name in enumerate(machines)]
    monitors: dict[int, set[str]] = {rank: set() for rank in range(len(machines))}
    for rank, name in enumerate(machines):
        found = peers_of(rank, everyone)
        assert len(found) <= 2
        for other in found:
            assert other.process.rank != rank
            assert (other.patience == 30) == (other.process.machine == name)
            monitors[other.process.rank].add(name)
    for rank, name in enumerate(machines):
        assert name in monitors[rank] or machines.count(name) == 1
    for name in set(machines) if len(set(machines)) > 1 else ():
        by = {other for rank, own in enumerate(machines) if own == name for other in monitors[rank]}
        assert by - {name}


def test_a_single_rank_monitors_none() -> None:
    assert peers_of(0, [process_of(0, "a")]) == []


def test_a_rank_is_lost_once_its_heartbeats_stop_for_long_enough() -> None:
    peer = Peer(process_of(1, "b"), same_machine=False)
    assert not any(peer.is_lost(heartbeats) for heartbeats in range(1000))
    checks = [peer.is_lost(999) for _ in range(peer.patience)]
    assert checks.index(True) == peer.patience - 1
    assert not peer.is_lost(1000)  # its heartbeats are back


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes, and sends no heartbeat."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="CPU times are read from /proc")
def test_a_rank_that_computes_without_heartbeats_lives_and_a_stopped_one_is_killed(
    busy: subprocess.Popen[bytes],
) -> None:
    own = RankProcess.current(0)
    assert own.pid == os.getpid() and own.cpu_time() is not None
    fields = Path(f"/proc/{busy.pid}/stat").read_text().split()
    other = Peer(replace(own, rank=1, pid=busy.pid, started=int(fields[21])), same_machine=True)

    def lost_within(checks: int) -> bool:
        for _ in range(checks):
            time.sleep(0.05)
            if other.is_lost(7):
                return True
        return False

    assert not lost_within(2 * other.patience)
    busy.send_signal(signal.SIGSTOP)
    assert lost_within(2 * other.patience)
    # Another process with the same id must not be killed.
    Peer(replace(other.process, started=1), same_machine=True).kill()
    time.sleep(0.1)
    assert busy.poll() is None
    other.kill()
    assert busy.wait(10) == -signal.SIGKILL
