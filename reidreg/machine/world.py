"""Rank and world size, from the environment variables that the launcher sets.

`torchrun` and other launchers of torch set the same variables. Without them the world size is 1.
This module does not import torch, because every command asks here whether it is the one to print.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from reidreg.errors import ConfigError


@dataclass(frozen=True)
class World:
    """The place of this process among the processes of a run.

    Args:
        rank: Its rank, from 0.
        size: The world size: the number of processes on all machines.
        local_rank: Its rank on this machine, from 0.
        local_size: The number of processes on this machine.
        restarts: How often the launcher has restarted all of them after a failure.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> slice:
        """A rank's share of `count` rows: contiguous, one row longer in the first ranks if uneven.

        Args:
            count: The number of rows of all ranks together.
            rank: The rank; None takes this process's.
        """
        rank = self.rank if rank is None else rank
        each, left = divmod(count, self.size)
        start = rank * each + min(rank, left)
        return slice(start, start + each + (rank < left))


def world_from_env(environment: Mapping[str, str] = os.environ) -> World:
    """Read this process's place from the launcher's environment variables.

    Args:
        environment: The variables.

    Raises:
        ConfigError: They contradict each other.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return World()
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    world = World(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", rank),
        local_size=_number(environment, "LOCAL_WORLD_SIZE", size),
        restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
    )
    if not (rank < size and world.local_rank < world.local_size):
        raise ConfigError(
            f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {world.local_rank} of LOCAL_WORLD_SIZE "
            f"{world.local_size}: no launcher sets these; start several processes with torchrun, "
            "or unset RANK and WORLD_SIZE to run one"
        )
    if size > 1 and not ("MASTER_ADDR" in environment and "MASTER_PORT" in environment):
        raise ConfigError(
            "WORLD_SIZE is set, MASTER_ADDR and MASTER_PORT are not: start several processes with "
            "torchrun, or unset RANK and WORLD_SIZE to run one"
        )
    return world


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is not a number; start with torchrun, or unset it")
    return int(text)
