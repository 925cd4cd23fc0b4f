"""The key-value store that all ranks can reach, even while a process group is broken."""

from __future__ import annotations

import functools
import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from reidreg.machine.world import World

STORE_ERRORS = (RuntimeError, dist.DistError)  # raised once the process that hosts it has ended

_CONNECT = timedelta(seconds=60)


def connect(place: World, host: bool = False) -> TCPStore:
    """Open a connection to the store; a thread needs its own, since calls block.

    Args:
        place: This process's place in the world.
        host: Host the store in this process.
    """
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=place.size,
        is_master=host,
        timeout=_CONNECT,
        wait_for_workers=False,
        multi_tenant=True,
    )


@functools.cache
def main_store(place: World) -> TCPStore:
    """The main thread's connection."""
    # torchrun hosts the store in its agent; with other launchers rank 0 does.
    launcher_has_one = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return connect(place, host=place.is_main and not launcher_has_one)


def key(place: World, name: str) -> str:
    """A key of this attempt of the run: a restarted run finds none of the last attempt's."""
    return f"reidreg/{place.restarts}/{name}"
