"""Signs of life: who watches whom, and what is taken for the end of a process."""

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

from reidreg.distributed.liveness import Identity, Neighbour, neighbours


def identity(rank: int, machine: str) -> Identity:
    return Identity(rank, machine, machine, 1000 + rank, 5)


@pytest.mark.parametrize("machines", ["aaaa", "aabb", "abab", "abc", "aab", "ab"])
def test_every_process_is_watched_by_one_of_its_machine_and_every_machine_by_another(
    machines: str,
) -> None:
    everyone = [identity(rank, name) for rank, name in enumerate(machines)]
    watched: dict[int, set[str]] = {rank: set() for rank in range(len(machines))}
    for rank, name in enumerate(machines):
        found = neighbours(rank, everyone)
        assert len(found) <= 2
        for other in found:
            assert other.identity.rank != rank
            assert (other.patience == 30) == (other.identity.machine == name)
            watched[other.identity.rank].add(name)
    for rank, name in enumerate(machines):
        assert name in watched[rank] or machines.count(name) == 1
    for name in set(machines) if len(set(machines)) > 1 else ():
        by = {other for rank, own in enumerate(machines) if own == name for other in watched[rank]}
        assert by - {name}


def test_one_process_has_nobody_to_watch() -> None:
    assert neighbours(0, [identity(0, "a")]) == []


def test_one_that_gives_signs_is_kept_and_one_that_stops_is_given_up() -> None:
    there = Neighbour(identity(1, "b"), here=False)
    assert not any(there.given_up(signs) for signs in range(1000))
    looks = [there.given_up(999) for _ in range(there.patience)]
    assert looks.index(True) == there.patience - 1
    assert not there.given_up(1000)  # it goes on after all


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes, and never gives a sign."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processor times are Linux's")
def test_one_that_computes_without_a_sign_lives_and_a_stopped_one_is_killed(
    busy: subprocess.Popen[bytes],
) -> None:
    own = Identity.own(0)
    assert own.pid == os.getpid() and own.processor_time() is not None
    fields = Path(f"/proc/{busy.pid}/stat").read_text().split()
    other = Neighbour(replace(own, rank=1, pid=busy.pid, started=int(fields[21])), here=True)

    def given_up_within(looks: int) -> bool:
        for _ in range(looks):
            time.sleep(0.05)
            if other.given_up(7):
                return True
        return False

    assert not given_up_within(2 * other.patience)
    busy.send_signal(signal.SIGSTOP)
    assert given_up_within(2 * other.patience)
    # Another process under the same id is none of ours.
    Neighbour(replace(other.identity, started=1), here=True).end()
    time.sleep(0.1)
    assert busy.poll() is None
    other.end()
    assert busy.wait(10) == -signal.SIGKILL
