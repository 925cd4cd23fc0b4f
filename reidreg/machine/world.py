"""Which of how many processes this one is, by the environment that its launcher sets.

`torchrun` sets these variables, and other launchers of torch set the same. Without them, a process
is a world of its own. Nothing here imports torch: even what only prints asks who prints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from reidreg.errors import ConfigError


@dataclass(frozen=True)
class World:
    """The processes that work on one run.

    Args:
        rank: Which one this is, from 0.
        size: How many there are, on all machines.
        local_rank: Which one of this machine it is, from 0.
        local_size: How many there are on this machine.
        restarts: How often the launcher has started them anew after a failure.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> slice:
        """The rows out of `count` that are a rank's: contiguous, the first ranks' one longer.

        Args:
            count: Rows in all.
            rank: Whose share; None takes this process's.
        """
        rank = self.rank if rank is None else rank
        each, left = divmod(count, self.size)
        start = rank * each + min(rank, left)
        return slice(start, start + each + (rank < left))


def world_from_env(environment: Mapping[str, str] = os.environ) -> World:
    """The world that a launcher put this process into.

    Args:
        environment: The variables.

    Raises:
        ConfigError: The variables contradict each other.
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
            f"{world.local_size}: the environment is no launcher's; start several processes by "
            "torchrun, or unset RANK and WORLD_SIZE for one"
        )
    if size > 1 and not ("MASTER_ADDR" in environment and "MASTER_PORT" in environment):
        raise ConfigError(
            "WORLD_SIZE is set, MASTER_ADDR and MASTER_PORT are not: start several processes by "
            "torchrun, or unset RANK and WORLD_SIZE for one"
        )
    return world


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is no number; torchrun sets it, or unset it")
    return int(text)
